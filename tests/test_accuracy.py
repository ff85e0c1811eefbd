"""The accuracy reward: a table of answers for each kind of gold, hostile strings in both kinds of thread, columns."""

import asyncio
import json
import pickle
import threading
import time
from pathlib import Path

import pytest
from linear_time import takes_linear_time

from rewards.accuracy import accuracy_reward, verify
from rewards.answers import boxed_answers, completion_text, final_answer, split_completion

PAIRS = Path(__file__).parent / "data" / "answer_pairs.jsonl"
SECONDS = 30.0  # bounds a hang by one hostile string, which takes well under half a second

# kind -> (gold, right answers, wrong answers), each answer the content of a box
ANSWERS = {
    "numbers": [
        ("5", ["5.0", "5 apples", r"\approx 5", "5.", "**5**", r"\mathbf{5}", "five", "five.", r"\text{five}"], []),
        ("5", ["x = 5", "AB = 5", r"\text{The answer is } 5", "{5}", "(5)", r"\sqrt{25}", "5~cm", r"\$5$"], []),
        (
            "5",
            [r"\(5\)", "$5$", r"5 \text{ cm}^2", "5个", "５．０", r"\frac{10}{2}\text{ units}"],
            ["5.01", "5 million"],
        ),
        ("5", [], ["5 or 6", "5x", "x=6=5", "2x=5", r"5 \neq 6", "４", r"\emptyset", "5/0", r"\{5,6\}", "None"]),
        ("-3", ["−3"], ["3"]),
        ("1/3", ["0.333333"], ["0.333", "0.333334"]),
        (r"\frac13", ["1/3"], []),
        (r"\pi", ["3.14159", "π"], ["3.14", "3.15159"]),
        ("3.14159", [r"\pi"], []),
        ("3.14", [], [r"\pi", "3.14159"]),
        ("2 1/2", ["5/2"], []),
        ("2.5", [r"2 \tfrac{1}{2}"], []),
        ("7", [r"7\,\text{cm}", r"7\;cm", r"7\text{cm}"], ["1 1/2"]),
        ("1000000", ["1,000,000", "10^6"], []),
        ("1.234", [], ["1,234"]),
        ("1234", ["1,234"], []),
        ("3.5", ["3,5", r"3\frac{1}{2}\text{ cm}"], []),
        ("0.5", [".5", r"50\%"], ["50"]),
        ("6.02e23", [r"6.02\times 10^{23}"], []),
        ("1.2e-4", ["0.00012"], []),
        ("50%", ["50", "0.5"], ["half"]),
        ("50", [], ["0.5"]),
        ("12.5%", [r"12.5 \%"], [r"1.25\%"]),
        ("12", ["12 mm", r"S=12\text{ cm}^2"], []),
        ("18.9", ["$18.90"], []),
        ("6", ["3!", "2*3"], []),
        ("1", ["0!"], [r"\frac{x}{x}", "1.0000001"]),
        ("8", ["2^3"], []),
        (r"2\sqrt{3}", [r"\sqrt{12}", "2√3", "3.464102", "2*sqrt(3)", r"2\sqrt{3}\text{ cm}"], ["3.4641"]),
        (r"6\pi", [], ["18.84"]),
        ("3+4i", [], ["3-4i"]),
        (r"0.1\overline{6}", [r"\frac16"], []),
        (r"\infty", ["∞", "infinity"], []),
        ("0", ["0.0", r"\text{zero}"], [r"\emptyset"]),
        ("2024", ["2024年"], []),
        ("1/2", [r"\dfrac{1}{2}"], ["-1/2"]),
        ("10", ["ten", r"\binom{5}{2}"], []),
        ("72.4", ["72.40"], ["72"]),
        ("3", ["3.0000000", r"\log_2 8", r"\sqrt[3]{27}"], []),
        ("100", ["1e2", "10^{2}"], []),
        (r"\frac{\pi}{2}", [], ["90°"]),
        (r"\frac{3}{4}", ["3/4", r"75\%"], []),
        (r"-\frac{1}{2}", ["-0.5"], []),
        (r"\frac{1}{2}", [r"\frac{2}{4}"], []),
        ("36", [], [r"36\pi"]),
        (r"36\pi", ["36π cm²"], ["36"]),
        ("4", [r"\text{4 apples}", "4.", "4/1", "[4]", r"\{4\}", "4,", r"\text{four}"], ["IV", "4 out of 5"]),
        ("1200", [], ["1.2k", "1,2"]),
        ("0.667", [], [r"\frac23"]),
        ("66.6667%", [r"\frac{200}{3}\%"], []),
        ("1.4142", [], [r"\sqrt2"]),
        ("60", [r"\angle ABC = 60^\circ"], []),
        (r"\sqrt{2}", [], [r"-\sqrt{2}"]),
        (r"5\sqrt{2}", [r"\sqrt{50}"], []),
        (r"\ln 2", [], [r"\log 2"]),
        ("24", ["4!"], []),
        ("0.001", ["10^{-3}", "1e-3"], []),
        ("6.022e23", [], ["6.023e23"]),
        ("1{,}234", ["1234"], []),
        ("1234567", [], ["1.234.567"]),
        (r"\{2\}", ["2"], [r"\{3\}"]),
        ("25%", ["0.25", "1/4", "25.0%"], ["2.5", "250%"]),
    ],
    "units": [
        ("12 cm", ["120 mm", "12", "h = 12 cm", "h=1.2 dm"], ["12 mm", "12 seconds"]),
        ("5 m/s", [r"5\ \text{m/s}", "18 km/h"], ["5 km/h"]),
        ("36 cm^2", ["36 square cm", "0.0036 m²"], ["36 cm"]),
        ("1 h", ["60 min"], []),
        ("2 L", ["2000 mL"], []),
        ("5厘米", ["5 cm"], []),
        ("3平方米", ["3 m^2"], []),
        (r"45^\circ", ["45"], []),
        ("90°", [], ["91°", r"\frac{\pi}{2}"]),
        ("$5", ["5 dollars"], ["€5"]),
        (r"\$18.90", [r"\$18.9"], []),
        ("12 apples", ["12"], ["12 oranges"]),
        ("5 million", ["5000000"], []),
        (r"6\pi cm", ["6π"], []),
        ("3 hours", ["180 minutes"], []),
        ("25°C", ["25"], ["25°F"]),
        ("100 km/h", ["100 km per hour"], []),
        ("9.8 m/s^2", [r"9.8\,\mathrm{m/s^{2}}", "9.8 m s^{-2}"], []),
        ("120°", ["120"], []),
        ("５厘米", ["5cm"], []),
        ("£3.50", ["3.5"], []),
        ("$3", [r"3\$"], []),
        ("50 cents", [r"\$0.50"], []),
        ("3 1/2 cm", ["3.5 cm"], []),
        ("2.5 kg", ["2500 g"], []),
    ],
    "letters": [
        ("B", ["B.", "(B)", "B) 5", "b", "B: 5 cm", "Option B", "The answer is B", r"\boxed{B}", "$B$"], ["C"]),
        ("B", [], ["A, B", "B or C", "AB", "(A) or (B)", "A. 4, B. 5"]),
        ("(B)", ["B"], []),
        ("B. 5 cm", ["B", "5 cm"], []),
        ("AC", ["A, C", "A and C", "CA"], ["AB", "A or C"]),
        ("A, C", ["AC"], []),
        ("ABD", ["A、B、D"], []),
        ("C", ["选C", r"\textbf{(C)}", "The correct answer is (C)."], []),
        ("I", [], ["II"]),
        ("A", ["(a)"], [r"\alpha"]),
        ("D", [], ["DNA"]),
        ("ABC", [], [r"\triangle ABC"]),
        ("ABCD", ["A, B, C, D"], ["A,B,C"]),
        ("BC", ["C and B"], []),
    ],
    "words": [
        ("yes", ["Yes"], ["no"]),
        ("isosceles triangle", ["an isosceles triangle", "Isosceles Triangle"], []),
        ("triangle", ["the triangle"], []),
        ("blue", [], ["red"]),
        ("no", [], ["on"]),
        ("三角形", [r"\text{三角形}", "三角形。"], []),
        ("New York", ["new york"], []),
        ("cat", [], ["cat or dog", "cats and dogs"]),
        ("False", [r"\text{false}"], []),
        ("True", [], ["yes"]),
        ("the cat", ["cat"], []),
        ("left", [], ["Left side"]),
        ("正方形", [], ["三角形"]),
    ],
    "expressions": [
        ("H2O", ["H_2O"], []),
        ("x^2+2x+1", ["(x+1)^2"], ["x^2+2x"]),
        ("a+b", [], ["a+c"]),
        (r"\frac{x}{2}", ["0.5x"], []),
        ("3x", [], ["3y"]),
        ("2ab", ["2ba"], ["2"]),
        ("e^{x}", ["e^x"], []),
        (r"\frac{x^2}{2}+C", [r"C+\frac{x^2}{2}"], []),
        (r"x\neq 3", [r"x \ne 3"], []),
        ("-i", [], ["i"]),
    ],
    "lists, tuples, intervals": [
        ("1,2", ["2, 1", r"\{1,2\}"], ["1"]),
        (r"\{1,2,3\}", [r"\{3,2,1\}"], []),
        ("1, 2", ["x=1 or x=2"], []),
        ("x=1,x=2", ["1 and 2"], []),
        ("2,-2", [r"\pm 2"], []),
        (r"1\pm\sqrt{2}", [r"1+\sqrt{2}, 1-\sqrt{2}"], []),
        ("1, 2, 3", [], ["1, 2"]),
        ("10, 20", [], ["10.2"]),
        ("(1,2)", [r"\left(1,2\right)"], ["[1,2]"]),
        (r"(\frac12,2)", ["(0.5, 2)"], []),
        ("(3,4)", ["(x,y)=(3,4)"], [r"\{3,4\}", "P(3,4)"]),
        ("[0,1)", [], ["[0,1]"]),
        ("(2,5]", [r"2<x\le5"], ["2<x<5"]),
        ("x>3", [], ["x<3", "y>3"]),
        (r"x \ge 3", [r"[3,\infty)"], []),
        (r"(-\infty, 1)", ["x<1"], []),
        (r"(-\infty,1)\cup(3,\infty)", ["x<1 or x>3", r"(3,\infty) ∪ (-\infty,1)"], []),
        ("x=1, y=2", ["(1,2)"], ["x=2, y=1", "(2,1)"]),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", ["(1,2)"], []),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", [], [r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"]),
        ("[10,20,30,40]", [], ["[20,10,30,40]"]),
        (r"[0,1]\cup[1,2]", ["[0,2]"], []),
        ("-2<x<3", ["(-2,3)", r"x\in(-2,3)"], [r"-2\leq x<3"]),
        (r"x \le 5", [], ["x<5"]),
        ("(-1, 2)", [], ["(-1,-2)"]),
        ("(0,0)", ["(0.0,0)"], []),
        (r"(\sqrt{2}, 1)", [r"(\sqrt2,1)"], ["(1.41,1)"]),
        ("1, -1", ["-1, 1"], ["1"]),
        (r"\begin{bmatrix}1&0\\0&1\end{bmatrix}", [r"\left[\begin{array}{cc}1&0\\0&1\end{array}\right]"], []),
    ],
    "equations": [
        ("x=3", ["3", "3=x"], ["x=4"]),
        ("y=2x+1", ["y=1+2x", "2x+1"], ["y=2x-1"]),
        ("x^2+y^2=1", ["y^2+x^2=1"], ["x^2+y^2=2"]),
        (r"x=\frac{1}{2}", ["0.5"], []),
        ("2x+3y=6", ["3y+2x=6", "2x+3y-6=0"], []),
        ("f(x)=x^2", ["x^2"], ["g(x)=x^2"]),
        ("x^2-5x+6=0", ["(x-2)(x-3)=0"], []),
    ],
    "clock times and ratios": [
        ("3:45 PM", ["3:45 p.m."], []),
        ("3:4", [], ["4:3"]),
        ("12:30", [], ["12:03", "12:30:00"]),
    ],
}

# gold, completion, is it right, what it shows
COMPLETIONS = [
    ("7", r"\boxed{5} ... wait, \boxed{7}", True, "the last box counts"),
    ("5", r"\boxed{5} ... wait, \boxed{7}", False, "the last box counts"),
    ("7", r"\boxed{5} or \boxed{7}", False, "a hedge"),
    ("7", r"$\boxed{5}$ or maybe $\boxed{7}$", False, "a hedge with a word more"),
    ("7", r"\boxed{5}\boxed{7}", False, "touching boxes"),
    ("7", r"$$\boxed{5}$$, $$\boxed{7}$$", False, "a comma between"),
    ("7", r"\boxed{7} or \boxed{7.0}", True, "joined boxes that are all right"),
    ("5, 7", r"\boxed{5} and \boxed{7}", True, "joined boxes where the gold is a list"),
    ("AC", r"\boxed{A}, \boxed{C}", True, "joined letters"),
    ("(5,7)", r"\boxed{5}, \boxed{7}", False, "joined boxes are no point"),
    ("5", r"<think>\boxed{5}</think> It is five.", False, "no box after the think block"),
    ("5", r"<think>\boxed{4}</think> \boxed{5}", True, "the box in the think block does not count"),
    ("5", r"<think>first</think> \boxed{5} <think>again", False, "unclosed at the end"),
    ("5", r"it continues</think> \boxed{5}", True, "the template opened the block"),
    ("5", r"\boxed{\boxed{5}}", True, "a box in a box"),
    ("5", r"\boxed{\text{so } \{ 5}", False, "an escaped brace does not close"),
    ("5", r"\boxed{5", False, "an unclosed box"),
    ("5", r"\boxed{4} and then \boxed{5", False, "the last balanced box is another"),
    ("5", r"\boxed{}", False, "an empty box"),
    ("5", r"\boxed{5}" * 14_000, False, "a spray of the same box"),
]

_LONG = "+".join(f"x_{{{index}}}" for index in range(3000))
HOSTILE_ANSWERS = [
    *("9^{9^{9}}", "9^9^9", "9**9**9**9", "10^{" + "9" * 1000 + "}", "10^{" + "9" * 20 + "}", "((2^{99})^{99})^{99}"),
    *("9999999999!", "(((5!)!)!)!", "999!" * 90, r"\binom{1000000000}{500000000}", r"\log_2(9999!)", "1e1000000000"),
    *(r"\sum_{k=1}^{1000000000} k", r"\prod_{k=1}^{100000000} k", r"\int_0^1 e^{x^2}\sin(x^x)dx", "9" * 5000, _LONG),
    *("{" * 500 + "5" + "}" * 500, "(" * 2000 + "5" + ")" * 2000, r"\frac{1}{" * 300 + "2" + "}" * 300),
    *(r"\sqrt{" * 300 + "2" + "}" * 300, "(a+b+c+d+e+f)^{40}", r"\sin(\sin(\sin(\cos(\tan(1)))))", r"\text{" * 3000),
    *("a" * 100_000, "1," * 50_000, "$" * 100_000, "+" * 390, "-" * 390 + "5", "\x00\x01", "\ud800", "5/0"),
]
HOSTILE_COMPLETIONS = [
    *("\\[" * 50_000, r"\boxed{" * 15_000, "x" * 100_000, "</think>" * 2000 + r"\boxed{" * 2000, "{" * 100_000),
    *("final answer is $" * 6000, "<think>" * 14_000 + r"\boxed{5}", r"\boxed" + " " * 100_000, "\\" * 100_000),
    *(r"\boxed{" * 5000 + "}" * 5000, r"\boxed{1} or " * 8000),
    *(rf"\boxed{{{answer}}}" for answer in HOSTILE_ANSWERS),
]
HOSTILE_GOLDS = ["5", "x^2+1", r"2\sqrt{3}", "B", "yes", "1, 2", "(1,2)", "5 cm"]


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_of_a_kind(kind):
    rows = [(gold, text, expected) for gold, *sides in ANSWERS[kind] for expected, text in _labelled(*sides)]
    wrong = [row for row in rows if verify(row[0], row[1]) != row[2]]
    assert wrong == []
    assert [gold for gold, _, _ in rows if not verify(gold, gold)] == []


def _labelled(right, wrong):
    return [(True, text) for text in right] + [(False, text) for text in wrong]


@pytest.mark.parametrize(("gold", "completion", "right", "note"), COMPLETIONS)
def test_completions(gold, completion, right, note):
    assert accuracy_reward([completion], answer=[gold]) == [float(right)], note


def test_labelled_rows():
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    scores = accuracy_reward([row["completion"] for row in rows], answer=[row["gold"] for row in rows])
    wrong = [row for row, score in zip(rows, scores, strict=True) if score != float(row["correct"])]
    assert len(wrong) <= 0.03 * len(rows), wrong


@pytest.fixture(scope="module")
def warm():
    """math-verify takes seconds to import; that is not the time under test."""
    assert verify(r"2\sqrt{3}", r"\sqrt{12}")


def _score_hostile() -> list[str]:
    """The hostile completions that were slow, or right for any gold."""
    found = []
    for completion in HOSTILE_COMPLETIONS:
        start = time.perf_counter()
        scores = accuracy_reward([completion] * len(HOSTILE_GOLDS), answer=HOSTILE_GOLDS)
        if time.perf_counter() - start > SECONDS or any(scores):
            found.append(completion[:60])
    return found


@pytest.mark.fault(
    fault="reward: pathological answers",
    injected="each alone, in the main thread",
    expected="a verdict within seconds",
)
def test_hostile_strings_in_the_main_thread(warm):
    assert _score_hostile() == []


@pytest.mark.fault(
    fault="reward: pathological answers",
    injected="each alone, in another thread",
    expected="a verdict within seconds",
)
def test_hostile_strings_in_a_thread(warm):
    found: list[list[str]] = []
    thread = threading.Thread(target=lambda: found.append(_score_hostile()), daemon=True)
    thread.start()
    thread.join(timeout=300)
    assert found == [[]]


def test_the_same_verdicts_in_asyncio_and_in_a_thread(warm):
    golds = [r"2\sqrt{3}", "x+1", "(2,5]", r"\pi"]
    completions = [rf"\boxed{{{text}}}" for text in (r"\sqrt{12}", "1+x", r"2<x\le 5", "3.14159")]

    async def both():
        inside = accuracy_reward(completions, answer=golds)
        return inside, await asyncio.to_thread(accuracy_reward, completions, answer=golds)

    assert asyncio.run(both()) == ([1.0] * 4, [1.0] * 4)


@pytest.mark.parametrize("piece", [r"\boxed{", r"\boxed{5}", "</think>", "<think></think>", "{", r"\boxed{5} or "])
@pytest.mark.fault(
    fault="property: time",
    injected="answers of one piece repeated",
    expected="linear in the length",
)
def test_the_scanners_take_linear_time(piece):
    for scan in (split_completion, boxed_answers, final_answer):
        assert takes_linear_time(lambda times, scan=scan: scan(piece * 10_000 * times))


def test_messages_as_trl_passes_them():
    plain = [{"role": "assistant", "content": r"\boxed{5}"}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": r"\boxed"}, {"type": "text", "text": "{5}"}]}]
    turns = [*plain, {"role": "tool", "content": "6"}, {"role": "assistant", "content": r"\boxed{6}"}]
    assert [completion_text(messages) for messages in (plain, parts)] == [r"\boxed{5}"] * 2
    scores = accuracy_reward(
        prompts=["p"] * 3,
        completions=[plain, parts, turns],
        completion_ids=[[1]] * 3,
        solution=["5"] * 3,
        images=[None] * 3,
    )
    assert scores == [1.0, 1.0, 0.0]


@pytest.mark.fault(
    fault="data: right answers that cannot be read",
    injected="None, blank, NaN",
    expected="None, never 0",
)
def test_golds_that_cannot_be_read_give_none():
    golds = [None, "", "  ", float("nan"), 5, r"So it is \boxed{5}."]
    assert accuracy_reward([r"\boxed{5}"] * 6, answer=golds) == [None, None, None, None, 1.0, 1.0]
    assert accuracy_reward([r"\boxed{5}"] * 2, answer=[None, "4"], solution=["5", "5"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="'answer' or 'solution'"):
        accuracy_reward([r"\boxed{5}"])


@pytest.mark.parametrize(
    ("gold", "answer", "tolerance", "right"),
    [
        ("100", "104", {"relative": 0.05}, True),
        ("100", "106", {"relative": 0.05}, False),
        ("-100", "-96", {"relative": 0.05, "absolute": None}, True),
        ("2%", "2.04%", {"relative": 0.05}, True),
        ("12 cm", "123 mm", {"relative": 0.05}, True),
        ("10", "10.4", {"absolute": 0.5}, True),
        (r"\pi", "3.14", {"relative": 0.01}, True),
        (r"2\sqrt{3}", "3.4", {"relative": 0.01}, False),
        ("cat", "dog", {"relative": 0.05}, False),
    ],
)
def test_tolerance(gold, answer, tolerance, right):
    assert accuracy_reward([rf"\boxed{{{answer}}}"], answer=[gold], tolerance=[tolerance]) == [float(right)]


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("B", "5 cm", True),
        ("B", "5.0 cm", True),
        ("B", "(B) 5 cm", True),
        ("B", "(B) 6 cm", False),
        ("B", "6 cm", False),
        ("5 cm", "B", True),
        ("5 cm", "C", False),
        ("B", "E", False),
        ("B", "7 cm", False),
    ],
)
def test_options(gold, answer, right):
    plain = ["4 cm", "5 cm", "6 cm", "8 cm"]
    lettered = [f"{letter}. {text}" for letter, text in zip("ABCD", plain, strict=True)]
    for options in (plain, lettered, dict(zip("ABCD", plain, strict=True))):
        assert verify(gold, answer, options=options) is right


def test_answer_types():
    boxes = [r"\boxed{2.5}", r"\boxed{5}", r"\boxed{A dog}", r"\boxed{(b)}", r"\boxed{12}"]
    types = ["decimal", "integer", "word", "letter", None]
    assert accuracy_reward(boxes, answer=["2,50", "5", "dog", "B", "12"], answer_type=types) == [1.0] * 5
    assert verify("2", "2.0", answer_type="text") is False
    with pytest.raises(ValueError, match="unknown answer_type 'nmber'"):
        verify("5", "5", answer_type="nmber")
    with pytest.raises(ValueError, match="unknown tolerance 'rel'"):
        verify("5", "5", tolerance={"rel": 0.1})


def test_a_truncated_completion_is_wrong():
    rewards = accuracy_reward([r"\boxed{5}"] * 2, answer=["5", "5"], finish_reason=["stop", "length"])
    assert rewards == [1.0, 0.0]


def test_the_reward_can_be_pickled():
    assert pickle.loads(pickle.dumps(accuracy_reward)) is accuracy_reward
