"""The benchmark of the rewards: its labels are true, it is launched by path, and every cell is in the result."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT

from benchmarks.answer_mix import GROUP, KINDS, cases
from rewards import accuracy_reward


def test_labels_of_the_mix_are_true_and_kinds_have_their_shares():
    made = cases(questions=400, seed=3)
    scores = accuracy_reward([case.completion for case in made], answer=[case.gold for case in made])
    assert [case for case, score in zip(made, scores, strict=True) if score != float(case.right)] == []
    counts = Counter(case.kind for case in made)
    for kind, share in KINDS:
        assert abs(counts[kind.__name__] / len(made) - share) < 0.08
    assert len(made) == 400 * GROUP
    assert 0.45 < sum(case.right for case in made) / len(made) < 0.55
    assert cases(10, seed=1) == cases(10, seed=1) != cases(10, seed=2)


def test_the_whole_command(tmp_path):
    arguments = [sys.executable, "benchmarks/rewards.py", "--short", "--json", str(tmp_path / "rewards.json")]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "rewards.json").read_text())
    assert 0 < written["slowest"]["seconds"] < 60  # 0.6 on a busy machine
    assert 0 < written["heartbeat"]["gap"] < 10  # 0.4 on a busy machine; a tower in a thread would stop it for good
    assert (written["heartbeat"]["completions"], written["heartbeat"]["earned"]) == (512, 0)
    rows = {row["side"]: row for row in written["rows"]}
    assert rows.keys() == {"ours", "trl", "verl"}
    for other in ("trl", "verl"):
        # How large it is, the benchmark shows: one short round on a busy machine may find anything.
        speeds = rows["ours"]["per_second"] / rows[other]["per_second"]
        assert rows[other]["ratio"] == pytest.approx(speeds, rel=0.01)
        assert rows["ours"]["right_on_mix"] > rows[other]["right_on_mix"] > 0.8
        assert rows["ours"]["right_on_pairs"] > rows[other]["right_on_pairs"] > 0.7
    assert "| trl |" in (tmp_path / "rewards.md").read_text()
