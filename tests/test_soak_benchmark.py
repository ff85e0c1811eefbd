"""The soak's table: what was lost, doubled or leaked is found, also beside a last line that was cut off."""

import json

import pytest

from benchmarks.soak import Part, problems, read, row_of


def made(folder, steps, rss, accuracy=0.5):
    """A run of ten steps as it is left on the disk, with one sample of memory a step."""
    (folder / "run").mkdir(parents=True)
    records = [{"step": step, "completion/masked": 1, "rewards/shaky/count/timeout": 2} for step in steps]
    (folder / "run/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "run/summary.json").write_text(json.dumps({"accuracy_before": 0.1, "accuracy_after": accuracy}))
    samples = [{"what": "sample", "step": n, "rss": rss[n], "files": 9, "launch": 0} for n in range(11)]
    signal = {"what": "signal", "name": "SIGTERM", "code": 75, "step": 7, "saving": True, "launch": 0}
    (folder / "soak.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*samples, signal]) + '{"wh')
    part = Part(folder.name, folder, (), 10, 10, 0, 2, (1.0, 2.0))
    return row_of(part, read(folder / "soak.jsonl"))


def test_a_good_soak(tmp_path):
    rows = [made(tmp_path / name, range(1, 11), [5 << 20] * 11) for name in ("calm", "shaky")]
    assert problems(rows, 1000) == []
    assert {key: rows[1][key] for key in ("failed", "timeouts", "signals", "saving", "lost", "rss", "files")} == {
        "failed": 10,
        "timeouts": 20,
        "signals": "1 x SIGTERM 75",
        "saving": 1,
        "lost": 0,
        "rss": "5 -> 5",
        "files": "9 -> 9",
    }


@pytest.mark.parametrize(
    ("steps", "rss", "accuracy", "problem"),
    [
        ([1, 2, 4, 5, 6, 7, 8, 9, 10, 10], [1 << 20] * 11, 0.5, "shaky: 1 steps are lost, 1 doubled"),
        (range(1, 11), [(50 + n) << 20 for n in range(11)], 0.5, "shaky: rss has grown by 16%"),
        (range(1, 11), [1 << 20] * 11, 0.4, "the accuracies differ by more than two standard errors: 0.500 and 0.400"),
    ],
)
def test_what_goes_wrong_is_said(tmp_path, steps, rss, accuracy, problem):
    calm = made(tmp_path / "calm", range(1, 11), [1 << 20] * 11)
    assert problems([calm, made(tmp_path / "shaky", steps, rss, accuracy)], 1000) == [problem]
