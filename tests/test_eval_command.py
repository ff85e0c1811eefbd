"""`sail-rl eval`: the real command on a tiny model, its greedy answers, its modes, and going on after an end."""

import gc
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from building import read, write_rows
from conftest import ROOT, command

from rollouts.hf import HFEngine
from sail_rl.checkpoint_accuracy import checkpoint_predictions, read_eval_recipe
from sail_rl.cli import make_parser
from sail_rl.command_line import BadInput
from sail_rl.eval_command import thought, with_rollouts

RECIPE = ROOT / "recipes/quickstart.yaml"
QUICK = ("data.eval.rows=6", "rollout.max_completion_length=12")
TINY = ("model.path=null", "model.random_init=tiny", *QUICK)


def evaluate(*arguments):
    parsed = make_parser().parse_args(["eval", *map(str, arguments)])
    parsed.run_command(parsed)


def test_greedy_answers_are_those_of_the_trainers_evaluation(start, tmp_path):
    evaluate(RECIPE, f"model={start}", *QUICK, "--output", tmp_path / "out")
    found = read(tmp_path / "out/predictions.jsonl")
    expected = checkpoint_predictions(read_eval_recipe(RECIPE, list(QUICK)), start)
    for key in ("id", "question", "answer", "completion", "correct", "well_formed", "length", "family"):
        assert [one[key] for one in found] == [one[key] for one in expected]
    assert all((tmp_path / "out" / name).is_file() for one in found for name in one["images"])
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["model"], summary["greedy"], summary["not_asked"]) == (str(start), True, 0)
    assert summary["all"]["pass@1"]["mean"] == sum(one["correct"] for one in expected) / 6
    assert summary["all"]["length"]["mean"] == pytest.approx(sum(one["length"] for one in expected) / 6)
    assert not (tmp_path / "out/predictions.run").exists()


def test_several_samples_of_questions_asked_in_both_modes(tmp_path, capsys):
    rows = [{"question": f"Question {n}?", "answer": str(n), "images": ["red.png"], "id": f"r{n}"} for n in range(3)]
    file = write_rows(tmp_path, [*rows, {"question": "No answer?"}])
    sources = f"data.eval=[{{path: {file}, kind: cot}}, {{path: {file}, kind: direct}}]"
    evaluate(RECIPE, *TINY[:2], TINY[3], sources, "data.thinking=by_kind", "--output", tmp_path / "out", "--samples", 4)
    found = read(tmp_path / "out/predictions.jsonl")
    assert [(one["id"], one["sample"]) for one in found] == [(f"r{n}", s) for n in (0, 1, 2) * 2 for s in range(4)]
    assert [one["mode"] for one in found] == ["think"] * 12 + ["direct"] * 12
    assert len({one["completion"] for one in found[:4]}) > 1
    assert found[0]["images"] == ["../red.png"]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["not_asked"], summary["all"]["samples"], summary["all"]["questions"]) == (2, 4, 6)
    assert {mode: one["questions"] for mode, one in summary["groups"]["mode"].items()} == {"think": 3, "direct": 3}
    assert {"pass@1", "pass@2", "pass@4", "avg@4"} <= set(summary["all"])
    assert "2 rows could not be asked" in (tmp_path / "out/summary.md").read_text()
    assert "| mode: think | 3 |" in capsys.readouterr().out


