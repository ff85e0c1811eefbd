"""Answers of every type against golds of every type; types and faults of golds; overlap and similarity."""

import json
import random
from pathlib import Path

import pytest

from rewards.accuracy import accuracy_reward, accuracy_verdicts, verify
from rewards.gold import check_golds, gold_type
from rewards.ladder import Row
from rewards.similarity import boxes_overlap, edit_distance, read_boxes, text_similarity
from rewards.verdict import Outcome

DATA = Path(__file__).parent / "data"

# (gold, completion, is it right): how a completion names its answer
COMPLETIONS = [
    ("7", r"<think>thought</think>\boxed{7} Wait, actually it might be 8", True),
    ("7", r"It is not \boxed{5}, but rather \boxed{7}", True),
    ("7", r"\boxed{5}, so finally \boxed{7}", True),
    ("7", r"\boxed{7}. Alternatively, \boxed{8}", False),
    ("7", r"<think>\boxed{7}</think> The answer is 7", False),
    ("7", r"<think>thought</think>\boxed{7}<think>more</think>\boxed{5}", False),
    ("7", r"<judge>hard</judge><think>thought</think>\boxed{7}", True),
    ("7", r"\boxed{5} \quad\text{or}\quad \boxed{7}", False),
    ("7", r"\boxed{5}或\boxed{7}", False),
    ("7", r"\boxed{5}/\boxed{7}", False),
    ("7", r"\boxed{8}" * 100 + r"\boxed{7}", False),
    ("5,7", r"\boxed{5}\boxed{7}", True),
    ("5,7", r"\boxed{5}, \boxed{7}, \boxed{9}", False),
    ("AC", r"\boxed{A} and \boxed{C}", True),
    ("AC", r"\boxed{A} or \boxed{C}", False),
    (r"\pm 5", r"\boxed{5} \text{ or } \boxed{-5}", True),
    ("x=1,y=2", r"\boxed{x=1}, \boxed{y=2}", True),
    (r"$\frac{1}{2}$", r"\boxed{0.5}", True),
    ("The answer is 3", r"\boxed{3}", True),
    (5, r"\boxed{5}", True),
    (True, r"\boxed{True}", True),
    (["1", "2"], r"\boxed{2,1}", True),
]

# gold, the type that its row names, answer, is it right
TYPED = [
    ("5", "integer", "5.0", True),
    ("5", "integer", "five", True),
    ("5", "float", "5 cm", True),
    ("0.5", "percent", "50%", True),
    ("50", "percent", "50%", True),
    ("1/2", "fraction", "0.5", True),
    ("yes", "yes_no", "Yes", True),
    ("yes", "bool", "no", False),
    ("True", "boolean", "true", True),
    ("2", "text", "2.0", False),
    ("2", "text", "2", True),
    ("10 Downing St", "text", "10 downing st.", True),
    ("B", "text", "b", True),
    ("B", "mcq", "(B)", True),
    ("b", "letter", "B", True),
    ("A,B", "letters", "AB", True),
    ("(1,2)", "tuple", "(1,2)", True),
    ("(1,2)", "interval", "1<x<2", True),
    ("{1,2}", "set", "2,1", True),
    ("1,2", "list", "2,1", True),
    ("x+1", "expression", "1+x", True),
    ("x=1", "equation", "1", True),
    ("12 cm", "unit", "0.12m", True),
    ("12 cm", "quantity", "12", True),
    ("3:30", "text", "3:30", True),
    ("3:30 pm", "text", "3:30 p.m.", True),
    ("5", "number", "x=5", True),
    ("5", "number", "5,6", False),
    ("I", "letter", "I", True),
    ("J", "letter", "J", True),
    ("Z", "letter", "z", True),
    ("E", "letter", "5", False),
    ("5", "str", "5", True),
    ("12", "int", "１２", True),
    ("三", "text", "三", True),
    ("红色", "text", "红色。", True),
]

