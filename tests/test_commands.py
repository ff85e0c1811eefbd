"""The documented commands, run for two steps as a user would run them."""

import json
from pathlib import Path

import pytest
from conftest import SMALL_GRPO, command

REWARD = """
def spread(completions, answer, images, finish_reason, trainer_state, **columns):
    assert len(answer) == len(images) == len(finish_reason) == len(completions)
    return [float(len(text) % 7) for text in completions]
"""


def grpo(*overrides: object):
    return command("sail_rl/train_grpo.py", "recipes/quickstart.yaml", *SMALL_GRPO, *overrides)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory) -> tuple[Path, list[str]]:
    """A two-step run with a reward of the user's, and the overrides that made it."""
    folder = tmp_path_factory.mktemp("grpo")
    (folder / "mine.py").write_text(REWARD)
    rewards = f"rewards=[{{function: accuracy}}, {{function: '{folder / 'mine.py'}:spread', weight: 0.5}}]"
    overrides = [f"model={start}", f"output_dir={folder / 'run'}", rewards, "trainer.log_with=[tensorboard]"]
    result = grpo(*overrides)
    assert result.returncode == 0, result.stderr
    assert "greedy validation accuracy on 8 unseen questions" in result.stdout
    return folder / "run", overrides


def test_run_folder_says_all(trained):
    run, _ = trained
    assert [record["step"] for record in records(run)] == [1, 2]
    expected = {"loss", "reward", "rewards/accuracy/mean", "rewards/spread/mean", "rewards/spread/std", "entropy"}
    expected |= {"clip_fraction", "grad_norm", "groups/dropped", "completion/length", "tokens_per_second"}
    expected |= {f"rewards/{name}/seconds_{mark}" for name in ("accuracy", "spread") for mark in ("p50", "p99", "max")}
    expected |= {"rewards/spread/count/scored", "rewards/spread/share/scored"}
    expected |= {"seconds/rollout", "seconds/reward", "seconds/update", "learning_rate"}
    assert expected <= records(run)[0].keys()
    summary = json.loads((run / "summary.json").read_text())
    assert {"accuracy_before", "accuracy_after", "steps", "seconds"} <= summary.keys()
    for name in (
        "config.yaml",
        "environment.json",
        "report.html",
        "predictions_before.jsonl",
        "final/config.json",
        "verdicts.jsonl",
    ):
        assert (run / name).is_file(), name
    prediction = json.loads((run / "predictions_after.jsonl").read_text().splitlines()[0])
    assert {"id", "question", "answer", "completion", "correct"} <= prediction.keys()
    transcript = [json.loads(line) for line in (run / "transcripts/step_000001.jsonl").read_text().splitlines()]
    assert all((run / image).is_file() for row in transcript for image in row["images"])
    assert list((run / "checkpoints/step_2").glob("*.safetensors"))
    assert list(run.rglob("events.out.tfevents*"))


def test_the_weights_have_moved_and_load_in_transformers(trained, start):
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import sail_rl.model  # noqa: F401

    before, after = (AutoModelForImageTextToText.from_pretrained(p).state_dict() for p in (start, trained[0] / "final"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoProcessor.from_pretrained(trained[0] / "final").chat_template


def test_a_finished_run_shows_its_result_and_a_longer_one_goes_on(trained):
    run, overrides = trained
    again = grpo(*overrides)
    assert again.returncode == 0
    assert "is finished" in again.stdout
    longer = grpo(*overrides, "trainer.max_steps=3")
    assert longer.returncode == 0, longer.stderr
    assert [record["step"] for record in records(run)] == [1, 2, 3]


def test_a_changed_recipe_is_refused(trained):
    _run, overrides = trained
    result = grpo(*overrides, "grpo.epsilon=0.1")
    assert result.returncode == 2
    assert "grpo.epsilon: it was 0.2, now 0.1" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_quickstart_without_its_start_says_what_to_run():
    result = command("sail_rl/train_grpo.py", "recipes/quickstart.yaml", "model=runs/quickstart-sft/elsewhere")
    assert result.returncode == 2
    assert "make quickstart" in result.stderr


@pytest.mark.slow
def test_sft_on_a_mixture_goes_on_in_the_middle(start, tmp_path):
    """Stopped after its first step, in the middle of a pass over each source, it does what it would have done."""
    common = (f"model={start}", "optim.lr_scheduler_type=constant", "trainer.save_every=1", "trainer.max_steps=3")
    common += ("data.eval=null", "data.train.0.rows=50", "data.train.1.rows=7", "sft.samples_per_step=10")

    def sft(name, *more):
        folder = f"output_dir={tmp_path / name}"
        return command("sail_rl/train_sft.py", "recipes/quickstart_think_fusion.yaml", *common, folder, *more)

    assert sft("whole").returncode == 0
    assert sft("halves", "trainer.max_steps=1").returncode == 0
    assert sft("halves").returncode == 0
    whole, halves = (
        [{k: v for k, v in r.items() if "second" not in k} for r in records(tmp_path / name)]
        for name in ("whole", "halves")
    )
    assert whole == halves
    assert [record["samples/cot"] for record in whole] == [1, 1, 1]
