"""The tables of benchmarks/losses.py, curriculum.py and when_to_think.py, from the files that runs leave."""

import json

import pytest

from benchmarks import curriculum, losses, when_to_think
from sail_rl.data.pictures import picture_row


def write_run(folder, groups):
    """A run of four steps of so many groups, evaluated after the second and the last."""
    folder.mkdir(parents=True)
    common = {"groups/dropped": 4, "clip_fraction": 0.25}
    records = [{"step": step + 1, "groups/total": count} | common for step, count in enumerate(groups)]
    records[1]["eval/accuracy"] = 0.85
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    ended = {"accuracy_before": 0.1, "accuracy_after": 0.95, "seconds_this_stage": 10.0}
    (folder / "summary.json").write_text(json.dumps(ended))


@pytest.mark.parametrize(
    ("groups", "accuracies"), [((16,) * 4, [0.1, 0.85, 0.95]), ((32, 16, 32, 16), [0.1, 0.1, 0.85])]
)
def test_accuracy_at_shares_of_the_rollouts(tmp_path, monkeypatch, groups, accuracies):
    """A run that samples more in a step is read at an earlier one."""
    monkeypatch.setattr(losses, "SHORT_RESULTS", tmp_path)
    monkeypatch.setattr(losses, "POINTS", (128, 256, 512))
    write_run(losses.folder_of("dapo", 1, short=False), groups)
    (row,) = losses.finished_rows(short=False)
    assert (row["run"], row["seed"]) == ("dapo", 1)
    assert list(row["accuracy"].values()) == accuracies
    assert f"{accuracies[-1]:.3f}" in losses.table([row])


def test_rollouts_that_an_accuracy_took(tmp_path, monkeypatch):
    monkeypatch.setattr(curriculum, "SHORT_RESULTS", tmp_path)
    write_run(curriculum.folder_of("in turn", 0, short=False), (16,) * 4)
    write_run(curriculum.folder_of("both", 0, short=False), (32, 16, 32, 16))
    plain, both = curriculum.summary(curriculum.finished_rows(short=False))
    assert (plain["rollouts_to_reach"], both["rollouts_to_reach"]) == (8 * 64, 8 * 96)
    assert (plain["half"], plain["whole"]) == (0.85, 0.95)
    assert (both["half"], both["whole"]) == (0.1, 0.85)
    assert plain["without_signal"] == pytest.approx(1 / 4)


def test_the_teacher_of_judgement_is_wrong_in_a_third(tmp_path):
    """Of the rows; each has the form of answer that its judgement asks for."""
    file = when_to_think.teacher_rows(tmp_path, seed=3, count=90)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    truths = [
        picture_row("train", n, seed=3, families=["cards"], levels=[1], forms=["number", "sum"]) for n in range(90)
    ]
    wrong = [row["needs_thinking"] != truth["needs_thinking"] for row, truth in zip(rows, truths, strict=True)]
    assert 18 <= sum(wrong) <= 42
    assert len({(row["needs_thinking"], row["judgement"]) for row in rows}) == 2
    assert [row["answer"] for row in rows] == [truth["answer"] for truth in truths]
    assert all((file.parent / row["images"][0]).is_file() for row in rows)


def test_thought_is_counted_by_what_the_question_needs(tmp_path):
    """Shares in percent, the mean of tokens."""
    told = [(True, True, True, 30), (True, False, False, 8), (False, False, True, 6), (False, False, True, 8)]
    keys = ("needs_thinking", "thought", "correct", "length")
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(dict(zip(keys, one, strict=True))) + "\n" for one in told))
    assert when_to_think.figures(file) == {
        "accuracy": 75,
        "thinks_hard": 50,
        "thinks_easy": 0,
        "right_hard": 50,
        "right_easy": 100,
        "tokens": 13,
    }