# gold, options, answer, is it right
OPTIONS = [
    ("A", ["3", "4", "5", "6"], "3", True),
    ("A", ["3", "4", "5", "6"], "4", False),
    ("B", ["3 cm", "4 cm", "5 cm", "6 cm"], "4", True),
    ("B", ["A. red", "B. blue", "C. green"], "blue", True),
    ("blue", ["red", "blue"], "B", True),
    ("blue", ["red", "blue"], "Blue", True),
    ("4", ["3", "4", "5", "6"], "B", True),
    ("4", ["3", "4", "5", "6"], "4", True),
    ("4", ["3", "4", "5", "6"], "D", False),
    ("C", ["A", "B", "C", "D"], "C", True),
    ("A", {"A": "x", "B": "y"}, "x", True),
    ("A", ["Yes", "No"], "Yes", True),
    ("A", ["Yes", "No"], "A. Yes", True),
    ("A", ["Yes", "No"], "A. No", False),
    ("A", ["\\frac{1}{2}", "2"], "0.5", True),
    ("AC", ["1", "2", "3"], "A,C", True),
    ("E", ["1", "2", "3", "4", "5"], "E", True),
    ("D", None, "D", True),
    ("1", ["1", "2", "3", "4"], "A", True),
    ("A", ["1", "2"], "1", True),
]

TYPES = [
    ("(B)", "choice"),
    ("AC", "choice"),
    ("12", "number"),
    ("25%", "number"),
    (r"\frac{3}{4}", "number"),
    (r"2\sqrt{3}", "number"),
    ("12 cm", "unit"),
    ("$18.90", "unit"),
    ("5厘米", "unit"),
    ("三角形", "text"),
    ("isosceles triangle", "text"),
    ("3:45 PM", "text"),
    ("1, 2", "list"),
    (r"\{1,2\}", "list"),
    ("(1,2)", "list"),
    ("(2,5]", "list"),
    ("x>3", "list"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "list"),
    ("y=2x+1", "equation"),
    ("x^2-4", "expression"),
    ("x" * 500, "text"),
]

# gold, further fields of its row, what is said of it
BAD_GOLDS = [
    ("", {}, "it is empty"),
    ("...", {}, "says nothing"),
    (r"2\sqrt{", {}, "braces"),
    (r"\frac{1}{", {}, "braces"),
    ("9^{9^{9}}", {}, "busy for too long"),
    (r"\sum_{k=1}^{100}k", {}, "busy for too long"),
    (r"e^{e^{e^{79}}}", {}, "busy for too long"),
    ("E", {"options": ["1", "2", "3", "4"]}, "'E' is none of the 4 options"),
    ("foo bar", {"answer_type": "choice"}, "names no option"),
    ("foo", {"answer_type": "number"}, "cannot be read as a number"),
    ("5", {"answer_type": "nmber"}, "unknown answer_type 'nmber'"),
    ("5", {"tolerance": {"rel": 1}}, "unknown tolerance 'rel'"),
    ("[1,2,3]", {"answer_type": "box"}, "no box of four numbers"),
]


def test_answers():
    lines = map(json.loads, (DATA / "answers_by_type.jsonl").read_text("utf-8").splitlines())
    rows = [(one["gold"], text, side == "right") for one in lines for side in ("right", "wrong") for text in one[side]]
    scores = accuracy_reward([rf"\boxed{{{text}}}" for _, text, _ in rows], answer=[gold for gold, _, _ in rows])
    assert [row for row, score in zip(rows, scores, strict=True) if score != float(row[2])] == []


def test_named_types_and_options():
    answers = [rf"\boxed{{{answer}}}" for *_, answer, _ in TYPED]
    scores = accuracy_reward(answers, answer=[row[0] for row in TYPED], answer_type=[row[1] for row in TYPED])
    assert [row for row, score in zip(TYPED, scores, strict=True) if score != float(row[3])] == []
    assert check_golds([Row(gold, kind) for gold, kind, _, _ in TYPED]) == [None] * len(TYPED)
    answers = [rf"\boxed{{{answer}}}" for *_, answer, _ in OPTIONS]
    scores = accuracy_reward(answers, answer=[row[0] for row in OPTIONS], options=[row[1] for row in OPTIONS])
    assert [row for row, score in zip(OPTIONS, scores, strict=True) if score != float(row[3])] == []


@pytest.mark.parametrize(("gold", "completion", "right"), COMPLETIONS)
def test_completions(gold, completion, right):
    assert accuracy_reward([completion], answer=[gold]) == [float(right)]


