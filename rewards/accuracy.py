"""Accuracy reward: is the boxed answer the gold one? A ladder from exact, typed comparison to symbolic algebra.

The type is read off the gold unless the row names it. All but real expressions compare without sympy, in microseconds.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from rewards import structure, symbolic
from rewards.answers import boxed_answers, completion_text, final_answer
from rewards.choices import looks_like_choice, read_options, resolve, same_choice
from rewards.notation import MAX_LENGTH, clean, squash, text_key
from rewards.numbers import SIGNIFICANT_DIGITS, Number, agree, read_number
from rewards.units import Unit, conversion, read_unit, split_unit

Tolerance = Mapping[str, float]

# Type names of data sets -> the rung that a row's gold is compared on; "inferred" ones are told apart by the gold.
ANSWER_TYPES = {
    **dict.fromkeys(
        ("letter", "letters", "choice", "choices", "option", "options", "multiple_choice", "mcq"), "choice"
    ),
    **dict.fromkeys(("number", "integer", "int", "float", "decimal", "percent", "fraction"), "number"),
    **dict.fromkeys(("unit", "quantity", "number_with_unit", "currency"), "number"),
    **dict.fromkeys(("text", "word", "words", "string", "str", "bool", "boolean", "yes_no"), "text"),
    **dict.fromkeys(("list", "set", "tuple", "interval", "equation", "expression", "formula", "math"), "inferred"),
}
# As a gold without unit this is a list of two: 1,2 and 10,20; not thousands, and not 0,25.
_LIST_OR_DECIMAL = re.compile(r"(?!0,\d\d)-?\d+,(?!\d{3}$)\d+")
_SUBSCRIPT = re.compile(r"_\{?(\w+)\}?")
_WORD = re.compile(r"(?<![^\W_])[^\W\d_]{2,}|[一-鿿]")
_NOT_WORDS = re.compile(r"[\\^=<>+*/|]|\b(?:sin|cos|tan|log|ln|exp|sqrt|pi)\b")


def accuracy_reward(
    completions: Sequence[str | list[dict[str, Any]]],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    answer_type: Sequence[str | None] | None = None,
    options: Sequence[Any] | None = None,
    tolerance: Sequence[Mapping[str, float | None] | None] | None = None,
    finish_reason: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 for a right answer, 0.0 for a wrong, missing or cut off one, None where the row has no gold to compare with.

    The gold is column `answer` or, where that is missing, `solution`; each may be a text that ends in a box.
    """
    blank = [None] * len(completions)
    if answer is None and solution is None:
        raise ValueError("accuracy needs the right answers: a column 'answer' or 'solution'")
    answers, solutions = answer or blank, solution or blank
    golds = [gold_text(first if gold_text(first) else second) for first, second in zip(answers, solutions, strict=True)]
    rows = zip(
        completions,
        golds,
        answer_type or blank,
        options or blank,
        tolerance or blank,
        finish_reason or blank,
        strict=True,
    )
    return [_score(*row) for row in rows]


def _score(completion: Any, gold: str, answer_type: Any, options: Any, tolerance: Any, reason: Any) -> float | None:
    if not gold:
        return None
    final = None if reason == "length" else final_answer(completion_text(completion))
    if final is None or len(final.joined) > structure.MAX_ITEMS:
        return 0.0
    check = partial(verify, gold, answer_type=answer_type, options=options, tolerance=tolerance)
    answers = dict.fromkeys(final.joined)
    # Boxes joined to one statement must all be right, or together be the list that the gold is.
    return float(all(map(check, answers)) or (len(answers) > 1 and _is_list(gold) and check(", ".join(answers))))


def gold_text(gold: Any) -> str:
    """A gold as text: its last box where it has one; empty for None, NaN and blank ones."""
    if gold is None or gold != gold:
        return ""
    if isinstance(gold, (list, tuple)):
        return ", ".join(str(item) for item in gold)
    boxes = boxed_answers(str(gold))
    return (boxes[-1].content if boxes else str(gold)).strip()


