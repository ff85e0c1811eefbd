"""Conciseness reward: of a group's right answers, the shorter ones earn more. The whole completion is counted, so that
reasoning moved behind the think block gains nothing.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

# By shape: the least that a right answer can get, less the most that a wrong one can get.
LEAD_OF_RIGHT = {"group": -1.0, "cosine": 1.0, "overlong": -1.0}
LEAST_SPREAD = 0.1  # of the median; right answers of about one length are not told apart
COSINE_RIGHT, COSINE_WRONG = (1.0, 0.5), (-1.0, -0.5)  # at no length and at full length, as in TRL


def conciseness_reward(
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    score_accuracy: Sequence[float | None],
    group_size: int,
    finish_reason: Sequence[str | None] | None = None,
    shape: str = "group",
    least_unit: int = 256,
    max_length: int | None = None,
    cache_length: int | None = None,
    **columns: Any,
) -> list[float]:
    """A number from -1 to 1 for each completion, by its number of tokens.

    `shape` is "group" (right answers against the median of the group's right ones, in units of that median or of
    `least_unit` tokens if that is more; 0 for wrong and cut off ones), "cosine" (TRL's, from 1 down to 0.5 at
    `max_length` for right answers, from -1 up to -0.5 for wrong ones) or "overlong" (DAPO's, 0 falling to -1 over the
    last `cache_length` tokens before `max_length`, right or not).
    """
    lengths = [len(ids) for ids in completion_ids]
    reasons = finish_reason or [None] * len(completions)
    rows = zip(score_accuracy, reasons, strict=True)
    right = [value is not None and value >= 1 and reason != "length" for value, reason in rows]
    if shape == "group":
        parts = [slice(start, start + group_size) for start in range(0, len(lengths), group_size)]
        for part in parts:
            if None in score_accuracy[part]:  # who may be right cannot be compared with
                right[part] = [False] * len(right[part])
        return [value for part in parts for value in against_group(lengths[part], right[part], least_unit)]
    if max_length is None:
        raise ValueError(f"conciseness: shape {shape!r} needs max_length")
    if shape == "cosine":
        return [cosine(length, max_length, good) for length, good in zip(lengths, right, strict=True)]
    if shape == "overlong":
        return [overlong(length, max_length, cache_length or max_length // 4) for length in lengths]
    raise ValueError(f"conciseness: shape is {shape!r}; allowed are {', '.join(LEAD_OF_RIGHT)}")


def against_group(lengths: Sequence[int], right: Sequence[bool], least_unit: int) -> list[float]:
    """One group. All 0 where fewer than half, or fewer than two, are right: being right comes first."""
    counted = [length for length, good in zip(lengths, right, strict=True) if good]
    if len(counted) < max(2, len(lengths) / 2):
        return [0.0] * len(lengths)
    middle = median(counted)
    if max(counted) - min(counted) < LEAST_SPREAD * middle:
        return [0.0] * len(lengths)
    unit = max(middle, least_unit)
    pairs = zip(lengths, right, strict=True)
    return [max(-1.0, min(1.0, (middle - length) / unit)) if good else 0.0 for length, good in pairs]


def cosine(length: int, max_length: int, right: bool) -> float:
    """Half a cosine between the values at no length and at full length; beyond that it stays."""
    first, last = COSINE_RIGHT if right else COSINE_WRONG
    return last + (first - last) * (1 + math.cos(math.pi * min(length / max_length, 1.0))) / 2


def overlong(length: int, max_length: int, cache_length: int) -> float:
    """0 up to `cache_length` tokens before the end, then a straight line to -1."""
    return -min(1.0, max(0.0, (length - (max_length - cache_length)) / cache_length))