@pytest.mark.parametrize(
    ("completion", "gold", "outcome"),
    [
        (r"\boxed{5}", "5", Outcome.CORRECT),
        (r"\boxed{6}", "5", Outcome.WRONG),
        ("The answer is 5.", "5", Outcome.NO_ANSWER),
        (r"<think>\boxed{5}", "5", Outcome.NO_ANSWER),
        (r"\boxed{9^{9^{9}}}", "5", Outcome.REFUSED),
        (r"\boxed{5}", None, Outcome.GOLD_BAD),
    ],
)
def test_outcomes(completion, gold, outcome):
    (verdict,) = accuracy_verdicts([completion], answer=[gold])
    assert verdict.outcome == outcome
    assert verdict.value == (None if outcome == Outcome.GOLD_BAD else float(outcome == Outcome.CORRECT))


@pytest.mark.parametrize(("gold", "kind"), TYPES)
def test_types_are_inferred_and_good_golds_pass(gold, kind):
    assert gold_type(Row(gold)) == kind
    assert check_golds([Row(gold), Row(gold, kind)]) == [None, None]
    assert verify(gold, gold, answer_type=kind)


@pytest.mark.parametrize(("gold", "fields", "problem"), BAD_GOLDS)
def test_bad_golds_say_why(gold, fields, problem):
    (found,) = check_golds([Row(gold, **fields)])
    assert problem in (found or "")


def test_a_gold_that_only_its_own_spelling_matches_is_kept():
    assert check_golds([Row(r"AB \parallel CD")]) == [None]


@pytest.mark.parametrize(
    ("gold", "answer", "value"),
    [
        ("[0,0,10,10]", "[0,0,10,10]", 1.0),
        ("[0,0,10,10]", "(0,0),(10,5)", 0.5),
        ("[0,0,10,10]", '{"bbox_2d": [0, 5, 10, 10], "label": "dog"}', 0.5),
        ("[0,0,10,10]", "[10,10,0,0]", 1.0),
        ("[0,0,10,10]", "[20,20,30,30]", 0.0),
        ("[0,0,10,10]", "[0,0,10]", 0.0),
        ("[0,0,10,10]", "[0,0,10,10],[20,20,30,30]", 0.5),
        ("[[0,0,10,10],[20,20,30,30]]", "[[20,20,30,30],[0,0,10,10]]", 1.0),
        ("[0,0,10,10]", "the whole picture", 0.0),
        ("[0,0,10,10]", "[0,0,10,10] or 5", 0.0),
        ("[0,0,10,10]", "[5,5,5,5]", 0.0),
    ],
)
def test_boxes_earn_their_overlap(gold, answer, value):
    (verdict,) = accuracy_verdicts([rf"\boxed{{{answer}}}"], answer=[gold], answer_type=["box"])
    assert (verdict.value, verdict.outcome) == (pytest.approx(value), Outcome.SCORED)
    assert accuracy_reward([rf"\boxed{{{answer}}}"], answer=[gold], answer_type=["bbox"], tolerance=[{"iou": 0.5}]) == [
        float(value >= 0.5)
    ]


def test_many_boxes_are_matched_one_to_one():
    gold = [(0, 0, 1, 1), (2, 2, 3, 3)]
    assert boxes_overlap(gold, [(0, 0, 1, 1)] * 50) == pytest.approx(1 / 50)
    assert read_boxes("1 " * 4000) is None


@pytest.mark.parametrize(
    ("gold", "answer", "value"),
    [
        ("STOP", "STOP", 1.0),
        ("STOP", "ＳＴＯＰ", 1.0),
        ("a  b\nc", "a b c", 1.0),
        ("hello world", "hello w0rld", 10 / 11),
        ("STOP", "STQP", 0.75),
        ("STOP", "stop", 0.0),
        ("出口在左", "出口在右", 0.75),
        ("STOP", "GO", 0.0),
    ],
)
def test_read_text_earns_its_similarity(gold, answer, value):
    assert accuracy_reward([rf"\boxed{{{answer}}}"], answer=[gold], answer_type=["ocr"]) == [pytest.approx(value)]


def test_edit_distance_is_the_usual_one():
    def by_table(first, second):
        row = list(range(len(second) + 1))
        for i, left in enumerate(first):
            above, row = row, [i + 1]
            for j, right in enumerate(second):
                row.append(min(above[j] + (left != right), above[j + 1] + 1, row[-1] + 1))
        return row[-1]

    draw = random.Random(0)
    texts = ["".join(draw.choices("abc", k=draw.randrange(12))) for _ in range(400)]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    assert [edit_distance(*pair) for pair in pairs] == [by_table(*pair) for pair in pairs]
    assert text_similarity("ab" * 10_001, "ab" * 10_001) == 0.0
