"""Two processes on one CPU (gloo): real data parallelism, and the losses of one process."""

import json
import os

import pytest
from conftest import BIN, SMALL, SMALL_GRPO, command, forked, torchrun
from PIL import Image

pytestmark = pytest.mark.dist
ACCELERATE = (str(BIN / "accelerate"), "launch", "--num_processes", "2", "--main_process_port", "0")
FSDP2 = (*ACCELERATE, "--config_file", "recipes/accelerate/fsdp2.yaml")


def losses(run) -> list[tuple[float, float, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["loss"], r["grad_norm"], r["entropy"]) for r in records]


def assert_two_processes(run) -> None:
    environment = json.loads((run / "environment.json").read_text())
    assert environment["processes"] == 2
    assert environment["wrapper"] == "DistributedDataParallel"
    assert environment["threads_per_process"] == max(1, len(os.sched_getaffinity(0)) // 2)


WHOLE_STEP = ("grpo.mini_batches=2", "grpo.top_entropy_quantile=0.4", "grpo.entropy_coef=0.01")


@pytest.mark.parametrize(
    ("model", "budget", "changes"), [("start", 60, WHOLE_STEP), ("{random_init: tiny_qwen3_vl}", 300, ())]
)
def test_grpo_on_text_and_pictures_equals_one_process(model, budget, changes, start, mixed_rows, tmp_path):
    """With the smaller budget a group is too large for a row, and its prompt is computed apart. What is counted over
    the whole step, and which groups an optimizer step trains, is the same on two processes."""
    model = str(start) if model == "start" else model
    rewards = f"rewards=[{{function: '{mixed_rows / 'mine.py'}:spread'}}]"
    common = ["sail_rl/train_grpo.py", "recipes/quickstart.yaml", *SMALL_GRPO, f"model={model}", rewards]
    # In the order of the file, the second process has rows of text alone in every step.
    common += [
        f"data.train={mixed_rows / 'rows.jsonl'}",
        "data.shuffle=false",
        f"update.token_budget={budget}",
        *changes,
    ]
    one = command(*common, f"output_dir={tmp_path / 'one'}")
    two = command(*common, f"output_dir={tmp_path / 'two'}", launcher=torchrun(2))
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert_two_processes(tmp_path / "two")
    for ours, theirs in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
        assert ours[1] > 0


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("launcher", [torchrun(2), FSDP2], ids=["ddp", "fsdp2"])
def test_vllm_in_every_process_equals_one_process(launcher, start, mixed_rows, tmp_path):
    """Each process has an engine, for its own questions; the last batch of an evaluation leaves one without any."""
    common = ["sail_rl/train_grpo.py", "recipes/quickstart.yaml", *SMALL_GRPO, f"model={start}", "data.eval.rows=9"]
    common += ["rollout.engine=vllm_colocate", f"rewards=[{{function: '{mixed_rows / 'mine.py'}:spread'}}]"]
    common += ["trainer.eval_batch_size=4", f"data.train={mixed_rows / 'rows.jsonl'}", "data.shuffle=false"]
    one = command(*common, f"output_dir={tmp_path / 'one'}")
    two = command(*common, f"output_dir={tmp_path / 'two'}", launcher=launcher)
    assert one.returncode == 0, one.stderr[-5000:]
    assert two.returncode == 0, two.stderr[-5000:]
    assert json.loads((tmp_path / "two/environment.json").read_text())["processes"] == 2
    for ours, theirs in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        # A loss on the policy's own completions is a sum that is 0 but for rounding, of terms as large as 1.
        assert ours == pytest.approx(theirs, rel=1e-4, abs=3e-6)
        assert ours[1] > 0
    records = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert all(0 < record["parity/max"] < 1e-4 for record in records)
    predictions = [(tmp_path / name / "predictions_after.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert [json.loads(line)["completion"] for line in predictions[0]] == [
        json.loads(line)["completion"] for line in predictions[1]
    ]


def test_sft_through_accelerate_equals_one_process(start, mixed_rows, tmp_path):
    """With a mixture of two sources and kinds, in other shares on the other process and in the other step."""
    sources = [
        f"{{path: {mixed_rows / 'rows.jsonl'}, kind: {kind}, weight: {n}}}" for kind, n in (("cot", 3), ("direct", 2))
    ]
    common = ["sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", *SMALL, "sft.samples_per_step=4"]
    # The second step is without pictures; the tower moves on all the same, as on the process with a blank one.
    common += [
        "trainer.max_steps=4",
        "data.reasoning=terse",
        "data.thinking=by_kind",
        "data.eval=null",
        "sft.normalise_by=kinds",
        "sft.kind_weights.cot=2.0",
        "model.random_init=null",
        f"model.path={start}",
        f"data.train=[{', '.join(sources)}]",
    ]
    accelerate = (str(BIN / "accelerate"), "launch", "--config_file", "recipes/accelerate/cpu_2.yaml")
    one = command(*common, f"output_dir={tmp_path / 'one'}")
    two = command(*common, f"output_dir={tmp_path / 'two'}", launcher=accelerate)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert_two_processes(tmp_path / "two")
    for ours, theirs in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_two_passes_end_together_whatever_each_process_has(start, tmp_path):
    """pytest -m slow tests/test_distributed.py -k passes

    Seven rows, one of them bad, in steps of four: passes end within steps, and one process has text alone."""
    Image.new("RGB", (56, 56), "red").save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    rows = [{"question": f"What is {n} plus B?", "answer": "3", "reasoning": "A is 1. " * n} for n in range(1, 8)]
    rows[2]["images"], rows[4]["images"] = ["good.png"] * 3, ["torn.png"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ["sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", "data.eval=null", "data.reasoning=terse"]
    common += ["model.random_init=null", f"model.path={start}", f"data.train={tmp_path / 'rows.jsonl'}"]
    common += ["data.max_bad_rows=1", "sft.samples_per_step=4", "trainer.max_steps=0", "trainer.num_train_epochs=2"]
    common += ["update.token_budget=80"]
    one = command(*common, f"output_dir={tmp_path / 'one'}")
    two = command(*common, f"output_dir={tmp_path / 'two'}", launcher=torchrun(2))
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert_two_processes(tmp_path / "two")
    assert len(losses(tmp_path / "two")) == 4  # 14 rows in all
    for ours, theirs in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_rows_that_cannot_be_shared(start, tmp_path):
    overrides = (f"model={start}", f"output_dir={tmp_path / 'run'}", "rollout.prompts_per_step=3")
    result = command("sail_rl/train_grpo.py", "recipes/quickstart.yaml", *SMALL, *overrides, launcher=forked(2))
    assert result.returncode != 0
    assert "rollout.prompts_per_step = 3 cannot be shared by 2 processes" in result.stderr
