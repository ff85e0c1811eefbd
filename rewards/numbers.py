"""Numbers as they are written: integers, decimals, percents, fractions, mixed numbers, powers, all exact.

A small reader of rational arithmetic: it never builds a number of more than `MAX_BITS` bits and returns None for
everything that it does not know, so that roots, letters and pi go on to the symbolic comparison.
"""

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import factorial

from rewards.number_words import spelled

MAX_BITS = 13_000  # under 4,300 decimal digits, where Python refuses to print an integer
MAX_EXPONENT = 400  # of scientific notation
MAX_DEPTH = 12
SIGNIFICANT_DIGITS = 6

_GROUPED = r"[1-9]\d{0,2}(?:,\d{3})+(?!\d)(?:\.\d+)?|[1-9]\d{0,2}(?: \d{3})+(?!\d)(?:\.\d+)?"
_LITERAL = re.compile(rf"(?:{_GROUPED}|\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+(?![\d.]))?")
_SIGNED = re.compile(rf"[+-]?\s*({_LITERAL.pattern})")
_TOKEN = re.compile(rf"\s*({_LITERAL.pattern}|\\frac|[-+*/^!(){{}}])")
_DECIMAL_COMMA = re.compile(r"([+-]?)(\d{1,3}(?:\.\d{3})+|\d+),(\d+)")
_PERCENT = re.compile(r"\s*(?:%|per\s?cent|pct)$", re.IGNORECASE)
_MIXED = re.compile(r"([+-]?\s*)(\d+)\s*(?:\\frac\{(\d+)\}\{(\d+)\}|(?<=\s)(\d+)\s*/\s*(\d+))")


@dataclass(frozen=True)
class Number:
    """An exact value, with how it was written."""

    value: Fraction
    digits: int = 0  # significant digits when written as one decimal, else 0
    percent: bool = False  # a percent sign followed; `value` is the number in front of it

    @property
    def whole(self) -> bool:
        """An exact integer: those are never compared by rounding."""
        return self.digits == 0 and self.value.denominator == 1


def read_number(text: str) -> Number | None:
    """The number that a cleaned text writes, or None when it is anything else."""
    text = text.strip()
    bare = _PERCENT.sub("", text).removeprefix("百分之")
    percent = bare != text
    bare = spelled(bare) or bare
    if literal := _SIGNED.fullmatch(bare):
        value = _literal(literal[1])
    else:
        value = _decimal_comma(bare) or _mixed(bare) or _evaluate(bare)
        literal = _DECIMAL_COMMA.fullmatch(bare)
    if value is None:
        return None
    sign = -1 if literal and bare.startswith("-") else 1
    return Number(sign * value, _significant(bare) if literal else 0, percent)


def _literal(text: str) -> Fraction | None:
    """A literal without sign, thousands separators and an exponent allowed."""
    mantissa, _, exponent = text.replace(",", "").replace(" ", "").lower().partition("e")
    if len(exponent) > 5 or abs(int(exponent or "0")) > MAX_EXPONENT or len(mantissa) > MAX_EXPONENT:
        return None
    return Fraction(mantissa) * Fraction(10) ** int(exponent or "0")


def _decimal_comma(text: str) -> Fraction | None:
    """`2,50` and `1.234,5`; three digits after a single comma are thousands, unless the number starts with 0."""
    match = _DECIMAL_COMMA.fullmatch(text)
    if match is None or (len(match[3]) == 3 and "." not in match[2] and not match[2].startswith("0")):
        return None
    return _literal(match[2].replace(".", "") + "." + match[3])


def _mixed(text: str) -> Fraction | None:
    r"""`2 1/2` and `2\frac{1}{2}`: a sum, not a product."""
    match = _MIXED.fullmatch(text)
    top, bottom = (int(match[3] or match[5]), int(match[4] or match[6])) if match and len(text) < 60 else (0, 0)
    if match is None or not 0 < top < bottom:
        return None
    return (int(match[2]) + Fraction(top, bottom)) * (-1 if match[1].startswith("-") else 1)


def _significant(text: str) -> int:
    """Significant digits of a decimal literal; 0 when it has neither a point nor an exponent."""
    mantissa = text.lower().partition("e")[0].lstrip("+- ")
    if not re.search(r"[.eE]", text) and not _DECIMAL_COMMA.fullmatch(text):
        return 0
    return len(re.sub(r"\D", "", mantissa).lstrip("0"))


