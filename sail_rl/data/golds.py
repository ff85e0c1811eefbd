"""The right answers of a source: checked when rows are loaded, so that a bad one is not met as a reward of zero."""

from collections.abc import Mapping
from typing import Any

from rewards.accuracy import gold_text
from rewards.gold import check_golds, gold_problem, gold_type
from rewards.ladder import Row
from sail_rl.data.images import BadRow

MOST_BAD_GOLDS = 0.05  # share of a source's rows; these are left out, above it the run stops
_PREFIX = "the right answer cannot be compared with: "


def gold_row(row: Mapping[str, Any]) -> Row:
    """What a row (after column mapping) says of its right answer."""
    gold = gold_text(row.get("answer")) or gold_text(row.get("solution"))
    return Row(gold, row.get("answer_type"), row.get("options"), row.get("tolerance"))


def fixed_type(row: Mapping[str, Any]) -> str:
    """The row's own answer type, or the one that its gold shows; raises BadRow for a gold that is of no use."""
    gold = gold_row(row)
    problem = gold_problem(gold)
    if problem:
        raise BadRow(_PREFIX + problem)
    return gold.answer_type or gold_type(gold)


def bad_golds(rows: Mapping[int, Row]) -> list[tuple[int, str]]:
    """The rows whose golds fail, by their numbers: found by comparing each with itself, algebra included."""
    return [
        (index, _PREFIX + problem)
        for index, problem in zip(rows, check_golds(list(rows.values())), strict=True)
        if problem
    ]


def is_gold_reason(reason: str) -> bool:
    """Whether a row was left out for its gold."""
    return reason.startswith(_PREFIX)