def _is_list(gold: str) -> bool:
    group = structure.read_group(clean(gold)) if len(gold) <= MAX_LENGTH else None
    letters = re.fullmatch(r"[A-H]{2,}", clean(gold)) if len(gold) <= MAX_LENGTH else None
    return letters is not None or (group is not None and not group.ordered)


def verify(
    gold: str,
    answer: str,
    answer_type: str | None = None,
    options: Sequence[str] | Mapping[str, str] | None = None,
    tolerance: Mapping[str, float | None] | None = None,
) -> bool:
    r"""Whether an answer (the content of a box) is the gold one. Not symmetric: the gold fixes the type."""
    kind, allowed = _kind(answer_type), _allowed(tolerance)
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return squash(gold) == squash(answer) or (len(answer) < 2 * len(gold) and text_key(gold) == text_key(answer))
    gold, answer = clean(gold), clean(answer)
    if not gold or not answer:
        return False
    same = partial(_equal, tolerance=allowed)
    letters = read_options(options)
    if (
        kind == "choice"
        or (letters and resolve(gold, letters, same))
        or (kind == "inferred" and looks_like_choice(gold))
    ):
        return same_choice(gold, answer, letters, same)
    if kind == "text":
        return text_key(gold) == text_key(answer)
    return _same_number(gold, answer, allowed) if kind == "number" else same(gold, answer)


def _kind(answer_type: str | None) -> str:
    if answer_type is not None and answer_type.lower() not in ANSWER_TYPES:
        raise ValueError(f"unknown answer_type {answer_type!r}: expected one of {', '.join(sorted(ANSWER_TYPES))}")
    return ANSWER_TYPES[(answer_type or "math").lower()]


def _allowed(tolerance: Mapping[str, float | None] | None) -> Tolerance:
    """A row's tolerance without the keys that a table filled with None."""
    unknown = set(tolerance or ()) - {"relative", "absolute"}
    if unknown:
        raise ValueError(f"unknown tolerance {unknown.pop()!r}: expected 'relative' or 'absolute'")
    return {name: size for name, size in (tolerance or {}).items() if size}


def _equal(gold: str, answer: str, tolerance: Tolerance) -> bool:
    """Two cleaned texts, of the type that the gold shows; called again for the parts of lists and equations."""
    if squash(gold) == squash(answer):
        return True
    same = partial(_equal, tolerance=tolerance)
    if _is_number(gold):
        return _same_number(gold, answer, tolerance)
    if clock := structure.read_clock(gold):
        return clock == structure.read_clock(answer)
    if (matrix := structure.read_matrix(gold)) and (other := structure.read_matrix(answer)):
        return structure.same_matrix(matrix, other, same)
    if (range_ := structure.read_range(gold)) and (other_range := structure.read_range(answer)):
        merged = len(range_[1]) != len(other_range[1]) and symbolic.same_expression(gold, answer)
        return merged or structure.same_range(range_, other_range, same)
    if group := structure.read_group(gold):
        return _same_group(gold, group, answer, same)
    if _is_words(gold):
        return text_key(gold) == text_key(answer)
    if "=" in gold or "=" in answer:
        return _same_equation(gold, answer, same)
    if _SUBSCRIPT.sub(r"\1", squash(gold)) == _SUBSCRIPT.sub(r"\1", squash(answer)):  # H_2O is H2O
        return True
    return "\\pm" not in answer and symbolic.same_expression(gold, answer)


def _same_group(gold: str, group: structure.Group, answer: str, same: structure.Same) -> bool:
    """A group against a group; a phrase with a comma or "and" may also be the same words."""
    other = structure.read_group(answer)
    if other is not None:
        return structure.same_group(group, other, same)
    alone = group.left == "{" and len(group.items) == 1
    return same(group.items[0], answer) if alone else text_key(gold) == text_key(answer)


