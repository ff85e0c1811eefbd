"""`sail-rl doctor`, run as a user would: every check says ok or what to do, and nothing is left behind."""

import json
import re

import pytest
import torch
from conftest import command
from PIL import Image

from sail_rl import machine_checks
from sail_rl.command_line import BadInput, load_recipe
from sail_rl.config import GrpoRecipe
from sail_rl.device_exchange import exchange_between
from sail_rl.gpus import parse_gpus
from sail_rl.machine_checks import check_memory, check_packages, room

MACHINE = ["recipe", "packages", "device", "exchange", "files", "memory"]
NAMES = [*MACHINE, "model", "disk", "data", "engine", "parity", "rewards"]
TINY = ("model={random_init: tiny}", "rollout.max_completion_length=12")


def doctor(folder, *overrides, recipe="recipes/quickstart.yaml"):
    """(exit code, [(verdict, check)], all output)."""
    output_dir = folder / "run"
    result = command("-m", "sail_rl.cli", "doctor", recipe, f"output_dir={output_dir}", *overrides)
    assert not output_dir.exists()
    assert "Traceback" not in result.stderr
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    verdicts = [(line[0], line[1].split(":")[0]) for line in lines if line[0] in ("ok", "problem", "skipped")]
    return result.returncode, verdicts, result.stdout


def test_a_recipe_that_can_be_trained(tmp_path):
    code, verdicts, told = doctor(tmp_path, *TINY)
    assert verdicts == [("ok", name) for name in NAMES], told
    assert code == 0
    assert "16 questions: accuracy 1.00 on right answers and 0.00 on the model's, format 1.00" in told
    assert "data.eval: 16 rows tried, 16 pictures, prompts of 31 to 31 tokens" in told


@pytest.mark.vllm
def test_with_vllm(start, tmp_path):
    """In bfloat16, and from a checkpoint of float32."""
    changes = ("rollout.engine=vllm_colocate", "trainer.mixed_precision=bf16", f"model={start}", *TINY[1:])
    code, verdicts, told = doctor(tmp_path, *changes)
    assert (code, verdicts) == (0, [("ok", name) for name in NAMES]), told
    assert "vllm 0." in told
    assert "parity with the engine: log-probabilities" in told


def test_an_sft_recipe(tmp_path):
    code, verdicts, told = doctor(tmp_path, recipe="recipes/quickstart_sft.yaml")
    assert (code, verdicts) == (0, [("ok", name) for name in NAMES[:9]]), told


def test_mistakes_in_the_recipe(tmp_path):
    code, verdicts, told = doctor(tmp_path, "rollout.top_pp=1")
    assert (code, verdicts) == (2, [("problem", "recipe")])
    assert "rollout.top_pp = 1: unknown key; did you mean top_p?" in told


def test_every_problem_has_its_line(tmp_path):
    """An answer that its own reward does not take, a bad row, missing files; what follows from a problem is skipped."""
    Image.new("RGB", (56, 56), "red").save(tmp_path / "good.png")
    rows = [{"question": "How many?", "answer": "3", "images": ["good.png"]}]
    rows.append({"question": "How many?", "answer": "3 </think>", "images": ["good.png"]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "bad.jsonl").write_text(json.dumps({"question": "How many?", "answer": "3", "images": ["none.png"]}))
    code, verdicts, told = doctor(tmp_path, *TINY, f"data.train={tmp_path / 'rows.jsonl'}", "data.eval=null")
    assert (code, verdicts[:-1], verdicts[-1]) == (2, [("ok", n) for n in NAMES[:-1]], ("problem", "rewards")), told
    assert "to the row's own answer '3 </think>' (id" in told
    code, verdicts, told = doctor(tmp_path, *TINY, f"data.train={tmp_path / 'bad.jsonl'}", "data.eval=null")
    assert code == 2
    assert {name: verdict for verdict, name in verdicts} == dict.fromkeys(NAMES, "ok") | {
        "data": "problem",
        "parity": "skipped",
        "rewards": "skipped",
    }, told
    code, verdicts, told = doctor(tmp_path, "model=./nowhere", f"data.train={tmp_path / 'none.jsonl'}")
    assert code == 2
    assert verdicts[4:7] == [("problem", "files"), ("ok", "memory"), ("problem", "model")]
    assert {verdict for verdict, _ in verdicts[7:]} == {"skipped"}
    assert "model.path = ./nowhere" in told


def test_packages_out_of_range(monkeypatch):
    required = {"model": {"random_init": "tiny"}, "data": {"train": "pictures"}, "rewards": [{"function": "accuracy"}]}
    recipe = GrpoRecipe.model_validate(required | {"output_dir": "x", "trainer": {"max_steps": 1}})
    assert check_packages(recipe).startswith("torch 2.")
    old = {"torch": "2.10.0", "pyarrow": None}
    own = machine_checks.installed
    monkeypatch.setattr(machine_checks, "installed", lambda name: old.get(name, own(name)))
    with pytest.raises(BadInput, match=r"pyarrow is missing, >=17 is needed; torch 2\.10\.0, <2\.14,>=2\.11 is needed"):
        check_packages(recipe)


def test_memory_of_the_gpus_that_are_here(monkeypatch):
    recipe = load_recipe(GrpoRecipe, "recipes/rlvr.yaml", ["model.path=somebody/SAIL-VL2-2B"])
    for gpus, told in (
        ("2xH100", r"66 of 79 GiB on each H100 with recipes/accelerate/ddp_8\.yaml"),
        ("H200", "GiB on each"),
    ):
        monkeypatch.setattr(machine_checks, "gpus_here", lambda gpus=gpus: parse_gpus(gpus))
        assert re.search(told, check_memory(recipe)), check_memory(recipe)
    monkeypatch.setattr(machine_checks, "gpus_here", lambda: parse_gpus("L4"))
    with pytest.raises(BadInput, match=r"on 1 L4 it does not fit.*update\.token_budget=8192: .*, fits"):
        check_memory(recipe)


def test_devices_reach_each_other_or_the_line_says_what_to_try():
    assert re.fullmatch(r"exchanged by 2 processes with gloo, \d+\.\d GB/s each", exchange_between("gloo", 2))
    if not torch.cuda.is_available():
        with pytest.raises(
            BadInput, match=r"2 processes cannot exchange tensors by nccl \(.*Error.*NCCL_P2P_DISABLE=1"
        ):
            exchange_between("nccl", 2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpus_reach_each_other():
    assert "GB/s" in exchange_between("nccl", torch.cuda.device_count())


def test_room(tmp_path):
    assert "are free" in room(2**20, tmp_path / "not" / "there")
    with pytest.raises(BadInput, match=r"output_dir = .* GiB are needed .* lower trainer\.save_total_limit"):
        room(2**60, tmp_path)
