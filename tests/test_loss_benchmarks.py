"""The tables of benchmarks/losses.py and curriculum.py, from the files that runs leave: equal numbers of rollouts."""

import json

import pytest

from benchmarks import curriculum, losses


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
    assert (plain["rollouts_to_reach"], both["rollouts_to_reach"]) == (8 * 32, 8 * 48)
    assert (plain["half"], plain["whole"]) == (0.85, 0.95)
    assert (both["half"], both["whole"]) == (0.1, 0.85)
    assert plain["without_signal"] == pytest.approx(1 / 4)
