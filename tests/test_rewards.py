"""Rewards of a recipe: found or refused with a reason, called as TRL calls them, failures told apart from zeros."""

import asyncio
import re
import time

import numpy as np
import pytest

from rewards import accuracy_reward, accuracy_verdicts
from rewards.load import Reward, RewardError, load_reward
from rewards.score import score, try_rewards

NAN = float("nan")

USER_FILE = """
from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Settings:
    factor: float = 2.0


def length_reward(completions, scale=1.0, **columns):
    return [Settings().factor * scale * len(text) for text in completions]


def _hidden(completions, **columns):
    return []


NUMBER = 3
"""


def column_reward(column, weight=1.0):
    """A reward whose values stand in a column of the data."""
    return Reward(column, lambda completions, **columns: columns[column], weight)


def score_of(function, completions=("a", "b", "c", "d"), group_size=2, **columns):
    """Score with one reward."""
    return score([Reward("mine", function)], {"completions": list(completions), **columns}, group_size)


# Loading


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A working folder with a user's reward file and two that cannot be imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(USER_FILE)
    (tmp_path / "broken.py").write_text("\nimport no_such_module\n")
    (tmp_path / "syntax.py").write_text("def reward(:\n")
    (tmp_path / "notes.txt").write_text("")


def test_a_built_in_is_found_by_name():
    reward = load_reward("accuracy", "accuracy", 0.9, {})
    assert (reward.name, reward.function, reward.weight) == ("accuracy", accuracy_verdicts, 0.9)


@pytest.mark.usefixtures("in_folder")
def test_a_users_function_is_found_and_gets_its_own_keys():
    reward = load_reward("mine.py:length_reward", "length_reward", 1.0, {"scale": 3.0})
    assert score([reward], {"completions": ["a", "bb"]}, 2).totals == [6.0, 12.0]


@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        ("acuracy", {}, "no such built-in; did you mean accuracy? built in are accuracy, format"),
        ("zzz", {}, "no such built-in; built in are accuracy, format"),
        ("none.py:reward", {}, "there is no file /"),
        ("notes.txt:reward", {}, "notes.txt is not a Python file"),
        ("mine.py:lenght_reward", {}, "mine.py has no function 'lenght_reward'; it has: length_reward"),
        ("mine.py:NUMBER", {}, "mine.py has no function 'NUMBER'"),
        ("mine.py:", {}, "mine.py has no function ''"),
        ("broken.py:reward", {}, "broken.py fails to import: ModuleNotFoundError: No module named 'no_such_module'"),
        ("broken.py:reward", {}, "(broken.py, line 2)"),
        ("syntax.py:reward", {}, "syntax.py fails to import: SyntaxError"),
        ("accuracy", {"wieght": 0.5}, "unknown key 'wieght'; did you mean weight?"),
        ("mine.py:length_reward", {"scael": 2}, "unknown key 'scael'; did you mean scale?"),
        ("mine.py:length_reward", {"zzz": 2}, "unknown key 'zzz' (the function's own: completions, scale, columns)"),
    ],
)
def test_a_reward_that_cannot_be_used_says_why(function, arguments, expected):
    with pytest.raises(RewardError, match=re.escape(expected)) as caught:
        load_reward(function, "reward", 1.0, arguments)
    assert str(caught.value).startswith(f"reward {function!r}: ")


# Scoring


@pytest.mark.parametrize(
    ("first", "second", "totals"),
    [
        ([1, 0, 0, 1], [1.0, 1.0, 0.0, 0.0], [1.1, 0.2, 0.0, 0.9]),
        ([None] * 4, [1, 0, 0, 1], [0.2, 0.0, 0.0, 0.2]),
        ([None, None, 1, 0], [1, 0, 1, 0], [0.2, 0.0, 1.1, 0.0]),
        ([None, 1, 1, 0], [1, 0, 1, 0], [None, 0.9, 1.1, 0.0]),
        ([None, 1, None, None], [1, None, 0, 1], [None, None, 0.0, 0.2]),
        ([None] * 4, [None] * 4, [None] * 4),
        ([True, np.float32(1), np.int64(0), 0.5], [0, 0, 0, 0], [0.9, 0.9, 0.0, 0.45]),
    ],
)
def test_weighted_sums_and_what_none_means(first, second, totals):
    # Groups of two: None for a whole group leaves the term out, None for a member masks the member.
    rewards = [column_reward("first", weight=0.9), column_reward("second", weight=0.2)]
    scores = score(rewards, {"completions": ["x"] * 4, "first": first, "second": second}, group_size=2)
    assert [total is None for total in scores.totals] == [total is None for total in totals]
    known = [(a, b) for a, b in zip(scores.totals, totals, strict=True) if b is not None]
    assert [a for a, _ in known] == pytest.approx([b for _, b in known])
    assert scores.parts == {"first": first, "second": second}
    assert scores.failed == {"first": [False] * 4, "second": [False] * 4}
    assert scores.errors == []


