r"""Is an answer the gold one? A ladder from exact, typed comparison to symbolic algebra.

The gold fixes the type, which the row may name. All but real expressions compare without sympy, in microseconds; for
those the comparison asks `Algebra`, whose replies come from a worker process.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

from rewards import structure, symbolic
from rewards.choices import looks_like_choice, read_choice, read_options, resolve, same_choice
from rewards.notation import MAX_LENGTH, clean, squash, text_key
from rewards.number_words import digits_first
from rewards.numbers import SIGNIFICANT_DIGITS, Number, agree, read_number
from rewards.similarity import boxes_overlap, read_boxes, text_similarity
from rewards.symbolic import Algebra
from rewards.units import Unit, conversion, read_parts, read_unit, split_unit

Options = Sequence[str] | Mapping[str, str] | None

# Type names of data sets -> the rung that a row's gold is compared on; "inferred" ones are told apart by the gold.
ANSWER_TYPES = {
    **dict.fromkeys(
        ("letter", "letters", "choice", "choices", "option", "options", "multiple_choice", "mcq"), "choice"
    ),
    **dict.fromkeys(("number", "integer", "int", "float", "decimal", "percent", "fraction"), "number"),
    **dict.fromkeys(("unit", "quantity", "number_with_unit", "currency"), "number"),
    **dict.fromkeys(("text", "word", "words", "string", "str", "bool", "boolean", "yes_no"), "text"),
    **dict.fromkeys(("list", "set", "tuple", "interval", "equation", "expression", "formula", "math"), "inferred"),
    **dict.fromkeys(("box", "boxes", "bbox", "bounding_box", "grounding"), "box"),
    **dict.fromkeys(("ocr", "transcription"), "ocr"),
}
# As a gold without unit this is a list of two: 1,2 and 10,20; not thousands, and not 0,25.
_LIST_OR_DECIMAL = re.compile(r"(?!0,\d\d)-?\d+,(?!\d{3}$)\d+")
_RATIONAL = re.compile(r"(?:[\d\s.,:;+\-*/^!(){}%]|\\frac)*")
_TRIGONOMETRY = re.compile(r"(?:sin|cos|tan|cot|sec|csc)\b")  # behind it, degrees belong to the number
_SUBSCRIPT = re.compile(r"_\{?(\w+)\}?")
_WORD = re.compile(r"(?<![^\W_])[^\W\d_]{2,}|[一-鿿]")
_NOT_WORDS = re.compile(r"[\\^=<>+*/|]|\b(?:sin|cos|tan|log|ln|exp|sqrt|pi)\b")


@dataclass(frozen=True)
class Row:
    """What a row of data says of its right answer."""

    gold: str
    answer_type: str | None = None
    options: Options = None
    tolerance: Mapping[str, float | None] | None = None


@dataclass(frozen=True)
class Terms:
    """What two texts are compared with."""

    tolerance: Mapping[str, float]
    algebra: Algebra


def compare(row: Row, answer: str, algebra: Algebra) -> float:
    r"""1 where an answer (the content of a box) is the gold one, else 0; a share for boxes and OCR strings.

    Not symmetric: the gold fixes the type. Raises Unanswered where algebra has yet to be asked.
    """
    kind = type_of(row.answer_type)
    terms = Terms(allowed(row.tolerance), algebra)
    if kind == "ocr":
        return text_similarity(row.gold, answer)
    if kind == "box":
        return _compare_boxes(row.gold, answer, terms.tolerance)
    return float(_same_answer(row, kind, answer, terms))


def _same_answer(row: Row, kind: str, answer: str, terms: Terms) -> bool:
    gold = row.gold
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return squash(gold) == squash(answer) or (len(answer) < 2 * len(gold) and text_key(gold) == text_key(answer))
    gold, answer = clean(gold), clean(answer)
    if not gold or not answer:
        return False
    same = partial(_equal, terms=terms)
    if is_choice(gold, kind, read_options(row.options), same):
        return same_choice(gold, answer, read_options(row.options), same)
    if kind == "text":
        return text_key(gold) == text_key(answer) or _same_clock(gold, answer)
    return _same_number(gold, answer, terms) if kind == "number" else same(gold, answer)


def is_choice(gold: str, kind: str, letters: Mapping[str, str], same: structure.Same) -> bool:
    """Whether a cleaned gold is option letters, or the text of a listed option."""
    if kind == "choice":
        return True
    return bool(letters and resolve(gold, letters, same)) or (kind == "inferred" and looks_like_choice(gold))


def _compare_boxes(gold: str, answer: str, tolerance: Mapping[str, float]) -> float:
    """The overlap; with `tolerance: {iou: 0.5}` right or wrong at that overlap."""
    wanted, given = read_boxes(gold), read_boxes(answer)
    value = boxes_overlap(wanted, given) if wanted and given else 0.0
    return float(value >= tolerance["iou"]) if "iou" in tolerance else value


def type_of(answer_type: str | None) -> str:
    """The rung that a type name stands for."""
    name = (answer_type or "math").strip().lower()
    if name not in ANSWER_TYPES:
        raise ValueError(f"unknown answer_type {answer_type!r}: expected one of {', '.join(sorted(ANSWER_TYPES))}")
    return ANSWER_TYPES[name]


def allowed(tolerance: Mapping[str, float | None] | None) -> Mapping[str, float]:
    """A row's tolerance without the keys that a table filled with None."""
    unknown = set(tolerance or ()) - {"relative", "absolute", "iou"}
    if unknown:
        raise ValueError(f"unknown tolerance {unknown.pop()!r}: expected 'relative', 'absolute' or 'iou'")
    return {name: size for name, size in (tolerance or {}).items() if size}


