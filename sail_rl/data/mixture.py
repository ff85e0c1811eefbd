"""Several sources as one: whose row stands where. All of it follows from the position, so one number resumes it."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from math import floor
from typing import Any

import numpy as np

from sail_rl.command_line import BadInput
from sail_rl.config_data import PictureSource, Source
from sail_rl.data.benchmarks import BenchmarkRows
from sail_rl.data.sources import Rows, open_rows
from sail_rl.data.streamed import ENDLESS, StreamedRows


@dataclass(frozen=True)
class Part:
    """A source and how its rows are to be read."""

    rows: Rows
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our column name -> the source's."""
    kind: str | None = None
    """Of all its rows; None where they say it themselves, or need not."""

    @property
    def name(self) -> str:
        """Unlike that of the same source read as another kind: what is a bad row for one may be good for the other."""
        return self.rows.name if self.kind is None else f"{self.rows.name} ({self.kind})"

    def row(self, number: int) -> Mapping[str, Any]:
        """The raw row, of the source's kind."""
        row = self.rows.row(number)
        return row if self.kind is None else {**row, "kind": self.kind}


class JoinedRows:
    """The rows of one source or several, numbered through."""

    def __init__(self, parts: Sequence[Part], weights: Sequence[float] | None = None):
        self.parts = parts
        self.weights = weights
        """How often each part is drawn from, relative to the others; None: each row once in every pass."""
        self.starts = list(accumulate((len(part.rows) for part in parts), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def streamed(self) -> bool:
        """Whether some rows come in their order only."""
        return any(isinstance(part.rows, StreamedRows) for part in self.parts)

    @property
    def name(self) -> str:
        return ", ".join(part.name for part in self.parts)

    def locate(self, index: int) -> tuple[Part, int]:
        """The part that a row belongs to, and its number there."""
        place = bisect_right(self.starts, index) - 1
        return self.parts[place], index - self.starts[place]

    def row_name(self, index: int) -> str:
        """For messages: rows are counted from 1."""
        part, number = self.locate(index)
        return f"row {number + 1} of {part.name}"


def open_sources(sources: Sequence[Source], columns: Mapping[str, str], split: str, key: str) -> JoinedRows:
    """The sources of `data.train` or `data.eval` (`key`), opened."""
    parts = []
    for number, source in enumerate(sources):
        rows: Rows = open_rows(source, split, f"{key}.{number}" if len(sources) > 1 else key)
        mapped = columns if source.columns is None else source.columns
        if not isinstance(source, PictureSource) and source.benchmark:
            rows, mapped = BenchmarkRows(rows, source.benchmark), {}
        # The kind that the recipe names stands above a column that would say it.
        mapped = {ours: theirs for ours, theirs in mapped.items() if source.kind is None or ours != "kind"}
        parts.append(Part(rows, mapped, source.kind))
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights and len(parts) > 1 and any(len(part.rows) >= ENDLESS for part in parts):
        raise BadInput(f"{key}: one of the sources has no end; give it `rows`, or give each source a `weight`")
    return JoinedRows(parts, weights or None)


class Passes:
    """Endless passes over rows 0 to length - 1, each in another order if they are shuffled."""

    def __init__(self, length: int, seed: tuple[int, ...], shuffle: bool):
        self.length, self.seed = length, seed
        self.shuffle = shuffle and length < ENDLESS
        self._order: tuple[int, np.ndarray] | None = None

    def row_at(self, position: int) -> int:
        """The row at a position."""
        number, offset = divmod(position, self.length)
        if not self.shuffle:
            return offset
        if self._order is None or self._order[0] != number:
            self._order = (number, np.random.default_rng((*self.seed, number)).permutation(self.length))
        return int(self._order[1][offset])


class Blocks:
    """The rows of a stream, each block of neighbours in another order: all that a window in memory allows."""

    def __init__(self, size: int, seed: tuple[int, ...]):
        self.size = size
        self._block = Passes(size, seed, shuffle=True)

    def row_at(self, position: int) -> int:
        """The row at a position."""
        return position - position % self.size + self._block.row_at(position)


class Draws:
    """Rows of several parts, each drawn from by its weight, and every part in endless passes of its own."""

    def __init__(self, rows: JoinedRows, weights: Sequence[float], seed: int, shuffle: bool):
        self.starts = rows.starts
        self.shares = shares_of_rest(weights)
        self.passes = [order_of(part.rows, (seed, number), shuffle) for number, part in enumerate(rows.parts)]

    def row_at(self, position: int) -> int:
        """The row at a position."""
        part, turn = draw(position, self.shares)
        return self.starts[part] + self.passes[part].row_at(turn)


def shares_of_rest(weights: Sequence[float]) -> list[Fraction]:
    """Of each part, its share of what the parts before it leave; 1 for the last. Exact, so that counts never drift."""
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact[number:]) for number, weight in enumerate(exact)]


def draw(position: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """Whose turn a position is, and how many turns that part had before; the parts alternate as evenly as they can."""
    for part, share in enumerate(shares):
        before = floor(position * share)
        if floor((position + 1) * share) > before:
            return part, before
        position -= before
    raise AssertionError("the last part takes whatever is left")


def order_of(rows: Rows, seed: tuple[int, ...], shuffle: bool) -> Passes | Blocks:
    """In which order the rows of one source are read."""
    if isinstance(rows, StreamedRows):
        return Blocks(rows.window if shuffle else 1, seed)
    return Passes(len(rows), seed, shuffle)


def make_order(rows: JoinedRows, seed: int, shuffle: bool) -> Passes | Blocks | Draws:
    """In which order rows are read."""
    if rows.weights is None:
        return (
            order_of(rows.parts[0].rows, (seed,), shuffle)
            if len(rows.parts) == 1
            else Passes(len(rows), (seed,), shuffle)
        )
    return Draws(rows, rows.weights, seed, shuffle)
