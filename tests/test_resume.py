"""A run that is killed and started again is the run that was not: the cheap rows of the benchmark."""

import json

import pytest
from conftest import command

from benchmarks.resume import PARTS, SHORT


@pytest.mark.fault(
    fault="checkpoint: the trainer is killed and started again",
    injected="SIGKILL after some steps, real commands: SFT, and GRPO with four updates a batch",
    expected="figures, tokens, rewards and weights of a run that was not killed, bit by bit, each step once",
)
def test_killed_and_resumed_equals_an_uninterrupted_run(tmp_path):
    """SFT, and GRPO with four updates a batch: figures, tokens, rewards and weights, each step once."""
    result = command("benchmarks/resume.py", "--short", "--output", tmp_path / "resume.json")
    assert result.returncode == 0, result.stderr[-4000:]
    rows = json.loads((tmp_path / "resume.json").read_text())["rows"]
    assert rows.keys() == {row.name for row in SHORT}
    for row in rows.values():
        assert all(row[part] for part in (*PARTS, "once")), row["note"]
