"""Which prompts are worth asking: those whose group is likely to have some right answers and some wrong ones.

A prompt's difficulty is its running pass rate p, measured on its own completions. When its turn comes, it is asked with
the probability that a group of G would differ, 1 - p^G - (1 - p)^G, but at least with `least_share`, so that what was
too hard, or known, is looked at again. What has no rate yet is always asked.
"""

import random
from collections.abc import Sequence

NEWEST = 0.5  # what the newest group counts in a running rate


class Curriculum:
    """Running pass rates by row. All that it decides follows from these, the seed and the position."""

    def __init__(self, group_size: int, least_share: float, seed: int):
        self.group_size, self.least_share, self.seed = group_size, least_share, seed
        self.rates: dict[int, float] = {}

    def wants(self, position: int, row: int) -> bool:
        """Whether the row is asked at this position."""
        return random.Random(f"{self.seed}/{position}/ask").random() < self.probability(row)

    def probability(self, row: int) -> float:
        """That the row is asked in its turn."""
        rate = self.rates.get(row)
        if rate is None:
            return 1.0
        return max(1 - rate**self.group_size - (1 - rate) ** self.group_size, self.least_share)

    def note(self, rows: Sequence[int], passes: Sequence[float | None]) -> None:
        """What the groups of these rows have passed; completions without a verdict do not count."""
        for number, row in enumerate(rows):
            group = passes[number * self.group_size : (number + 1) * self.group_size]
            known = [value for value in group if value is not None]
            if known:
                rate, before = sum(known) / len(known), self.rates.get(row)
                self.rates[row] = rate if before is None else NEWEST * rate + (1 - NEWEST) * before
