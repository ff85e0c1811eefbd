"""What a step's rewards leave in the log."""

import pytest

from sail_rl.scoring import verdict_figures


def test_outcomes_are_counted_and_latencies_ranked():
    verdicts = [("correct", 0.001 * (i + 1)) for i in range(98)] + [("refused", 0.5), ("wrong", 2.0)]
    figures = verdict_figures("accuracy", verdicts)
    assert figures == {
        "rewards/accuracy/count/correct": 98,
        "rewards/accuracy/share/correct": 0.98,
        "rewards/accuracy/count/refused": 1,
        "rewards/accuracy/share/refused": 0.01,
        "rewards/accuracy/count/wrong": 1,
        "rewards/accuracy/share/wrong": 0.01,
        "rewards/accuracy/seconds_p50": pytest.approx(0.051),
        "rewards/accuracy/seconds_p99": 2.0,
        "rewards/accuracy/seconds_max": 2.0,
    }


def test_many_timeouts_are_said(capsys):
    verdict_figures("mine", [("timeout", 1.0)] + [("scored", 0.1)] * 100)
    assert capsys.readouterr().err == ""
    verdict_figures("mine", [("timeout", 1.0)] * 2 + [("scored", 0.1)] * 98)
    assert "reward 'mine' ran out of CPU time on more than 1% of a step" in capsys.readouterr().err