def is_list(gold: str, hedged: bool) -> bool:
    """Whether several answers together can be the gold one: a list, a set; several option letters without an "or"."""
    if len(gold) > MAX_LENGTH:
        return False
    group = structure.read_group(clean(gold))
    if choice := looks_like_choice(clean(gold)) and read_choice(clean(gold)):
        return len(choice.letters) > 1 and not hedged
    return group is not None and not group.ordered


def _same_clock(gold: str, answer: str) -> bool:
    clock = structure.read_clock(gold)
    return clock is not None and clock == structure.read_clock(answer)


def _equal(gold: str, answer: str, terms: Terms) -> bool:
    """Two cleaned texts, of the type that the gold shows; called again for the parts of lists and equations."""
    if squash(gold) == squash(answer):
        return True
    same = partial(_equal, terms=terms)
    if numbers := hyphened(gold):
        return numbers == hyphened(answer)
    if (ratio := structure.read_ratio(gold)) and ratio == structure.read_ratio(answer):
        return True
    if is_number(gold):
        return _same_number(gold, answer, terms)
    if clock := structure.read_clock(gold):
        return clock == structure.read_clock(answer)
    if (matrix := structure.read_matrix(gold)) and (other := structure.read_matrix(answer)):
        return structure.same_matrix(matrix, other, same)
    if (range_ := structure.read_range(gold)) and (other_range := structure.read_range(answer)):
        merged = len(range_[1]) != len(other_range[1]) and terms.algebra.same(gold, answer)
        return merged or structure.same_range(range_, other_range, same)
    if group := structure.read_group(gold):
        return _same_group(gold, group, answer, same)
    if _SUBSCRIPT.sub(r"\1", squash(gold)) == _SUBSCRIPT.sub(r"\1", squash(answer)):  # CO_2 is CO2
        return True
    if is_words(gold):
        return text_key(gold) == text_key(answer)
    if "=" in gold or "=" in answer:
        return _same_equation(gold, answer, same, terms)
    return "\\pm" not in answer and terms.algebra.same(gold, answer)


def _same_group(gold: str, group: structure.Group, answer: str, same: structure.Same) -> bool:
    """A group against a group; a phrase with a comma or "and" may also be the same words."""
    other = structure.read_group(answer)
    if group.left == "(" and other and (values := structure.coordinates(other)):
        return len(values) == len(group.items) and all(map(same, group.items, values))
    if other is not None:
        return structure.same_group(group, other, same)
    alone = group.left == "{" and len(group.items) == 1
    return same(group.items[0], answer) if alone else text_key(gold) == text_key(answer)


def is_number(gold: str) -> bool:
    r"""Whether a gold is a number, with a unit or not: 12, 1/2, 3.5 cm, 2\sqrt{3}, 3+4i."""
    number, unit = split_quantity(gold)
    if not unit.powers and _LIST_OR_DECIMAL.fullmatch(number):
        return False
    constant = re.search(r"\d|\\pi|\\infty", number) and not re.search(
        r"[=<>,;:&?]|\\(?:pm|cup|begin|in|le|ge|ne)\b", number
    )
    return read_number(number) is not None or (bool(constant) and not symbolic.symbols(number) and number[:1] != "{")