def _evaluate(text: str) -> Fraction | None:
    """Rational arithmetic with + - * / ^ ! \\frac, brackets and implied products."""
    tokens: deque[str] = deque()
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        tokens.append(match[1])
        position = match.end()
    value = _sum(tokens, 0) if tokens else None
    return None if tokens else value


def _sum(tokens: deque[str], depth: int) -> Fraction | None:
    total = _product(tokens, depth)
    while total is not None and tokens and tokens[0] in "+-":
        sign = -1 if tokens.popleft() == "-" else 1
        term = _product(tokens, depth)
        total = None if term is None else _bounded(total + sign * term)
    return total


def _product(tokens: deque[str], depth: int) -> Fraction | None:
    total = _factor(tokens, depth)
    while total is not None and tokens and tokens[0] not in ("+", "-", ")", "}"):
        operator = tokens.popleft() if tokens[0] in "*/" else "implied"
        if operator == "implied" and tokens[0][0].isdigit():  # "2 3" is no product
            return None
        factor = _factor(tokens, depth)
        if factor is None or (operator == "/" and factor == 0):
            return None
        total = _bounded(total / factor if operator == "/" else total * factor)
    return total


def _factor(tokens: deque[str], depth: int) -> Fraction | None:
    if tokens and tokens[0] in "+-":
        sign = -1 if tokens.popleft() == "-" else 1
        value = _factor(tokens, depth + 1) if depth < MAX_DEPTH else None
        return None if value is None else sign * value
    base = _atom(tokens, depth)
    if base is not None and tokens and tokens[0] == "!":
        tokens.popleft()
        base = Fraction(factorial(base.numerator)) if base.denominator == 1 and 0 <= base < 1000 else None
    if base is None or not tokens or tokens[0] != "^":
        return base
    tokens.popleft()
    exponent = _factor(tokens, depth + 1) if depth < MAX_DEPTH else None
    return None if exponent is None else _power(base, exponent)


def _atom(tokens: deque[str], depth: int) -> Fraction | None:
    if not tokens or depth > MAX_DEPTH:
        return None
    token = tokens.popleft()
    if token == "\\frac":
        top, bottom = _atom(tokens, depth + 1), _atom(tokens, depth + 1)
        return None if top is None or not bottom else _bounded(top / bottom)
    if token not in "({":
        return _literal(token) if token[0].isdigit() or token[0] == "." else None
    value = _sum(tokens, depth + 1)
    closed = bool(tokens) and tokens.popleft() == {"(": ")", "{": "}"}[token]
    return value if closed else None


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or bits * abs(exponent) > MAX_BITS or (base == 0 and exponent <= 0):
        return None
    return base**exponent.numerator


def _bounded(value: Fraction) -> Fraction | None:
    bits = max(value.numerator.bit_length(), value.denominator.bit_length())
    return value if bits <= MAX_BITS else None


def agree(gold: Number, answer: Number, tolerance: Mapping[str, float] | None = None) -> bool:
    """Whether two numbers are the same: exactly, to 6 digits of a long decimal, or within the row's tolerance.

    Where just one side is a percent, the other may be written either way: 25% is 25 and is 0.25.
    """
    scales = (Fraction(1), Fraction(1, 100)) if gold.percent != answer.percent else (Fraction(1),)
    pairs = [
        (gold.value * scale, answer.value) if gold.percent else (gold.value, answer.value * scale) for scale in scales
    ]
    return any(_close(*pair, tolerance) or _same_digits(*pair, gold, answer) for pair in pairs)


def _close(gold: Fraction, answer: Fraction, tolerance: Mapping[str, float] | None) -> bool:
    sizes = tolerance or {}
    relative, absolute = (Fraction(str(sizes.get(name, 0))) for name in ("relative", "absolute"))
    return abs(gold - answer) <= max(relative * abs(gold), absolute)


def _same_digits(first: Fraction, second: Fraction, gold: Number, answer: Number) -> bool:
    """Whether the two differ by at most half a unit of the sixth significant digit."""
    if gold.whole or answer.whole or max(gold.digits, answer.digits) < SIGNIFICANT_DIGITS:
        return False
    size = abs(first)
    exponent = len(str(size.numerator)) - len(str(size.denominator))
    exponent -= size < Fraction(10) ** exponent
    return 2 * abs(first - second) <= Fraction(10) ** (exponent - SIGNIFICANT_DIGITS + 1)
