r"""Answers with parts: lists, sets, tuples, intervals and inequalities, unions, matrices, equations, clock times.

Only reads them; how two parts compare is the caller's `same`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from rewards.numbers import read_number

Same = Callable[[str, str], bool]

MAX_ITEMS = 30

_AND = re.compile(r",\s*(?:and|or)\b|\band\b|\bor\b|\\(?:land|lor|vee|wedge)(?![A-Za-z])|[和或]")
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[clr|]+\})?(.*)\\end\{\1\}", re.DOTALL)
_RELATION = re.compile(r"(<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z]))")
_UNION = re.compile(r"\\cup(?![A-Za-z])|\bor\b|\\(?:lor|vee)(?![A-Za-z])")
_EQUALS = re.compile(r"(?<![<>!])=|\\in(?![A-Za-z])")
_NAME = re.compile(r"(?=[^A-Za-zΑ-ω一-鿿]*[A-Za-zΑ-ω一-鿿])[^\d+*/^<>=\-!?%$][^+*/^<>=\-!?%$]*")
_NOT_NAMED = re.compile(r"\\(?:frac|sqrt|sin|cos|tan|log|ln|begin|pm|le|ge|ne|infty|pi)(?![A-Za-z])")
_CLOCK = re.compile(
    r"(\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+|\d+(?=\s*o'?clock))(?:\s*o'?clock)?\s*([ap]\.?\s?m)?\.?", re.IGNORECASE
)
_AFTERNOON = re.compile(r"(?:1[3-9]|2[0-3]):[0-5]\d(?::[0-5]\d)?")
_RATIO = re.compile(r"(\d+) ?[:/] ?(\d+)|\\frac\{ ?(\d+) ?\}\{ ?(\d+) ?\}")
_HYPHENED = re.compile(r"\d+ ?(?:-|to) ?\d+|\d+(?:-\d+){2,}|\d{1,4}/\d{1,2}/\d{1,4}")  # a range or score, a date
_BUILDER = re.compile(r"\\?\{\s*[A-Za-z]\s*(?:\\in\s*\(-\\infty,\\infty\)\s*)?(?:\\mid|\\vert|[|:∣])\s*(.*?)\s*\\?\}")


@dataclass(frozen=True)
class Group:
    """Several values, and the brackets around them."""

    left: str  # "(", "[", "{", or "" for a bare list
    right: str
    items: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        """Tuples, intervals and boxes are; sets and bare lists are not."""
        return self.left in ("(", "[")


def split_top(text: str, separators: str = ",;") -> list[str]:
    """Split at separators outside all brackets; half-open intervals count as balanced."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character in separators and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()]


def read_group(text: str) -> Group | None:
    """A list, set, tuple or interval; None for a single value."""
    if text.count("\\pm") == 1:
        return Group("", "", (text.replace("\\pm", "+").removeprefix("+").strip(), text.replace("\\pm", "-")))
    vector = [cell for row in read_matrix(text) or [] for cell in row] if _is_vector(text) else []
    if vector:
        return Group("(", ")", tuple(vector))
    left, right, inner = _strip_brackets(text.replace("\\{", "{").replace("\\}", "}"))
    if left:
        items = split_top(inner)
        return Group(left, right, tuple(items)) if len(items) > 1 or left == "{" else None
    items = _bare_items(inner)
    return Group("", "", tuple(items)) if len(items) > 1 and all(items) else None


def _strip_brackets(text: str) -> tuple[str, str, str]:
    """Brackets that enclose the whole text, and what is inside; empty ones where there are none."""
    if len(text) < 2 or text[0] not in _BRACKETS or text[-1] not in _BRACKETS.values():
        return "", "", text
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return (text[0], text[-1], text[1:-1].strip()) if index == len(text) - 1 else ("", "", text)
    return "", "", text


def _bare_items(text: str) -> list[str]:
    """Items of a list without brackets; a comma of thousands stays where another separator tells the items apart."""
    joined = _AND.sub(" ; ", text)
    if re.search(r";|,\s", joined):
        joined = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", joined)
    return split_top(joined)


def same_group(gold: Group, answer: Group, same: Same) -> bool:
    """Item by item: in order for tuples and intervals, whose brackets count; in any order for sets and lists."""
    if len(gold.items) != len(answer.items) or len(gold.items) > MAX_ITEMS:
        return False
    in_order = all(same(*pair) for pair in zip(gold.items, answer.items, strict=True))
    if gold.ordered:
        two = len(gold.items) == 2  # a point or an interval: there the brackets carry meaning
        return in_order and (gold.left, gold.right) == (answer.left, answer.right) if two else in_order
    names = {name for item in gold.items if (name := equation_name(item))}
    if in_order or (len(names) > 1 and not all(map(equation_name, answer.items))):
        return in_order
    return _match_any_order(list(gold.items), list(answer.items), same)


def coordinates(group: Group) -> list[str] | None:
    """The values of `x=3, y=-2`; None for any other list."""
    names = [equation_name(item) for item in group.items]
    return [equation_sides(item)[-1] for item in group.items] if names == ["x", "y", "z"][: len(names)] else None


def _match_any_order(gold: list[str], answer: list[str], same: Same) -> bool:
    for item in gold:
        found = next((index for index, other in enumerate(answer) if same(item, other)), None)
        if found is None:
            return False
        del answer[found]
    return not answer