def hyphened(text: str) -> tuple[tuple[int, ...], Unit] | None:
    """Numbers of a range, a score or a date, with their unit; read as a difference they would be another answer."""
    number, unit = split_quantity(text)
    numbers = structure.read_hyphened(number)
    return (numbers, unit) if numbers else None


def is_words(gold: str) -> bool:
    return bool(_WORD.search(gold)) and not _NOT_WORDS.search(gold)


def split_quantity(text: str) -> tuple[str, Unit]:
    """Number and unit of a cleaned text; the whole text where what follows the number is no unit."""
    if parts := read_parts(text):
        return parts
    number, suffix = split_unit(text)
    unit = read_unit(suffix) if suffix and number and not _TRIGONOMETRY.search(number) else None
    return (number, unit) if unit else (text, Unit(Fraction(1), ()))


def _same_number(gold: str, answer: str, terms: Terms) -> bool:
    """Numbers with or without units; a name or a calculation in front of the answer is read as an equation."""
    if squash(gold) == squash(answer):
        return True
    if "=" in answer or "=" in gold:
        return _same_equation(gold, answer, partial(_same_number, terms=terms), terms)
    (gold_number, gold_unit), (answer_number, answer_unit) = split_quantity(gold), split_quantity(digits_first(answer))
    factor = conversion(gold_unit, answer_unit)
    if factor is None:
        return False
    left, right = read_number(gold_number), read_number(answer_number)
    if left and right and (left.percent or right.percent) and (gold_unit.powers or answer_unit.powers):
        return False  # a percentage is no quantity
    if left and right:
        return agree(left, Number(right.value * factor, right.digits, right.percent), terms.tolerance)
    if factor != 1 or symbolic.symbols(answer_number) or re.search(r"[,;]|\\(?:pm|infty)\b", answer_number):
        return False
    if left and _RATIONAL.fullmatch(answer_number) and not symbolic.refused(answer_number):
        return False  # algebra could not read it either
    return _same_constant(gold_number, answer_number, left, right, terms)


def _same_constant(gold: str, answer: str, left: Number | None, right: Number | None, terms: Terms) -> bool:
    r"""Roots, \pi and the like: exactly, or as decimals where one is written to 6 digits or the row is tolerant."""
    decimal = left or right
    if not terms.tolerance and decimal and decimal.digits:
        exact = answer if left else gold
        value = terms.algebra.value(exact) if decimal.digits >= SIGNIFICANT_DIGITS else None
        return value is not None and agree(decimal, Number(value, SIGNIFICANT_DIGITS))
    if terms.tolerance:
        first, second = _value(gold, left, terms), _value(answer, right, terms)
        return first is not None and second is not None and agree(Number(first, 1), Number(second, 1), terms.tolerance)
    return terms.algebra.same(gold, answer)


def _value(text: str, number: Number | None, terms: Terms) -> Fraction | None:
    return number.value if number else terms.algebra.value(text)


def _same_equation(gold: str, answer: str, same: structure.Same, terms: Terms) -> bool:
    """Equations by name and value (`x=3`), else by algebra; every side of a chain has to be right."""
    gold_name, answer_name = structure.equation_name(gold), structure.equation_name(answer)
    gold_sides, answer_sides = structure.equation_sides(gold), structure.equation_sides(answer)
    if len(gold_sides) > 1 and gold_name is None:
        return len(answer_sides) == 2 and terms.algebra.same(gold, answer)
    if sorted(map(squash, gold_sides)) == sorted(map(squash, answer_sides)):
        return True
    if gold_name and answer_name and _differ(gold_name, answer_name):
        return False
    values = answer_sides[1:] if answer_name else answer_sides
    if all(same(gold_sides[-1], value) for value in values):
        return True
    return len(gold_sides) == len(answer_sides) == 2 and terms.algebra.same(gold, answer)


def _differ(gold: str, answer: str) -> bool:
    """Whether two names contradict each other: letters do, a word beside a letter (Area, A) does not."""
    return squash(gold) != squash(answer) and (len(squash(gold)) <= 3) == (len(squash(answer)) <= 3)
