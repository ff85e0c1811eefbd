"""Mistakes of the user's: each ends with exit code 2, a message that names it, and no traceback."""

import json

import pytest
from conftest import SMALL, SMALL_GRPO, command
from PIL import Image

GOOD = {"question": "What is A plus B?", "answer": "3", "images": ["good.png"]}


def refused(result) -> str:
    """The message of a run that was refused."""
    assert result.returncode == 2, (result.returncode, result.stderr[-2000:])
    assert "Traceback" not in result.stderr
    return result.stderr


def grpo(start, folder, *overrides):
    common = (f"model={start}", f"output_dir={folder / 'run'}")
    return command("sail_rl/train_grpo.py", "recipes/quickstart.yaml", *SMALL_GRPO, *common, *overrides)


@pytest.fixture
def rows(tmp_path):
    """Writes rows.jsonl beside a good and a broken picture."""
    Image.new("RGB", (56, 56), "red").save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    (tmp_path / "noise.png").write_bytes(b"not a picture")

    def write(*rows: dict):
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        return f"data.train={tmp_path / 'rows.jsonl'}"

    return write


@pytest.mark.fault(
    fault="data: bad rows",
    injected="noise as picture, no answer, too many placeholders",
    expected="refused before the first step; all named",
)
def test_all_bad_rows_are_named_at_once(start, tmp_path, rows):
    bad = [
        GOOD | {"images": ["noise.png"]},
        {"question": "No answer?", "id": "q3"},
        GOOD | {"question": "<image> <image>"},
    ]
    message = refused(grpo(start, tmp_path, rows(GOOD, *bad)))
    assert "3 rows cannot be used" in message
    assert "row 2 (id -): an image cannot be read" in message
    assert "row 3 (id q3): no `answer`" in message
    assert "row 4 (id -): 1 images but 2 image placeholders" in message


@pytest.mark.fault(
    fault="data: bad rows within data.max_bad_rows",
    injected="a torn picture and a row without an answer",
    expected="set aside with id and reason; the run ends well",
)
def test_bad_rows_within_the_limit_are_set_aside(start, tmp_path, rows):
    # The torn picture has a good header: it is found only when it is decoded, in the middle of the run.
    data = rows(*[GOOD] * 6, GOOD | {"images": ["torn.png"], "id": "torn"}, {"question": "No answer?"})
    result = grpo(start, tmp_path, data, "data.max_bad_rows=2", "trainer.max_steps=4")
    assert result.returncode == 0, result.stderr
    quarantined = [json.loads(line) for line in (tmp_path / "run/quarantine.jsonl").read_text().splitlines()]
    assert {row["row"] for row in quarantined} == {7, 8}
    assert any(row["id"] == "torn" and "torn.png" in row["reason"] for row in quarantined)


@pytest.mark.fault(
    fault="data: a prompt over the limit",
    injected="400 words with 100 tokens allowed",
    expected="the row is named; nothing is cut off",
)
def test_a_prompt_over_the_limit(start, tmp_path, rows):
    message = refused(grpo(start, tmp_path, rows(GOOD | {"question": "long " * 400}), "data.max_prompt_length=100"))
    assert "row 1" in message
    assert "data.max_prompt_length = 100" in message


@pytest.mark.fault(
    fault="reward: broken",
    injected="1 / 0 in a user's file, real command",
    expected="exit code 2 before the first step, with file and line",
)
def test_a_reward_that_raises_at_once(start, tmp_path):
    (tmp_path / "mine.py").write_text("def broken(completions, **columns):\n    return 1 / 0\n")
    message = refused(grpo(start, tmp_path, f"rewards=[{{function: '{tmp_path / 'mine.py'}:broken'}}]"))
    assert "'broken'" in message
    assert "ZeroDivisionError" in message
    assert "mine.py, line 2" in message


@pytest.mark.fault(
    fault="reward: fails from step 2 on",
    injected="RuntimeError in a user's file, real command",
    expected="exit code 2; the finished step is saved",
)
def test_a_reward_that_fails_later_stops_the_run_and_keeps_its_steps(start, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def late(completions, trainer_state, **columns):\n"
        "    if trainer_state.global_step >= 2:\n        raise RuntimeError('out of luck')\n"
        "    return [float(len(text) % 5) for text in completions]\n"
    )
    message = refused(grpo(start, tmp_path, f"rewards=[{{function: '{tmp_path / 'mine.py'}:late'}}]"))
    assert "out of luck" in message
    assert "more than 5%" in message
    assert (tmp_path / "run/checkpoints/step_1/trainer_state.pt").is_file()


@pytest.mark.fault(
    fault="checkpoint: no model",
    injected="an empty folder as model.path",
    expected="exit code 2 with the reason",
)
def test_a_checkpoint_that_is_none(tmp_path):
    (tmp_path / "empty").mkdir()
    message = refused(grpo(tmp_path / "empty", tmp_path))
    assert "the checkpoint cannot be loaded" in message


def test_sft_needs_reasoning(tmp_path, rows):
    overrides = (*SMALL, rows(GOOD), "data.reasoning=terse", f"output_dir={tmp_path / 'run'}")
    result = command("sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", *overrides)
    assert "no `reasoning` to imitate" in refused(result)