def test_an_interruption_costs_at_most_the_chunk_at_work(tmp_path, monkeypatch):
    small = (*TINY, "rollout.batch_size=2")
    evaluate(RECIPE, *small, "--output", tmp_path / "whole")
    generate, calls = HFEngine.generate, []

    def interrupted(self, prompts, *arguments, **more):
        calls.append([prompt.seed for prompt in prompts])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, prompts, *arguments, **more)

    monkeypatch.setattr(HFEngine, "generate", interrupted)
    with pytest.raises(SystemExit) as end:
        evaluate(RECIPE, *small, "--output", tmp_path / "out")
    assert end.value.code == 130
    assert not (tmp_path / "out/summary.json").exists()
    with pytest.raises(BadInput, match="other settings"):
        evaluate(RECIPE, *small, "seed=1", "--output", tmp_path / "out")
    gc.collect()  # lets go of the journal that was refused
    evaluate(RECIPE, *small, "--output", tmp_path / "out")
    assert calls == [[0, 1], [2, 3], [2, 3], [4, 5]]
    assert read(tmp_path / "out/predictions.jsonl") == read(tmp_path / "whole/predictions.jsonl")
    (tmp_path / "out/summary.json").unlink()  # as if it had ended just before
    evaluate(RECIPE, *small, "--output", tmp_path / "out")
    assert len(calls) == 4
    assert (tmp_path / "out/summary.json").read_text() == (tmp_path / "whole/summary.json").read_text()


@pytest.mark.slow
def test_killed_at_work_the_predictions_are_the_same(tmp_path):
    arguments = [str(RECIPE), *TINY, "data.eval.rows=60", "rollout.batch_size=4", "--samples", "2", "--output"]
    evaluate(*arguments, tmp_path / "whole")
    progress = tmp_path / "out/predictions.jsonl.progress"
    begin = [sys.executable, "-m", "sail_rl.cli", "eval", *arguments, str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(begin, cwd=tmp_path, env=environment) as worker:
        end = time.monotonic() + 300
        while not (progress.is_file() and progress.read_bytes().count(b"\n") > 2) and time.monotonic() < end:
            time.sleep(0.01)
        worker.kill()
    assert worker.returncode == -signal.SIGKILL
    assert 0 < progress.read_bytes().count(b"\n") - 1 < 60
    evaluate(*arguments, tmp_path / "out")
    assert read(tmp_path / "out/predictions.jsonl") == read(tmp_path / "whole/predictions.jsonl")


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_gives_the_same_greedy_answers(start, tmp_path):
    evaluate(RECIPE, f"model={start}", *QUICK, "--output", tmp_path / "hf")
    engine = ("rollout.engine=vllm_colocate", "--output", tmp_path / "vllm")
    result = command("-m", "sail_rl.cli", "eval", RECIPE, f"model={start}", *QUICK, *engine)
    assert result.returncode == 0, result.stderr
    ours, theirs = (read(tmp_path / name / "predictions.jsonl") for name in ("hf", "vllm"))
    assert [one["completion"] for one in theirs] == [one["completion"] for one in ours]


def test_a_recipe_for_sft_is_evaluated_too():
    overrides = ["sft.max_completion_length=9", "trainer.eval_batch_size=7", "model.random_init=tiny"]
    recipe = with_rollouts(read_eval_recipe(ROOT / "recipes/quickstart_sft.yaml", overrides))
    assert (recipe.rollout.engine, recipe.rollout.max_completion_length, recipe.rollout.batch_size) == ("hf", 9, 7)
    assert recipe.data.train_sources[0].rows is not None  # the questions of data.eval
    assert recipe.data.eval is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>I look.</think>\\boxed{5}", True),
        ("<think>I look, and", True),  # cut off
        ("<think>\n\n</think>\\boxed{5}", False),
        ("<judge>Easy.</judge><think> </think>\\boxed{5}", False),
        ("\\boxed{5}", False),
        ("<think>", False),
    ],
)
def test_who_has_thought(text, expected):
    assert thought(text) is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data.eval=null",), "data.eval names no questions"),
        (("data.eval=none.jsonl",), "data.eval.path = none.jsonl: there is no such file"),
        (("model=runs/none",), "model.path = runs/none: there is no checkpoint"),
        (("--samples", "0"), "--samples 0"),
        (("--limit", "0"), "--limit 0"),
    ],
)
def test_mistakes_are_named(tmp_path, arguments, message):
    with pytest.raises(BadInput, match=message):
        evaluate(RECIPE, "model=some/name", *arguments, "--output", tmp_path / "out")
