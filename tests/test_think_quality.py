"""The three checks and the judging reward, asked of a scripted endpoint through the real client."""

import pytest
from judge_server import serve, verdict

from rewards import judging_by_judge_reward, judging_reward, think_quality_reward
from rewards.judge import Judge, JudgeSettings
from rewards.load import RewardError, load_reward
from rewards.mix import Mixing
from rewards.score import score

THINK = "<think>A 3, D 5. 3 + 5 = 8.</think>\n\\boxed{8}"
DIRECT = "<judge>One look tells.</judge><think>\n\n</think>\n\\boxed{8}"
CHECKS = ("is_logically_sound", "is_grounded", "is_consistent")


def text_of(body):
    return body["messages"][1]["content"][-1]["text"]


def criterion_of(body):
    return body["response_format"]["json_schema"]["schema"]["required"][1]


def judged(script, completions, reward=think_quality_reward, **columns):
    """What the reward says, and what the endpoint was asked."""
    with serve(script) as server:
        judge = Judge(JudgeSettings(server.url, "m", call_seconds=5, tries=1))
        columns = {"question": [f"What is A plus D, {n}?" for n in range(len(completions))]} | columns
        found = reward(completions=completions, judge=judge, **columns)
        return found, server.requests, judge.problems


@pytest.mark.parametrize(("passing", "value"), [((), 0), (CHECKS[:1], 1 / 3), (CHECKS[1:], 2 / 3), (CHECKS, 1)])
def test_the_share_of_the_checks(passing, value):
    found, requests, _ = judged(lambda body, number: verdict(criterion_of(body) in passing), [THINK])
    assert found.values == [pytest.approx(value)]
    assert found.checks == {name: [float(name in passing)] for name in CHECKS}
    assert sorted(map(criterion_of, requests)) == sorted(CHECKS)
    rubrics = {text_of(body).splitlines()[0] for body in requests}
    assert len(rubrics) == 3
    for body in requests:
        assert "A 3, D 5. 3 + 5 = 8." in text_of(body)
        # Logic and grounding are judged without the answer, consistency without question and picture.
        assert ("\\boxed{8}" in text_of(body)) == ("A plus D" not in text_of(body)) == (criterion_of(body) == CHECKS[2])


@pytest.mark.parametrize(
    ("completion", "columns", "value"),
    [
        ("\\boxed{8}", {}, 0.0),
        ("<think> \n</think>\\boxed{8}", {}, 0.0),
        ("<think>A 3, D 5.", {}, 0.0),
        ("<think>A 3.</think><think>D 5.</think>\\boxed{8}", {}, 0.0),
        (THINK, {"finish_reason": ["length"]}, 0.0),
        ("<think>" + "A 3. " * 10_000 + "</think>\\boxed{8}", {}, 0.0),
        (DIRECT, {}, 0.0),
        (DIRECT, {"score_judging": [0.0], "score_accuracy": [1.0]}, 0.0),
        (DIRECT, {"score_judging": [1.0], "score_accuracy": [0.0]}, 0.0),
        (DIRECT, {"score_judging": [1.0], "score_accuracy": [1.0]}, 1.0),
        (DIRECT, {"score_judging_by_judge": [1.0], "score_accuracy": [1.0]}, 1.0),
        (DIRECT, {"score_judging": [1.0]}, 1.0),
        ([{"role": "assistant", "content": DIRECT}], {"score_judging": [1.0]}, 1.0),
    ],
)
def test_what_the_judge_is_not_asked_about(completion, columns, value):
    found, requests, _ = judged(lambda body, number: verdict(True), [completion], **columns)
    assert (found.values, requests) == ([value], [])
    assert found.checks == {name: [None] for name in CHECKS}


