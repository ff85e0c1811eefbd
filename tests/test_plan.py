"""The planner's formulas against what was measured, and what it tells its user."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT

from benchmarks import scaled_model
from sail_rl import cli
from sail_rl.batch import Group, make_batch
from sail_rl.command_line import BadInput
from sail_rl.config_data import ModelSection
from sail_rl.gpus import GPUS, named_in, parse_gpus
from sail_rl.machine_checks import GIB
from sail_rl.planning import memory
from sail_rl.planning.memory import SHARDINGS, Load, Settings, memory_of
from sail_rl.planning.sizes import sizes_of, sizes_of_config
from sail_rl.planning.speed import Update, update_seconds
from sail_rl.policy import Policy

REAL_2B = ModelSection(path="somebody/SAIL-VL2-2B")
TINY = ModelSection(path="tiny")
(H200,) = [gpu for gpu in GPUS if gpu.name == "H200"]
SMALL_SHARE = "rollout.vllm.gpu_memory_utilization=0.1"
TILES = {800: 3, 1344: 5, 3392: 13}  # of the prompts of benchmarks/update_2b.py, thumbnails included


def lengths_of(completion):
    """The benchmarks' groups."""
    return tuple(int(n) for n in np.linspace(0.4 * completion, completion, 8).astype(int))


def load_of(shape):
    """One micro-batch with a group."""
    total = sum(shape.lengths)
    return Load(shape.prompt + total, sum(shape.windows), shape.pictures, total, alone=True)


def measured(name, side):
    rows = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["rows"]
    return [row for row in rows if row.get("side") == side and row.get("liger") != "yes"]


@pytest.mark.parametrize(
    ("side", "recompute"), [("shared, varlen", True), ("shared, varlen, nothing recomputed", False)]
)
def test_an_h200_holds_and_takes_what_was_measured(side, recompute):
    """Six updates of SAIL-VL2-2B at its real sizes: memory within 5 %, time within 10 %."""
    sizes, rows = sizes_of(REAL_2B), measured("update_2b", side)
    assert len(rows) == 3
    for row in rows:
        shape = sizes.shape(row["prompt"], TILES[row["prompt"]], lengths_of(row["completion"]))
        told = memory_of(sizes, Settings("autocast", 4, 4, recompute), load_of(shape))
        assert told.static / GIB == pytest.approx(40.7, abs=0.1)
        assert told.update / GIB == pytest.approx(row["peak_gib"], rel=0.05)
        seconds = update_seconds(sizes, H200, Update([shape], 1, 1, 1, 0, recompute))
        assert seconds == pytest.approx(row["seconds"], rel=0.1)


def scaled_sizes():
    return sizes_of_config(scaled_model.scaled_config(scaled_model.scaled_processor()), "scaled", TINY)


def test_a_cpu_holds_what_was_measured():
    """The peaks of whole processes in benchmarks/results/update.md, above what they hold before the step."""
    sizes = scaled_sizes()
    rows = json.loads((ROOT / "benchmarks/results/update.json").read_text())["rows"]
    for row in rows:
        prompt, completion = row["prompt"], row["completion"]
        shape = sizes.shape(prompt, prompt // scaled_model.TOKENS_PER_TILE - 1, lengths_of(completion))
        told = memory_of(sizes, Settings("float32", 4, 4, recompute=False, device="cpu"), load_of(shape))
        above = told.activations + told.logits
        assert above / 2**20 == pytest.approx(row["memory_mb"]["shared"], rel=0.3), (prompt, completion, above / 2**20)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("prompt", "completion"), [(256, 32), (384, 64)])
def test_activations_are_those_that_torch_keeps(prompt, completion):
    """What autograd holds at the end of a forward pass here, each memory once, without weights and logits."""
    cell = scaled_model.Cell(prompt, completion)
    world = scaled_model.make_world(cell)
    batch = make_batch([Group(world.prompts[0], [rollout.token_ids for rollout in world.rollouts])], "shared")
    own = {weight.untyped_storage().data_ptr() for weight in world.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used twice

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape[-1] != scaled_model.VOCABULARY:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Policy(world.model.train())(batch)
    sizes = scaled_sizes()
    shape = sizes.shape(prompt, world.tiles, tuple(world.lengths))
    told = memory_of(sizes, Settings("float32", 4, 4, recompute=False, device="cpu"), load_of(shape))
    assert told.activations == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.25)


def test_what_processes_share_is_held_in_parts():
    sizes, settings = sizes_of(REAL_2B), Settings("autocast", 4, 4, recompute=True)
    load = Load(2048, 0, 0, 512)
    told = {one.name: memory_of(sizes, settings, load, one, processes=8) for one in SHARDINGS}
    alone = memory_of(sizes, settings, load)
    assert told["FSDP2"].static == pytest.approx(alone.static / 8)
    assert told["ZeRO-2"].weights == alone.weights
    assert told["ZeRO-2"].gradients == pytest.approx(alone.gradients / 8)
    assert told["ZeRO-2"].optimizer == pytest.approx(alone.optimizer / 8 * 1.5)  # and a copy of the weights
    assert told["ZeRO-3"].optimizer == pytest.approx(alone.optimizer / 8)
    assert told["ZeRO-3, offload"].optimizer == 0
    assert told["plain"].exchange - alone.exchange == pytest.approx(alone.gradients)
    assert told["plain"].update > alone.update > told["ZeRO-2"].update > told["FSDP2"].update