def _is_number(gold: str) -> bool:
    r"""Whether a gold is a number, with a unit or not: 12, 1/2, 3.5 cm, 2\sqrt{3}, 3+4i."""
    number, unit = _split_quantity(gold)
    if not unit.powers and _LIST_OR_DECIMAL.fullmatch(number):
        return False
    constant = re.search(r"\d|\\pi|\\infty", number) and not re.search(
        r"[=<>,;:&?]|\\(?:pm|cup|begin|in|le|ge|ne)\b", number
    )
    return read_number(number) is not None or (bool(constant) and not symbolic.symbols(number) and number[:1] != "{")


def _is_words(gold: str) -> bool:
    return bool(_WORD.search(gold)) and not _NOT_WORDS.search(gold)


def _split_quantity(text: str) -> tuple[str, Unit]:
    """Number and unit of a cleaned text; the whole text where what follows the number is no unit."""
    number, suffix = split_unit(text)
    unit = read_unit(suffix) if suffix and number else None
    return (number, unit) if unit else (text, Unit(Fraction(1), ()))


def _same_number(gold: str, answer: str, tolerance: Tolerance) -> bool:
    """Numbers with or without units; a name or a calculation in front of the answer is read as an equation."""
    if squash(gold) == squash(answer):
        return True
    if "=" in answer or "=" in gold:
        return _same_equation(gold, answer, partial(_same_number, tolerance=tolerance))
    (gold_number, gold_unit), (answer_number, answer_unit) = _split_quantity(gold), _split_quantity(answer)
    factor = conversion(gold_unit, answer_unit)
    if factor is None:
        return False
    left, right = read_number(gold_number), read_number(answer_number)
    if left and right:
        return agree(left, Number(right.value * factor, right.digits, right.percent), tolerance)
    if factor != 1 or symbolic.symbols(answer_number) or re.search(r"[,;]|\\(?:pm|infty)\b", answer_number):
        return False
    return _same_constant(gold_number, answer_number, left, right, tolerance)


def _same_constant(gold: str, answer: str, left: Number | None, right: Number | None, tolerance: Tolerance) -> bool:
    r"""Roots, \pi and the like: exactly, or as decimals where one is written to 6 digits or the row is tolerant."""
    decimal = left or right
    if not tolerance and decimal and decimal.digits:
        exact = answer if left else gold
        value = symbolic.constant_value(exact) if decimal.digits >= SIGNIFICANT_DIGITS else None
        return value is not None and agree(decimal, Number(value, SIGNIFICANT_DIGITS))
    if tolerance:
        first, second = _value(gold, left), _value(answer, right)
        return first is not None and second is not None and agree(Number(first, 1), Number(second, 1), tolerance)
    return symbolic.same_expression(gold, answer)


def _value(text: str, number: Number | None) -> Fraction | None:
    return number.value if number else symbolic.constant_value(text)


def _same_equation(gold: str, answer: str, same: structure.Same) -> bool:
    """Equations by name and value (`x=3`), else by algebra; every side of a chain has to be right."""
    gold_name, answer_name = structure.equation_name(gold), structure.equation_name(answer)
    gold_sides, answer_sides = structure.equation_sides(gold), structure.equation_sides(answer)
    if len(gold_sides) > 1 and gold_name is None:
        return len(answer_sides) == 2 and symbolic.same_expression(gold, answer)
    if gold_name and answer_name and _differ(gold_name, answer_name):
        return False
    values = answer_sides[1:] if answer_name else answer_sides
    if all(same(gold_sides[-1], value) for value in values):
        return True
    return len(gold_sides) == len(answer_sides) == 2 and symbolic.same_expression(gold, answer)


def _differ(gold: str, answer: str) -> bool:
    """Whether two names contradict each other: letters do, a word beside a letter (Area, A) does not."""
    return squash(gold) != squash(answer) and (len(squash(gold)) <= 3) == (len(squash(answer)) <= 3)
