"""The right answer of a row, looked at when data is loaded: its type, and whether an answer can be compared with it."""

import re
from collections.abc import Mapping, Sequence
from functools import partial

from rewards import structure
from rewards.algebra_pool import settle
from rewards.choices import read_choice, read_options, resolve
from rewards.ladder import Row, allowed, compare, hyphened, is_choice, is_number, is_words, split_quantity, type_of
from rewards.notation import MAX_LENGTH, clean, squash, text_key
from rewards.numbers import read_number
from rewards.similarity import read_boxes
from rewards.symbolic import Algebra, refused, symbols
from rewards.verdict import Outcome

_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def gold_type(row: Row) -> str:
    """The type that answers are compared by, from the row's own word or from the gold itself.

    One of choice, number, unit, text, list (sets, tuples, intervals and matrices too), equation, expression, box, ocr.
    """
    kind = type_of(row.answer_type)
    if kind in ("box", "ocr"):
        return kind
    if len(row.gold) > MAX_LENGTH:
        return "text"
    gold = clean(row.gold)
    if is_choice(gold, kind, read_options(row.options), lambda left, right: squash(left) == squash(right)):
        return "choice"
    if kind == "text":
        return kind
    if kind != "number" and hyphened(gold):
        return "text"
    if kind == "number" or is_number(gold):
        return "unit" if split_quantity(gold)[1].powers else "number"
    if structure.read_clock(gold):
        return "text"
    if structure.read_matrix(gold) or structure.read_range(gold) or structure.read_group(gold):
        return "list"
    return "text" if is_words(gold) else "equation" if "=" in gold else "expression"


def gold_problem(row: Row) -> str | None:
    """What is wrong with a gold, as far as can be seen without algebra; None for one that can be compared with."""
    if problem := _column_problem(row):
        return problem
    try:
        kind, _ = type_of(row.answer_type), allowed(row.tolerance)
    except ValueError as error:
        return str(error)
    if not row.gold:
        return "it is empty"
    if kind == "box" and not read_boxes(row.gold):
        return f"{shown(row.gold)} is no box of four numbers"
    if kind in ("box", "ocr") or len(row.gold) > MAX_LENGTH:
        return None
    gold = clean(row.gold)
    if not text_key(gold):
        return f"{shown(row.gold)} says nothing"
    return _choice_problem(gold, kind, row) or _text_problem(gold, gold_type(row))


def _column_problem(row: Row) -> str | None:
    """Data may hold anything in the columns beside the gold."""
    if not isinstance(row.answer_type, str | None):
        return f"`answer_type` must be text, not {type(row.answer_type).__name__}"
    if not isinstance(row.options, Sequence | Mapping | None):
        return f"`options` must be a list of texts, not {type(row.options).__name__}"
    if not isinstance(row.tolerance, Mapping | None):
        return f"`tolerance` must be like {{relative: 0.05}}, not {type(row.tolerance).__name__}"
    sizes = [size for size in (row.tolerance or {}).values() if not isinstance(size, int | float | None)]
    return f"`tolerance` holds {sizes[0]!r}, which is no number" if sizes else None


def _choice_problem(gold: str, kind: str, row: Row) -> str | None:
    letters = read_options(row.options)
    named = resolve(gold, letters, lambda left, right: squash(left) == squash(right)) if letters else None
    choice = read_choice(gold)
    if letters and kind in ("choice", "inferred") and named is None and choice and not choice.content:
        return f"{shown(gold)} is none of the {len(letters)} options"
    if kind == "choice" and named is None and choice is None:
        return f"{shown(gold)} names no option"
    return None


def _text_problem(gold: str, kind: str) -> str | None:
    if kind in ("choice", "text"):
        return None
    if not _balanced(gold):
        return f"the braces of {shown(gold)} do not match"
    if kind in ("number", "unit") and not (is_number(gold) or "=" in gold or structure.read_clock(gold)):
        return f"{shown(gold)} cannot be read as a number"
    if refused(gold) and not (is_number(gold) and not symbols(gold) and _exact(gold)):
        return f"{shown(gold)} would keep symbolic algebra busy for too long"
    return None


def _exact(gold: str) -> bool:
    return read_number(split_quantity(gold)[0]) is not None


def _balanced(text: str) -> bool:
    depth = 0
    for token in _BRACES.findall(text):
        depth += (token == "{") - (token == "}")
        if depth < 0:
            return False
    return depth == 0


def check_golds(rows: Sequence[Row]) -> list[str | None]:
    """What is wrong with each gold, algebra included: every one is compared with itself, all of them together."""
    problems = [gold_problem(row) for row in rows]
    good = [index for index, problem in enumerate(problems) if problem is None]
    verified = settle([partial(verify_itself, rows[index]) for index in good])
    for index, problem in zip(good, verified, strict=True):
        problems[index] = problem
    return problems


def verify_itself(row: Row, algebra: Algebra) -> str | None:
    """Compare a gold with itself; expressions and equations by algebra, since the same spelling would pass unread."""
    right = compare(row, row.gold, algebra) >= 1
    if right and gold_type(row) in ("expression", "equation"):
        algebra.same(clean(row.gold), clean(row.gold))  # one that only its own spelling can match is kept, as a text
    late = {Outcome.REFUSED, Outcome.TIMEOUT} & algebra.problems
    if late:
        return f"{shown(row.gold)} would keep symbolic algebra busy for too long"
    return None if right else f"{shown(row.gold)} does not equal itself"


def shown(gold: str) -> str:
    """A gold in a message."""
    return repr(gold if len(gold) <= 60 else gold[:60] + "…")
