"""Figures of predictions with their intervals, and the paired comparison of two evaluations."""

import json
from itertools import combinations

import pytest

from sail_rl.command_line import BadInput
from sail_rl.eval_compare import compare, compare_folders, difference, mcnemar, read_evaluation
from sail_rl.eval_figures import all_figures, figures_of, markdown_table, pass_at, tried


def answers(position, *correct, **more):
    """Predictions of one question: `correct` has an entry for each completion."""
    facts = {"id": f"q{position}", "question": f"Question {position}?", "answer": "5", "images": [f"a/{position}.png"]}
    facts |= {"position": position, "mode": "think", "well_formed": True, "thought": True, "truncated": False}
    return [facts | {"correct": bool(one), "completion": "text", "length": 10, "sample": n} | more
            for n, one in enumerate(correct)]  # fmt: skip


def write(folder, questions, samples=1):
    folder.mkdir()
    lines = [json.dumps(one) + "\n" for question in questions for one in question]
    (folder / "predictions.jsonl").write_text("".join(lines))
    (folder / "summary.json").write_text(json.dumps({"samples": samples}))
    return folder


def flat(questions):
    return [one for question in questions for one in question]


@pytest.mark.parametrize(("samples", "right"), [(6, 0), (6, 1), (6, 4), (6, 6), (3, 2)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples, right):
    for k in range(1, samples + 1):
        draws = list(combinations([True] * right + [False] * (samples - right), k))
        assert pass_at(k, right, samples) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_which_k_are_reported():
    assert [tried(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_figures_of_questions_with_several_completions():
    questions = [answers(0, 1, 1, 0, 0, length=20), answers(1, 0, 0, 0, 0, thought=False, truncated=True)]
    found = figures_of(flat(questions), seed=0)
    assert (found["questions"], found["samples"]) == (2, 4)
    means = {name: one["mean"] for name, one in found.items() if isinstance(one, dict)}
    assert means == pytest.approx(
        {"pass@1": 0.25, "pass@2": (1 - 1 / 6) / 2, "pass@4": 0.5, "avg@4": 0.25, "well_formed": 1, "length": 15}
        | {"thinking_rate": 0.5, "truncation_rate": 0.5}
    )


def test_an_interval_is_as_wide_as_theory_says_and_follows_from_the_seed():
    predictions = flat(answers(n, n % 2) for n in range(400))
    one, same, other = (figures_of(predictions, seed)["pass@1"] for seed in (0, 0, 1))
    assert one == same != other
    assert one["low"] == pytest.approx(0.5 - 1.96 * 0.025, abs=0.008)
    assert one["high"] == pytest.approx(0.5 + 1.96 * 0.025, abs=0.008)


def test_completions_of_one_question_are_not_independent_evidence():
    few, many = (flat(answers(n, *[n % 2] * count) for n in range(50)) for count in (1, 8))
    assert figures_of(many, 0)["pass@1"] == figures_of(few, 0)["pass@1"]


def test_groups_are_shown_where_they_tell_questions_apart():
    questions = [answers(n, n < 3, kind="direct" if n % 2 else "cot", family="a|b") for n in range(4)]
    found = all_figures(flat(questions), seed=0)
    assert {kind: one["pass@1"]["mean"] for kind, one in found["groups"]["kind"].items()} == {"cot": 1, "direct": 0.5}
    assert set(found["groups"]) == {"mode", "kind", "family"}
    table = markdown_table(found)
    assert "| kind: cot | 2 | 1.000 (1.000 to 1.000) |" in table
    assert "family" not in table


@pytest.mark.parametrize(
    ("first", "second", "p"), [(0, 5, 2 / 32), (5, 0, 2 / 32), (3, 3, 1), (0, 0, 1), (1, 8, 20 / 512)]
)
def test_mcnemar_is_exact(first, second, p):
    assert mcnemar(first, second) == pytest.approx(p)


def test_a_paired_difference_sees_what_two_intervals_would_hide():
    first = [float(n % 2) for n in range(200)]
    second = [1.0 if n < 20 else value for n, value in enumerate(first)]  # ten questions better, none worse
    found = difference(first, second, exact=True)
    assert (found.first_better, found.second_better, found.p) == (0, 10, 2 / 1024)
    assert found.second - found.first == pytest.approx(0.05)
    assert 0 < found.low < 0.05 < found.high < 0.1
    assert difference(first, first, exact=False).p == 1


def test_two_folders_side_by_side(tmp_path, capsys):
    first = write(tmp_path / "a", [answers(n, 0, family="ab"[n % 2]) for n in range(4)])
    second = write(tmp_path / "b", [answers(n, n == 2, family="ab"[n % 2], mode="direct") for n in range(4)])
    found = compare(read_evaluation(first), read_evaluation(second))
    assert {name: one.second_better for name, one in found.items()} == {"all": 1, "family: a": 1, "family: b": 0}
    compare_folders(first, second, tmp_path / "out")
    assert "| all | 4 | 0.000 | 0.250 | +0.250" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out/comparison.jsonl").read_text().splitlines()]
    assert (lines[0]["id"], lines[0]["first"], lines[0]["second"], len(lines)) == ("q2", 0, 1, 4)


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([answers(0, 1)], "2 and 1 of them"),
        ([answers(0, 1), answers(1, 1, answer="6")], 'answer of question 2 is "5" and "6"'),
        ([answers(0, 1), answers(2, 1)], "row of question 2 is 1 and 2"),
        ([answers(0, 1), answers(1, 1, images=["a/9.png"])], "images of question 2"),
    ],
)
def test_different_questions_are_refused(tmp_path, questions, message):
    first = write(tmp_path / "a", [answers(0, 1), answers(1, 1)])
    with pytest.raises(BadInput, match=message):
        compare_folders(first, write(tmp_path / "b", questions), None)


def test_an_evaluation_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no finished evaluation"):
        read_evaluation(tmp_path)
