"""A run that hangs: it says where, and ends; one that goes on slowly is let alone."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from sail_rl import watchdog
from sail_rl.metrics import Stopwatch
from sail_rl.watchdog import STUCK, Pulse

HANGING = """
import time
from sail_rl.watchdog import Pulse, mark, watching
def waits_for_ever():
    time.sleep(300)
with watching(1.0, rank=3):
    Pulse.step = 7
    mark("the phase 'update' began")
    waits_for_ever()
"""


@pytest.mark.fault(
    fault="stuck: a phase that never ends",
    injected="a process that sleeps in the phase `update` of step 7",
    expected="it names process, step and phase, shows the stacks of all threads, and ends with code 70",
)
def test_a_hanging_run_says_where_and_ends():
    result = subprocess.run([sys.executable, "-c", HANGING], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == STUCK
    assert "process 3 is stuck in step 7" in result.stderr
    assert "since the phase 'update' began" in result.stderr
    assert "in waits_for_ever" in result.stderr


@pytest.mark.parametrize(("marks", "ends"), [(True, False), (False, True)], ids=["it goes on", "it hangs"])
@pytest.mark.fault(
    fault="stuck: not, but a long evaluation",
    injected="many times the limit, with a batch answered now and then",
    expected="it is let alone",
)
def test_only_idle_time_counts(marks, ends, monkeypatch):
    """Looks in the place of seconds."""
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if marks and len(looks) % 5 == 0:
            watchdog.mark("8 of 2000 questions were answered")
        Pulse.watched = len(looks) < 1000

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(watchdog.time, "sleep", sleep)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(watchdog, "report", lambda rank: None)
    monkeypatch.setattr(Pulse, "watched", True)
    watchdog.mark("the start")
    if ends:
        with pytest.raises(SystemExit, match=str(STUCK)):
            watchdog.look(100.0, rank=0)
        assert 100 <= sum(looks) <= 120
    else:
        watchdog.look(100.0, rank=0)
        assert sum(looks) == 10_000


def test_phases_are_signs_of_progress():
    Pulse.idle = 5.0
    with Stopwatch().phase("reward"):
        assert (Pulse.what, Pulse.idle) == ("the phase 'reward' began", 0.0)
    assert Pulse.what == "the phase 'reward' ended"