def read_matrix(text: str) -> list[list[str]] | None:
    """Rows of cells of a matrix in any brackets; determinants are not matrices."""
    match = _MATRIX.fullmatch(text.strip("()[] "))
    if match is None:
        return None
    rows = [row for row in match[2].split("\\\\") if row.strip()]
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def _is_vector(text: str) -> bool:
    rows = read_matrix(text)
    return bool(rows) and (len(rows or []) == 1 or all(len(row) == 1 for row in rows or []))


def same_matrix(gold: list[list[str]], answer: list[list[str]], same: Same) -> bool:
    """Cell by cell."""
    if [len(row) for row in gold] != [len(row) for row in answer] or sum(map(len, gold)) > MAX_ITEMS:
        return False
    pairs = [pair for rows in zip(gold, answer, strict=True) for pair in zip(*rows, strict=True)]
    return all(same(*pair) for pair in pairs)


def read_range(text: str) -> tuple[str, tuple[Group, ...]] | None:
    """Intervals of one variable, from inequalities or brackets: its name, or "", and the union's parts."""
    built = _BUILDER.fullmatch(text)
    ranges = [_one_range(part.strip()) for part in _UNION.split(built[1] if built else text)]
    found = [one for one in ranges if one]
    names = {name for name, _ in found if name}
    if len(found) < len(ranges) or len(names) > 1:
        return None
    return next(iter(names), ""), tuple(group for _, group in found)


def _one_range(text: str) -> tuple[str, Group] | None:
    pieces = [piece.strip() for piece in _RELATION.split(text)]
    name = equation_name(text) or ""
    if len(pieces) == 1:
        group = read_group(equation_sides(text)[-1])
        interval = group is not None and group.ordered and len(group.items) == 2
        return (name, _open_at_infinity(group)) if group and interval else None
    if len(pieces) == 3 and is_name(pieces[2]) and not is_name(pieces[0]):
        pieces = [pieces[2], _FLIPPED[pieces[1]], pieces[0]]
    if len(pieces) == 3 and is_name(pieces[0]):
        below = pieces[1] in ("<", "\\le")
        low_to_high = ["-\\infty", "<", pieces[0], pieces[1], pieces[2]]
        pieces = low_to_high if below else [pieces[2], _FLIPPED[pieces[1]], pieces[0], "<", "\\infty"]
    if len(pieces) != 5 or not is_name(pieces[2]):
        return None
    if pieces[1] in (">", "\\ge"):
        pieces = [pieces[4], _FLIPPED[pieces[3]], pieces[2], _FLIPPED[pieces[1]], pieces[0]]
    if not {pieces[1], pieces[3]} <= {"<", "\\le"}:
        return None
    left, right = "(" if pieces[1] == "<" else "[", ")" if pieces[3] == "<" else "]"
    return pieces[2], Group(left, right, (pieces[0], pieces[4]))


_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


def _open_at_infinity(group: Group) -> Group:
    low, high = (item.replace(" ", "").replace("+\\infty", "\\infty") for item in group.items)
    left = "(" if low == "-\\infty" else group.left
    return Group(left, ")" if high == "\\infty" else group.right, (low, high))


def same_range(gold: tuple[str, tuple[Group, ...]], answer: tuple[str, tuple[Group, ...]], same: Same) -> bool:
    """The same intervals in any order; two names must agree, one alone is accepted."""
    names = {name for name in (gold[0], answer[0]) if name}
    rest = list(answer[1])
    for group in gold[1]:
        found = next((index for index, other in enumerate(rest) if same_group(group, other, same)), None)
        if found is None:
            return False
        del rest[found]
    return len(names) < 2 and not rest


def equation_sides(text: str) -> list[str]:
    """The sides of an equation (or of `x \\in ...`); the text alone when it is none. A flipped `3 = x` is turned."""
    sides = [side.strip() for side in _EQUALS.split(text)]
    if len(sides) == 2 and is_name(sides[1]) and not is_name(sides[0]) and read_number(sides[0]):
        sides.reverse()
    return sides


def equation_name(text: str) -> str | None:
    """The name that an equation gives a value to, or None."""
    sides = equation_sides(text)
    return sides[0] if len(sides) > 1 and is_name(sides[0]) else None


def is_name(text: str) -> bool:
    r"""Whether a text can be what an answer is called: x, x_1, AB, \angle ABC, f(x), Area."""
    return len(text) <= 40 and bool(_NAME.fullmatch(text)) and not _NOT_NAMED.search(text)


def read_clock(text: str) -> tuple[tuple[str, ...], str] | None:
    """A clock time or a ratio: its numbers without leading zeros, and "am" or "pm"."""
    match = _CLOCK.fullmatch(text)
    if match is None:
        return None
    fields = [field.strip().lstrip("0") or "0" for field in match[1].split(":")]
    if _AFTERNOON.fullmatch(match[1]):
        return (str(int(fields[0]) - 12), *fields[1:]), "p"
    return (*fields, "0")[: max(2, len(fields))], (match[2] or "").lower()[:1]


def read_ratio(text: str) -> tuple[int, int] | None:
    """`2:3`, `2/3`, as its two numbers."""
    match = _RATIO.fullmatch(text)
    return (int(match[1] or match[3]), int(match[2] or match[4])) if match and len(text) < 40 else None


def read_hyphened(text: str) -> tuple[int, ...] | None:
    """A range, a score or a date, which are no differences: 10-15, 2019-03-14, 12/25/2020."""
    return tuple(map(int, re.findall(r"\d+", text))) if len(text) < 40 and _HYPHENED.fullmatch(text) else None