@pytest.mark.fault(
    fault="reward: raises on one completion",
    injected="ZeroDivisionError",
    expected="that completion is masked and counted; error with file and line",
)
def test_a_failure_masks_its_completion_alone_and_is_counted():
    def picky(completions, answer, trainer_state, **columns):
        assert trainer_state == "whole"  # no column, so it is not cut into parts
        return [1.0 / int(text != right) for text, right in zip(completions, answer, strict=True)]

    columns = {"completions": list("abcdef"), "answer": list("xxcxxx"), "trainer_state": "whole"}
    scores = score(
        [Reward("picky", picky), Reward("one", lambda completions, **c: [1.0] * len(completions))], columns, 2
    )
    assert scores.totals == [2.0, 2.0, None, 2.0, 2.0, 2.0]
    assert scores.parts == {"picky": [1.0, 1.0, None, 1.0, 1.0, 1.0], "one": [1.0] * 6}
    assert scores.failed == {"picky": [False, False, True, False, False, False], "one": [False] * 6}
    (error,) = scores.errors
    assert re.fullmatch(
        r"reward 'picky': ZeroDivisionError: float division by zero \(test_rewards\.py, line \d+\)", error
    )


@pytest.mark.fault(
    fault="reward: always raises",
    injected="RuntimeError",
    expected="all masked and counted",
)
def test_a_reward_that_always_fails_masks_everything_even_where_others_apply():
    def failing(completions, **columns):
        raise RuntimeError("no judge")

    scores = score([Reward("failing", failing), column_reward("fine")], {"completions": ["x"] * 4, "fine": [1] * 4}, 2)
    assert scores.totals == [None] * 4
    assert scores.failed["failing"] == [True] * 4
    assert "RuntimeError: no judge" in scores.errors[0]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([1.0], "returned 1 values for 4 completions"),
        ([1.0] * 5, "returned 5 values for 4 completions"),
        (None, "must return a list of 4 numbers, not NoneType"),
        (1.0, "must return a list of 4 numbers, not float"),
        (np.ones(4), "must return a list of 4 numbers, not ndarray"),
        (["1"] * 4, "value 0 is '1'; a reward is a number or None"),
        ([1.0, [1.0], 1.0, 1.0], "value 1 is [1.0]; a reward is a number or None"),
        ([1.0, 1.0, NAN, 1.0], "value 2 is nan; a reward is a finite number or None"),
        ([1.0, 1.0, 1.0, -float("inf")], "value 3 is -inf; a reward is a finite number or None"),
    ],
)
@pytest.mark.fault(
    fault="reward: returns nonsense",
    injected="too few, too many, None, text, NaN, infinity",
    expected="masked; refused before the first step",
)
def test_what_is_not_a_list_of_numbers_fails(returned, expected):
    def reward(completions, **columns):
        return returned

    scores = score_of(reward)
    assert expected in scores.errors[0]
    assert scores.totals == [None] * 4
    with pytest.raises(RewardError, match=re.escape(f"reward 'mine' fails on a sample of the data: {expected}")):
        try_rewards([Reward("mine", reward)], {"completions": ["x"] * 4})


@pytest.mark.fault(
    fault="reward: NaN",
    injected="NaN for one completion",
    expected="that completion is masked",
)
def test_nan_masks_the_completion_that_has_it():
    scores = score_of(lambda completions, value, **columns: value, value=[1.0, NAN, 0.0, 1.0])
    assert scores.totals == [1.0, None, 0.0, 1.0]


@pytest.mark.fault(
    fault="reward: slow, then raises",
    injected="400 completions, each call slow",
    expected="tried again for a bounded time",
)
def test_a_reward_that_hangs_before_it_fails_is_not_tried_for_every_completion(monkeypatch):
    monkeypatch.setattr("rewards.score.RETRY_SECONDS", 0.05)
    calls = []

    def slow(completions, **columns):
        calls.append(len(completions))
        time.sleep(0.02)
        raise TimeoutError("no answer")

    assert score_of(slow, ["x"] * 400).totals == [None] * 400
    assert len(calls) < 20


def test_async_rewards():
    async def slow(completions, **columns):
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    assert score_of(slow, ["a", "bb"]).totals == [1.0, 2.0]


@pytest.mark.parametrize("form", ["messages", "strings"])
def test_a_reward_in_trls_form(form):
    def trl_reward(completions: list[list[dict[str, str]]], solution: list[str], **kwargs) -> list[float | None]:
        contents = [completion[0]["content"] for completion in completions] if form == "messages" else completions
        return [None if right == "?" else float(text == right) for text, right in zip(contents, solution, strict=True)]

    texts, solution = ["1", "2", "3", "4"], ["1", "0", "?", "?"]
    completions = [[{"role": "assistant", "content": text}] for text in texts] if form == "messages" else texts
    scores = score_of(trl_reward, completions, prompts=["q"] * 4, completion_ids=[[1]] * 4, solution=solution)
    assert scores.totals == [1.0, 0.0, None, None]
    assert scores.errors == []


@pytest.mark.fault(
    fault="reward: broken",
    injected="a missing column, a KeyError",
    expected="refused before the first step, with name and line",
)
def test_trying_names_the_reward_the_error_and_its_line():
    def missing_column(completions, answers, **columns):
        return [0.0] * len(completions)

    def crashing(completions, **columns):
        return {}["key"]

    columns = {"completions": ["x"], "answer": ["x"]}
    try_rewards([Reward("accuracy", accuracy_reward)], columns)
    with pytest.raises(RewardError, match=r"reward 'a' fails on a sample of the data: TypeError: .*'answers'"):
        try_rewards([Reward("accuracy", accuracy_reward), Reward("a", missing_column)], columns)
    with pytest.raises(RewardError, match=r"reward 'b' fails .*: KeyError: 'key' \(test_rewards\.py, line \d+\)"):
        try_rewards([Reward("b", crashing)], columns)
