"""From rewards to one number: sum and product by hand, what None means, and that a judge is not asked in vain."""

import re
from types import SimpleNamespace

import pytest

from rewards.judge import Judge, Judgement, JudgeSettings
from rewards.load import Reward, RewardError
from rewards.mix import Mixing, check_mix
from rewards.score import score
from sail_rl.checkpoint import Progress
from sail_rl.command_line import BadInput, load_recipe, recipe_text
from sail_rl.config import GrpoRecipe
from sail_rl.scoring import Outcome, count_failures, load_rewards

NOWHERE = Judge(JudgeSettings("http://127.0.0.1:9/v1", "m"))
PRODUCT = Mixing("product", 0.9, ("accuracy", "judging", "think_quality"))


def column_reward(name, weight=1.0):
    """A rule whose values stand in a column."""
    return Reward(name, lambda completions, **columns: columns[name], weight)


def judged_reward(name, asked, weight=1.0):
    """A reward that asks a judge, whose verdicts stand in a column; notes which completions it was asked about."""

    def reward(completions, judge, **columns):
        asked.extend(completions)
        judge.problems += ["it hangs"] if None in columns[name] else []
        return Judgement(columns[name], {"first": columns[name]})

    return Reward(name, reward, weight, {"judge": NOWHERE})


def mixed(mixing, group_size=2, weights=None, **columns):
    """Totals, and the completions that the judge was asked about; think_quality is the judge's."""
    asked, count = [], len(next(iter(columns.values())))
    weights = weights or {}
    rewards = [
        judged_reward(name, asked, weights.get(name, 1.0))
        if name == "think_quality"
        else column_reward(name, weights.get(name, 1.0))
        for name in columns
    ]
    scores = score(rewards, {"completions": list("abcdefgh")[:count], **columns}, group_size, mixing)
    return scores, "".join(asked)


@pytest.mark.parametrize(
    ("accuracy", "judging", "think_quality", "form", "totals", "asked"),
    [
        # All distinct values of a well formed completion (facts: 0.1, 0.4, 0.7, 1.0).
        ([1] * 4, [1] * 4, [0, 1 / 3, 2 / 3, 1], [1] * 4, [0.1, 0.4, 0.7, 1.0], "abcd"),
        # One factor is 0: the judge is not asked, and whatever it would say changes nothing.
        ([0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0], [0.1, 0.1, 0.9, 0.0], "c"),
        # The judge fails for one member: its factor is left out for that group alone.
        ([1, 1, 1, 1], [1, 1, 1, 1], [None, 0, 1, 0], [1] * 4, [1.0, 1.0, 1.0, 0.1], "abcd"),
        # It fails in a group of which one member was not asked: that one stays 0.
        ([1, 0, 1, 1], [1, 1, 1, 1], [None, 0, 1, 0], [1] * 4, [1.0, 0.1, 1.0, 0.1], "acd"),
        # A rule that is None for a group does not apply to it; for a member, it masks it.
        ([None, None, 1, None], [1] * 4, [0.5] * 4, [1] * 4, [0.55, 0.55, 0.55, None], "abc"),
    ],
)
@pytest.mark.fault(
    fault="judge: fails for one group",
    injected="None for a member",
    expected="the factor is left out of that group; other groups unchanged; counted",
)
def test_product(accuracy, judging, think_quality, form, totals, asked):
    columns = {"think_quality": think_quality, "accuracy": accuracy, "judging": judging, "format": form}
    scores, about = mixed(PRODUCT, **columns)
    assert scores.totals == pytest.approx(totals)
    assert about == asked
    assert scores.parts["accuracy"] == accuracy
    expected = [value if name in asked else None for name, value in zip("abcd", think_quality, strict=True)]
    assert scores.parts["think_quality"] == scores.checks["think_quality/first"] == expected
    assert scores.failed["think_quality"] == [
        name in asked and v is None for name, v in zip("abcd", expected, strict=True)
    ]
    assert scores.errors == (["reward 'think_quality': it hangs"] if any(scores.failed["think_quality"]) else [])