def test_one_failed_check_is_no_verdict():
    fails = lambda body, number: (500, "") if criterion_of(body) == CHECKS[1] and ", 1?" in text_of(body) else verdict()  # noqa: E731
    found, _, problems = judged(fails, [THINK, THINK.replace("8", "9"), "\\boxed{8}"])
    assert found.values == [1.0, None, 0.0]
    assert found.checks["is_grounded"] == [1.0, None, None]
    assert found.checks["is_consistent"] == [1.0, 1.0, None]
    assert problems == ["1 of 6 questions have no verdict: status: 500: Error code: 500"]


@pytest.mark.parametrize(
    ("columns", "values"),
    [
        ({"needs_thinking": [True, True]}, [1.0, 0.0]),
        ({"needs_thinking": [False, False]}, [0.0, 1.0]),
        ({"needs_thinking": [None, None]}, [None, None]),
        ({"direct_pass_rate": [0.75, 0.75], "decided_by": "pass_rate"}, [0.0, 1.0]),
        ({"direct_pass_rate": [0.5, 0.5], "decided_by": "pass_rate"}, [1.0, 0.0]),
        ({"direct_pass_rate": [0.5, None], "decided_by": "pass_rate", "least_pass_rate": 0.5}, [0.0, None]),
    ],
)
def test_judging(columns, values):
    assert judging_reward(completions=[THINK, DIRECT], **columns) == values


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, "no column 'needs_thinking'"),
        ({"decided_by": "pass_rate", "needs_thinking": [True]}, "no column 'direct_pass_rate'"),
        ({"decided_by": "coin"}, "decided_by is 'coin'"),
    ],
)
def test_judging_without_a_source(columns, expected):
    with pytest.raises(ValueError, match=expected):
        judging_reward(completions=[THINK], **columns)


def test_judging_by_the_judge():
    script = lambda body, number: (503, "") if ", 2?" in text_of(body) else verdict(", 0?" in text_of(body))  # noqa: E731
    found, requests, _ = judged(script, [THINK, DIRECT, DIRECT], reward=judging_by_judge_reward)
    assert found.values == [1.0, 1.0, None]
    assert found.checks == {"requires_reasoning": [1.0, 0.0, None]}
    assert not any("3 + 5" in str(body) or "One look tells" in str(body) for body in requests)


def test_the_gated_product_with_real_rewards():
    """One group of four: right and sound, right and direct, wrong, malformed."""
    with serve(lambda body, number: verdict(criterion_of(body) != CHECKS[0])) as server:
        judge = Judge(JudgeSettings(server.url, "m"))
        names = ("think_quality", "judging", "accuracy", "format")
        keys = {"format": {"contract": "judge"}}
        rewards = [load_reward(name, name, 1.0, keys.get(name, {}), judge=judge) for name in names]
        think = f"<judge>It must be added.</judge>{THINK}"
        completions = [think, DIRECT, think.replace("{8}", "{9}"), THINK]
        columns = {"question": ["Q"] * 4, "answer": ["8"] * 4, "completions": completions, "images": [[]] * 4}
        scores = score(rewards, columns | {"needs_thinking": [True] * 4}, 4, Mixing("product"))
        assert scores.totals == pytest.approx([0.9 * 2 / 3 + 0.1, 0.1, 0.1, 0.9 * 2 / 3])
        assert len(server.requests) == 3  # of four completions one question set: two have the same text, two are 0
        easy = score(rewards, columns | {"needs_thinking": [False] * 4}, 4, Mixing("product"))
        assert easy.totals == pytest.approx([0.1, 1.0, 0.1, 0.0])
        assert len(server.requests) == 3


def test_a_reward_that_asks_needs_a_judge(tmp_path):
    with pytest.raises(RewardError, match="reward 'think_quality' asks a judge: name one in the section judge"):
        load_reward("think_quality", "think_quality", 1.0, {})
    (tmp_path / "mine.py").write_text("def mine(completions, judge=None, **columns):\n    return [0.0]\n")
    assert not load_reward(f"{tmp_path / 'mine.py'}:mine", "mine", 1.0, {}).asks_judge
