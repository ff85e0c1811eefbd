"""Rewards under attack: answers that are code, workers that are killed, clocks that jump; and what never changes."""

import random
import signal
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from linear_time import takes_linear_time
from test_pool import JOBS, SECONDS

from rewards import algebra_pool
from rewards.accuracy import accuracy_verdicts
from rewards.format import format_reward
from rewards.load import Reward, load_reward
from rewards.pool import Pool
from rewards.score import score
from rewards.verdict import Outcome
from rewards.worker import Job
from sail_rl.checkpoint import Progress
from sail_rl.command_line import BadInput
from sail_rl.scoring import Outcome as Scored
from sail_rl.scoring import count_failures


@pytest.fixture
def workers():
    """Two processes for algebra, ended with the test, and no remembered replies."""
    algebra_pool.use_workers(2)
    algebra_pool._REPLIES.clear()
    yield
    algebra_pool.close()


def attacks(marker):
    """Contents of boxes that would make the marker where they are evaluated."""
    touch = f"__import__('os').system('touch {marker}')"
    return [
        touch,
        f'eval("{touch}")',
        f'exec("{touch}")',
        f"open('{marker}', 'w').close()",
        f"(lambda: {touch})()",
        f"().__class__.__base__.__subclasses__()[0].__init__.__globals__['os'].system('touch {marker}')",
        f"x.subs(x, {touch})",
        rf"\text{{{touch}}}",
        rf"\operatorname{{eval}}({touch})",
        f"Symbol('x', **{{'a': {touch}}})",
        f"cos\nsystem\n(S'touch {marker}'\ntR.",
        f"!!python/object/apply:os.system ['touch {marker}']",
        rf"\write18{{touch {marker}}}",
        rf"\input{{|touch {marker}}}",
        f"$(touch {marker})",
        f"`touch {marker}`",
        f"5; touch {marker}",
    ]


@pytest.mark.fault(
    fault="reward: answers that are code",
    injected="import, eval, dunder, lambda, pickle, YAML, TeX and shell in the box",
    expected="wrong; nothing is run",
)
@pytest.mark.parametrize("gold", ["x^2+1", "5", "B", "yes", r"\{1, 2\}"])
def test_answers_that_are_code(workers, tmp_path, gold):
    marker = tmp_path / "marker"
    found = accuracy_verdicts([rf"\boxed{{{box}}}" for box in attacks(marker)], answer=[gold] * len(attacks(marker)))
    assert [verdict.value for verdict in found] == [0.0] * len(found)
    assert not marker.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(
    fault="reward: workers killed at random",
    injected="SIGKILL to two workers while 60 answers are compared",
    expected="each verdict as without, or infra_error; none lost, none of another row; warnings",
)
def test_workers_killed_at_random(workers, capfd):
    rows = [(rf"\boxed{{(x+{n})^2}}", f"x^2+{2 * n}x+{n * n + n % 2}") for n in range(60)]
    completions, golds, right = (
        [text for text, _ in rows],
        [gold for _, gold in rows],
        [float(n % 2 == 0) for n in range(60)],
    )
    accuracy_verdicts(completions[:2], answer=golds[:2])  # the workers are there

    def kill():
        for _ in range(2):
            time.sleep(0.1)
            for worker in list(algebra_pool._POOLS[0]._processes)[:1]:
                worker.process.send_signal(signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    found = accuracy_verdicts(completions, answer=golds)
    thread.join()
    assert [n for n, one in enumerate(found) if one.value != right[n] and one.outcome != Outcome.INFRA_ERROR] == []
    assert "its job is done once more" in capfd.readouterr().err
    assert [one.value for one in accuracy_verdicts(completions, answer=golds)] == right


@pytest.mark.fault(
    fault="reward: fails on too many",
    injected="1 and 11 of the first 16 completions, 10 and 11 of 200",
    expected="a failure or two among few do not stop a run; more than 5 % do",
)
@pytest.mark.parametrize(("failed", "of", "stops"), [(1, 16, False), (11, 16, True), (10, 200, False), (11, 200, True)])
def test_how_often_a_reward_may_fail(failed, of, stops):
    outcomes = [
        Scored(3, False, None if n < failed else 1.0, {"mine": None}, {"mine": n < failed}, {}) for n in range(of)
    ]
    run, rewards = SimpleNamespace(recipe=None), [Reward("mine", len)]
    with pytest.raises(BadInput, match=f"failed on {failed} of {of}") if stops else nullcontext():
        assert count_failures(run, rewards, Progress(), outcomes, [])["reward_failures"] == {"mine": failed}


@pytest.mark.fault(
    fault="clock: jumps by years",
    injected="time.time that goes back and forth while jobs run",
    expected="limits of time are kept by another clock",
)
def test_a_clock_that_jumps(tmp_path, monkeypatch):
    (tmp_path / "pool_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    years = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: float(1e9 * (next(years) % 2)))
    pool = Pool("pool_jobs:act", 1, 1 << 29)
    began = time.monotonic()
    good, slept, after = pool.run(
        [Job((what,), 5.0, wall) for what, wall in (("a", 60.0), ("sleep", 0.5), ("b", 60.0))]
    )
    pool.close()
    assert (good.problem, slept.problem, after.problem) == (None, Outcome.INFRA_ERROR, None)
    assert time.monotonic() - began < SECONDS


# What never changes


THOUGHT = "<think>The card shows 2 and 3, which add up to 5.</think>"
ROWS = [
    {
        "completions": THOUGHT + rf"\boxed{{{box}}}",
        "answer": gold,
        "completion_ids": [0] * (7 + n),
        "needs_thinking": n % 2 == 0,
    }
    for n, (gold, box) in enumerate(
        [
            ("5", "5"),
            ("5", "6"),
            ("x^2-1", "(x-1)(x+1)"),
            ("B", "b"),
            ("B", "C"),
            (r"\sqrt{12}", r"2\sqrt{3}"),
            ("5", ""),
        ]
        * 2
    )
]


def values(rewards, rows):
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return score(rewards, columns, 1).parts


@pytest.mark.fault(
    fault="property: order and repetition",
    injected="rows in other orders, twice, in parts, for every rule",
    expected="the same value for the same row",
)
def test_a_rows_value_does_not_depend_on_the_others(workers):
    names = {"accuracy": {}, "format": {}, "conciseness": {"shape": "cosine", "max_length": 60}, "judging": {}}
    rewards = [load_reward(name, name, 1.0, keys) for name, keys in names.items()]
    expected, order = values(rewards, ROWS), list(range(len(ROWS)))
    random.Random(0).shuffle(order)
    algebra_pool._REPLIES.clear()
    found = values(rewards, [ROWS[n] for n in order])
    assert found == {name: [column[n] for n in order] for name, column in expected.items()}
    assert values(rewards, ROWS) == expected
    parts = [values(rewards, ROWS[start : start + 5]) for start in range(0, len(ROWS), 5)]
    assert {name: [value for part in parts for value in part[name]] for name in expected} == expected


PIECES = ["<think>", "</think>", "<judge>", "</judge>", r"\boxed{", "{", "}", "\\", " ", "\n", "a", "5", "\0", "é"]


@pytest.mark.fault(
    fault="property: time",
    injected="10,000 random texts for the format reward, and the same eight times as long",
    expected="a verdict each; time grows with the length",
)
def test_format_of_random_texts_takes_linear_time():
    chance = random.Random(0)
    texts = ["".join(chance.choices(PIECES, k=20)) for _ in range(10_000)]

    def work(times):
        assert set(format_reward([text * times for text in texts])) <= {0.0, 1.0}

    assert takes_linear_time(work)