@pytest.mark.parametrize(
    ("accuracy", "think_quality", "totals", "asked"),
    [
        ([1, 0, 1, 0], [1, 1, 0, 0], [0.9, 0.3, 0.6, 0.0], "abcd"),
        ([1, 0, 1, 0], [1, None, 0, 0], [0.6, 0.0, 0.6, 0.0], "abcd"),
        ([1, None, 1, 0], [1, 1, 0, 0], [0.9, None, 0.6, 0.0], "acd"),
    ],
)
@pytest.mark.fault(
    fault="judge: fails for one group",
    injected="None for a member",
    expected="the term is left out of that group; other groups unchanged",
)
def test_sum(accuracy, think_quality, totals, asked):
    weights = {"accuracy": 0.6, "think_quality": 0.3}
    scores, about = mixed(Mixing(), weights=weights, accuracy=accuracy, think_quality=think_quality)
    assert scores.totals == pytest.approx(totals)
    assert about == asked


def test_a_judge_without_weight_is_not_asked():
    scores, about = mixed(Mixing(), weights={"think_quality": 0.0}, accuracy=[1, 0], think_quality=[1, 1])
    assert (scores.totals, about) == ([1.0, 0.0], "")


@pytest.mark.fault(
    fault="judge: its reward raises",
    injected="RuntimeError",
    expected="the term is left out; counted",
)
def test_a_judge_that_raises_leaves_its_term_out():
    def broken(completions, judge, **columns):
        raise RuntimeError("no such picture")

    rewards = [column_reward("accuracy"), Reward("broken", broken, 1.0, {"judge": NOWHERE})]
    scores = score(rewards, {"completions": ["a", "b"], "accuracy": [1, 0]}, 2)
    assert scores.totals == [1, 0]
    assert scores.failed["broken"] == [True, True]
    assert re.fullmatch(r"reward 'broken': RuntimeError: no such picture \(test_mix\.py, line \d+\)", scores.errors[0])


def test_a_reward_gets_the_values_of_those_before_it():
    def later(completions, score_accuracy, group_size, **columns):
        return [2 * value + group_size for value in score_accuracy]

    scores = score([column_reward("accuracy"), Reward("later", later)], {"completions": "ab", "accuracy": [1, 0]}, 2)
    assert scores.parts["later"] == [4, 2]


@pytest.mark.parametrize(
    ("weights", "mixing", "expected"),
    [
        ({"accuracy": 0.9, "format": 0.1, "conciseness": 0.1}, Mixing(), None),
        ({"accuracy": 0.6, "think_quality": 0.2, "format": 0.1, "conciseness": 0.1}, Mixing(), None),
        ({"accuracy": 0.5, "format": 0.4, "conciseness": 0.1}, Mixing(), "a wrong answer could earn as much"),
        ({"accuracy": 0.9, "conciseness": -0.1}, Mixing(), "a wrong answer could earn as much"),
        ({"format": 0.9, "conciseness": 0.1}, Mixing(), "list accuracy too"),
        ({"accuracy": 1, "judging": 1, "think_quality": 1, "format": 1}, PRODUCT, None),
        ({"accuracy": 1, "think_quality": 1}, PRODUCT, "names 'judging', which is not in rewards"),
        ({"accuracy": 0.5, "judging": 1, "think_quality": 1}, PRODUCT, "accuracy has weight 0.5"),
        ({"accuracy": 1, "judging": 1, "think_quality": 1, "conciseness": 1}, PRODUCT, "leave it out"),
    ],
)
def test_a_mix_is_checked_before_it_runs(weights, mixing, expected):
    entries = [(name, weight, {}) for name, weight in weights.items()]
    if expected is None:
        check_mix(entries, mixing)
    else:
        with pytest.raises(RewardError, match=expected):
            check_mix(entries, mixing)