@pytest.mark.parametrize(("path", "billions"), [("x/SAIL-VL2-2B-Thinking", 2.73), ("x/SAIL-VL2-8B", 8.9)])
def test_released_models_need_no_files(path, billions):
    assert sizes_of(ModelSection(path=path)).weights / 1e9 == pytest.approx(billions, abs=0.02)


def test_frozen_parts_and_adapters():
    whole, frozen = (sizes_of(REAL_2B.model_copy(update={"freeze": freeze})) for freeze in ([], ["tower"]))
    assert whole.all_trained - frozen.all_trained == whole.parts["tower"]
    settings, load = Settings("autocast", 4, 4, recompute=False), Load(2048, 2048, 512, 512)
    assert memory.activations(frozen, settings, load) < memory.activations(whole, settings, load)
    lora = sizes_of(ModelSection(path=REAL_2B.path, lora={"r": 16}))
    # Seven linear layers in each of 28, with 16 x (inputs + outputs) weights.
    in_out = 2 * (2048 + 2048) + 2 * (2048 + 1024) + 3 * (2048 + 6144)
    assert lora.adapters == lora.all_trained == 28 * 16 * in_out
    assert lora.weights == whole.weights + lora.adapters


def test_gpus_by_name():
    names = [
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe",
        "NVIDIA H200",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100-SXM4-80GB",
    ]
    assert [gpu.name for gpu in map(named_in, names) if gpu] == ["H100", "H100 PCIe", "H200", "A100-40GB", "A100"]
    assert named_in("NVIDIA GeForce RTX 3060") is None
    assert parse_gpus("8xh100")[0] == 8
    assert parse_gpus("L40S") == (1, next(gpu for gpu in GPUS if gpu.name == "L40S"))
    assert parse_gpus("2xMI300X", memory_gib=192, tflops=1307)[1].memory_gib == 192
    for text, told in (("4xV100", "V100 is not in the table"), ("0xH100", "write it as 8xH100")):
        with pytest.raises(BadInput, match=told):
            parse_gpus(text)


def tell(capsys, monkeypatch, *arguments):
    """(exit code, output) of the command."""
    monkeypatch.setattr("sys.argv", ["sail-rl", "plan", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return end.code, "".join(capsys.readouterr())
    return 0, capsys.readouterr().out


def test_a_recipe_that_fits(capsys, monkeypatch):
    code, told = tell(capsys, monkeypatch, "recipes/rlvr.yaml", "--gpus", "8xH100")
    assert code == 0, told
    assert [line.split("  ")[0] for line in told.splitlines() if line.endswith("fits")] == [s.name for s in SHARDINGS]
    assert "25 steps take" in told
    assert "2.73 billion weights" in told


def test_a_recipe_that_does_not_fit_is_told_what_helps(capsys, monkeypatch):
    """Each advice on top of those before, up to the first that fits."""
    changes = ("trainer.gradient_checkpointing=false", "rollout.engine=vllm_colocate")
    code, told = tell(capsys, monkeypatch, "recipes/rlvr.yaml", *changes, "--gpus", "L40S")
    assert code == 1, told
    lines = told.split("it does not fit.")[1].splitlines()[1:]
    assert lines[0].strip().startswith("trainer.gradient_checkpointing=true")
    assert lines[1].strip().startswith("update.token_budget=8192")
    assert lines[-1].endswith("fits")
    assert sum(line.endswith("fits") for line in lines) == 1
    code, told = tell(capsys, monkeypatch, "recipes/sft_longcot.yaml", "--gpus", "4xL4")
    assert code == 1
    assert "recipes/accelerate/fsdp2.yaml" in told
    assert "samples/s" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("recipes/rlvr_qwen3_vl.yaml", "--gpus", "H100"), "hf download Qwen/Qwen3-VL-2B-Instruct config.json"),
        (("recipes/rlvr.yaml", "--gpus", "8xTPU"), "TPU is not in the table"),
        (("recipes/rlvr.yaml", "--gpus", "H100", "--prompt", "9"), "its 5 tiles alone have 1280 tokens"),
        (
            ("recipes/rlvr.yaml", "rollout.engine=vllm_colocate", SMALL_SHARE, "--gpus", "L4"),
            "rollout.vllm.gpu_memory_utilization = 0.1: of 22.5 GiB the engine's weights alone take 5.1",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_planned(arguments, told, capsys, monkeypatch):
    code, output = tell(capsys, monkeypatch, *arguments)
    assert code == 2
    assert told in output
