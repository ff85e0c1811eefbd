"""Symbolic algebra by math-verify, for worker processes alone: whoever calls these has to be killable.

math-verify's own time limit is an alarm that other code can cancel, so it is switched off; the worker sets the limits.
"""

import logging
from fractions import Fraction
from typing import Any

import math_verify
from latex2sympy2_extended import NormalizationConfig

from rewards.symbolic import Question, parser_spelling

logging.getLogger("math_verify").setLevel(logging.CRITICAL)

# Units are gone by now; its own list of them would read 2ab as 2.
_NORMALIZATION = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="all", equations=False)
_EXTRACTION = [math_verify.LatexExtractionConfig(boxed_match_priority=0, normalization_config=_NORMALIZATION)]


def answer_question(question: Question) -> bool | Fraction | None:
    """What math-verify says; None where it cannot read a text, or raises, as sympy may on strange input."""
    try:
        return (same if question.kind == "same" else value)(*map(parser_spelling, question.texts))
    except Exception:
        return None


def same(gold: str, answer: str) -> bool | None:
    """Whether two expressions are equal; None where the gold cannot be read."""
    parsed_gold, parsed_answer = read(gold), read(answer)
    if not parsed_gold:
        return None
    return bool(parsed_answer) and bool(math_verify.verify(parsed_gold, parsed_answer, timeout_seconds=None))


def value(text: str) -> Fraction | None:
    """The value of a constant to 15 digits."""
    parsed = read(text)
    number = parsed[0].evalf(15) if parsed else None
    return Fraction(str(number)) if number is not None and number.is_Float and number.is_finite else None


def read(text: str) -> list[Any]:
    """The text as math-verify parses it; empty where it cannot."""
    return math_verify.parse(rf"\boxed{{{text}}}", _EXTRACTION, fallback_mode="no_fallback", parsing_timeout=None)


def by_math_verify(gold: str, answer: str) -> bool:
    """math-verify's own judgement of a boxed answer, as it comes: for comparison with ours."""
    parsed = [math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
    return bool(math_verify.verify(*parsed, timeout_seconds=None))
