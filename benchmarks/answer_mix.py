"""Completions as the training of a vision-language model meets them: kinds of right answers in realistic shares.

The shares follow what such data holds: multiple choice and plain numbers first, then quantities, words and fractions,
and few roots, lists and expressions. Half of the answers are right, most of them in the spelling of the gold.
"""

import random
from dataclasses import dataclass

GROUP = 8  # completions of one question
RIGHT, SAME_SPELLING = 0.5, 0.7  # shares: of all answers, and of the right ones
THOUGHT = (800, 4000)  # characters
SENTENCES = (
    "The figure shows a triangle ABC with AB = 5 cm and angle B = 30 degrees. ",
    "So the area is $\\frac{1}{2} \\times 5 \\times 12 = 30$, which is less than I expected. ",
    "Let me check that again: reading the chart, the bar for 2019 is at about 42.5. ",
    "By the Pythagorean theorem $c = \\sqrt{a^2 + b^2}$, hence c is 13. ",
    "Option A says that the value grows, but the picture does not show that. ",
    "Wait, I should count the objects from left to right, there are 7 of them. ",
)


@dataclass(frozen=True)
class Case:
    """One completion with its label."""

    kind: str
    gold: str
    completion: str
    right: bool


def letter(draw: random.Random) -> tuple[str, list[str], list[str]]:
    """Gold, other right spellings, wrong answers."""
    gold = draw.choice("ABCD")
    others = [one for one in "ABCD" if one != gold]
    return gold, [f"({gold})", rf"\text{{{gold}}}", f"{gold}. 12 cm"], [*others, f"{gold} or {others[0]}"]


def integer(draw: random.Random) -> tuple[str, list[str], list[str]]:
    value = draw.randrange(-20, 2000)
    return str(value), [f"{value}.0", f"x = {value}", rf"{value}\text{{ apples}}"], [str(value + 1), str(-value - 1)]


def decimal(draw: random.Random) -> tuple[str, list[str], list[str]]:
    value = draw.randrange(11, 9999)
    shown = f"{value / 100:.2f}"
    return shown, [shown + "0", rf"\frac{{{value}}}{{100}}"], [f"{(value + 7) / 100:.2f}", f"{value / 10:.1f}"]


def percent(draw: random.Random) -> tuple[str, list[str], list[str]]:
    value = draw.randrange(2, 99)
    return f"{value}%", [rf"{value}\%", f"{value / 100:.2f}"], [f"{value + 1}%", f"{value / 10:.1f}%"]


def fraction(draw: random.Random) -> tuple[str, list[str], list[str]]:
    top, bottom = draw.randrange(1, 30), draw.choice((3, 7, 8, 9, 11, 16))
    return (
        rf"\frac{{{top}}}{{{bottom}}}",
        [f"{top}/{bottom}", rf"\dfrac{{{2 * top}}}{{{2 * bottom}}}"],
        [rf"\frac{{{top + 1}}}{{{bottom}}}", rf"\frac{{{bottom + 31}}}{{{top}}}"],
    )


def quantity(draw: random.Random) -> tuple[str, list[str], list[str]]:
    value, unit = draw.randrange(1, 500), draw.choice(("cm", "km", "kg", "m"))
    return f"{value} {unit}", [rf"{value}\,\mathrm{{{unit}}}", str(value)], [f"{value + 1} {unit}", f"{value} s"]


def word(draw: random.Random) -> tuple[str, list[str], list[str]]:
    words = ["triangle", "red", "left", "yes", "bicycle", "increasing", "三角形", "Monday"]
    gold = draw.choice(words)
    return gold, [rf"\text{{{gold}}}", f"{gold}."], [one for one in words if one != gold][:3]


def root(draw: random.Random) -> tuple[str, list[str], list[str]]:
    factor, inside = draw.randrange(2, 12), draw.choice((2, 3, 5, 7))
    return (
        rf"{factor}\sqrt{{{inside}}}",
        [rf"\sqrt{{{factor**2 * inside}}}"],
        [rf"{factor + 1}\sqrt{{{inside}}}", str(factor), f"{factor * inside**0.5:.1f}"],
    )


def listed(draw: random.Random) -> tuple[str, list[str], list[str]]:
    low, high = draw.randrange(-9, 0), draw.randrange(1, 9)
    return (
        *draw.choice(
            (
                (f"({low}, {high})", [rf"\left({low},{high}\right)"], [f"({high}, {low})", f"({low}, {high + 1})"]),
                (f"[{low}, {high})", [rf"{low}\le x<{high}"], [f"[{low}, {high}]", f"({low}, {high})"]),
                (f"{low}, {high}", [rf"\{{{high}, {low}\}}"], [str(low), f"{low}, {high}, {high + 1}"]),
            )
        ),
    )


def expression(draw: random.Random) -> tuple[str, list[str], list[str]]:
    a, b = draw.randrange(2, 9), draw.randrange(1, 9)
    return (
        *draw.choice(
            (
                (f"{a}x+{b}", [f"{b}+{a}x"], [f"{a}x-{b}", f"{a + 1}x+{b}"]),
                (f"x^2+{a + b}x+{a * b}", [f"(x+{a})(x+{b})"], [f"(x-{a})(x-{b})"]),
                (f"y={a}x-{b}", [f"{a}x-y={b}"], [f"y={a}x+{b}"]),
            )
        ),
    )


KINDS = (
    *((letter, 0.28), (integer, 0.26), (decimal, 0.09), (percent, 0.04), (fraction, 0.06), (quantity, 0.10)),
    *((word, 0.08), (root, 0.04), (listed, 0.03), (expression, 0.02)),
)


def cases(questions: int, seed: int) -> list[Case]:
    """Groups of completions, other ones for each seed."""
    draw = random.Random(seed)
    kinds, shares = zip(*KINDS, strict=True)
    found = []
    for kind in draw.choices(kinds, shares, k=questions):
        gold, spellings, wrong = kind(draw)
        for _ in range(GROUP):
            right = draw.random() < RIGHT
            same = draw.random() < SAME_SPELLING
            answer = (gold if same else draw.choice(spellings)) if right else draw.choice(wrong)
            found.append(Case(kind.__name__, gold, written(answer, draw), right))
    return found


def written(answer: str, draw: random.Random) -> str:
    """A completion with a thought of some length."""
    thought, length = "", draw.randrange(*THOUGHT)
    while len(thought) < length:
        thought += draw.choice(SENTENCES)
    return rf"<think>{thought}</think>" + f"\nThe answer is $\\boxed{{{answer}}}$."
