"""Groups that are scored while others are written: by which calls, in what order, and with the scores of one call."""

from threading import Event

import pytest

from rewards.judge import Judge, Judgement, JudgeSettings
from rewards.load import Reward
from rewards.mix import Mixing
from rewards.score import joined, score
from rollouts import Rollout
from sail_rl.early_scores import EarlyScores

WAIT = 60  # seconds; only a test that fails waits so long


def group(place):
    return [Rollout([place, member], [0.0, 0.0], "", "stop", 0) for member in range(2)]


def values(places, rollouts):
    """Each completion's own number, and its group's."""
    numbers = [float(10 * rollout.token_ids[0] + rollout.token_ids[1]) for rollout in rollouts]
    return score([Reward("mine", lambda completions, **columns: completions)], {"completions": numbers}, 2)


def test_a_group_is_scored_before_the_others_are_written():
    """What comes in the meantime is scored together, in the order of the questions; so is the result."""
    calls, begun, go_on = [], Event(), Event()

    def slow(places, rollouts):
        calls.append(list(places))
        begun.set()
        assert go_on.wait(WAIT)
        return values(places, rollouts)

    scoring = EarlyScores(slow, 4, early=True)
    scoring.add(2, group(2))
    assert begun.wait(WAIT)
    for place in (3, 0, 1):
        scoring.add(place, group(place))
    go_on.set()
    scores = scoring.result()
    assert calls == [[2], [0, 1, 3]]
    assert scores.totals == scores.parts["mine"] == [0, 1, 10, 11, 20, 21, 30, 31]
    assert scoring.seconds > 0


def test_what_must_be_called_once_waits_for_all():
    calls = []

    def once(places, rollouts):
        calls.append(list(places))
        return values(places, rollouts)

    scoring = EarlyScores(once, 3, early=False)
    for place in (1, 2, 0):
        scoring.add(place, group(place))
    assert calls == []
    assert scoring.result().totals == [0, 1, 10, 11, 20, 21]
    assert calls == [[0, 1, 2]]


def test_a_mistake_in_the_thread_is_raised_where_scores_are_wanted():
    scoring = EarlyScores(lambda places, rollouts: 1 / 0, 2, early=True)
    scoring.add(0, group(0))
    with pytest.raises(ZeroDivisionError):
        scoring.result()


def rewards(judge):
    """A rule that fails on one completion and does not apply to a group; a judge that is not asked about some."""

    def rule(completions, **columns):
        if ("c" in completions and len(completions) > 1) or completions == ["c"]:
            raise ValueError("no c")
        return [None if text in "ef" else float(text < "d") for text in completions]

    def judged(completions, judge, **columns):
        judge.problems += ["it hangs"] if "b" in completions else []
        return Judgement([None if text == "b" else 0.5 for text in completions], {"first": [1.0] * len(completions)})

    return [Reward("rule", rule), Reward("judged", judged, arguments={"judge": judge})]


def test_groups_apart_have_the_scores_of_all_together():
    """None, failures, factors and checks are matters of a group, whatever shares its call."""
    mixing = Mixing("product", 0.9, ("rule", "judged"))
    texts, names = list("abcdefgh"), ("totals", "parts", "failed", "checks")
    together, *apart = (
        score(rewards(Judge(JudgeSettings("http://127.0.0.1:9/v1", "m"))), {"completions": some}, 2, mixing)
        for some in (texts, texts[4:6], texts[2:4], texts[:2] + texts[6:])
    )
    found = joined(list(zip([[4, 5], [2, 3], [0, 1, 6, 7]], apart, strict=True)))
    assert found.failed["rule"] == [False, False, True] + 5 * [False]
    assert {name: getattr(found, name) for name in names} == {name: getattr(together, name) for name in names}
    outcomes = ({k: [v.outcome for v in column] for k, column in one.verdicts.items()} for one in (found, together))
    assert next(outcomes) == next(outcomes)
    assert len(found.errors) == 2