def test_by_shape_a_right_answer_stays_above_a_wrong_one():
    weights = [("accuracy", 0.2, {}), ("format", 0.4, {})]
    check_mix([*weights, ("conciseness", 0.4, {"shape": "cosine"})], Mixing())
    for arguments in ({"shape": "group"}, {"shape": "overlong"}, {}):
        with pytest.raises(RewardError, match="a wrong answer"):
            check_mix([*weights, ("conciseness", 0.4, arguments)], Mixing())
    with pytest.raises(RewardError, match="shape 'short'"):
        check_mix([*weights, ("conciseness", 0.4, {"shape": "short"})], Mixing())


def test_a_recipe_with_a_bad_mix_is_refused(tmp_path):
    overrides = ["rewards=[{function: accuracy, weight: 0.1}, {function: conciseness, weight: 0.1}]"]
    with pytest.raises(BadInput, match=r"rewards: with weights accuracy 0\.1, conciseness 0\.1"):
        load_recipe(GrpoRecipe, "recipes/quickstart.yaml", overrides)


def test_a_recipe_gives_its_rewards_what_they_need(tmp_path, monkeypatch):
    overrides = [f"output_dir={tmp_path}", "judge.api_key_env=OUR_KEY"]
    recipe = load_recipe(GrpoRecipe, "recipes/quickstart_mixed.yaml", overrides)
    with pytest.raises(BadInput, match=r"judge\.api_key_env = 'OUR_KEY': there is no such environment variable"):
        load_rewards(recipe)
    monkeypatch.setenv("OUR_KEY", "secret")
    rewards = {reward.name: reward for reward in load_rewards(recipe)}
    assert rewards["conciseness"].arguments == {"max_length": 72, "least_unit": 16}
    settings = rewards["think_quality"].arguments["judge"].settings
    assert (settings.model, settings.api_key, settings.batch_seconds) == ("scene", "secret", 60)
    assert settings.cache == tmp_path / "judge_cache.sqlite"
    assert "secret" not in recipe_text(recipe)
    assert [name for name, reward in rewards.items() if reward.asks_judge] == ["think_quality"]
    without = load_recipe(GrpoRecipe, "recipes/quickstart_mixed.yaml", [*overrides, "judge=null"])
    with pytest.raises(BadInput, match="reward 'think_quality' asks a judge: name one in the section judge"):
        load_rewards(without)


def counted(when_failing, steps):
    """What is kept after steps of eight completions, of which the judge was asked about five and missed so many."""
    recipe = load_recipe(GrpoRecipe, "recipes/quickstart_mixed.yaml", [f"judge.when_failing={when_failing}"])
    run, rewards, progress = SimpleNamespace(recipe=recipe), load_rewards(recipe), Progress()
    fine = {reward.name: 1.0 for reward in rewards}
    for missing in steps:
        values = [None] * (3 + missing) + [1.0] * (5 - missing)
        failed = [False] * 3 + [True] * missing + [False] * (5 - missing)
        outcomes = [
            Outcome(9, False, 1.0, fine | {"think_quality": v}, dict.fromkeys(fine, False) | {"think_quality": f}, {})
            for v, f in zip(values, failed, strict=True)
        ]
        progress = progress.after(**count_failures(run, rewards, progress, outcomes, ["reward 'x': status: 500"]))
    return progress


@pytest.mark.fault(
    fault="judge: down for the whole run",
    injected="most verdicts missing, step after step",
    expected="patience of 3 steps, then stop, or go on if the recipe says so",
)
def test_how_long_a_judge_may_fail():
    for failing in ("stop", "continue"):
        assert [counted(failing, (1, 2, 5, 1, 2)[:n]).judge_failing for n in range(6)] == [0, 0, 1, 2, 0, 1]
    went_on = counted("continue", (2, 5, 2, 2))
    assert (went_on.judge_failing, went_on.reward_failures["think_quality"], went_on.completions_scored) == (4, 11, 32)
    expected = "no verdict on 40% of what it was asked, .* 3 steps in a row; the last error: reward 'x': status: 500"
    with pytest.raises(BadInput, match=expected):
        counted("stop", (1, 2, 5, 2))
