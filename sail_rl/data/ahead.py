"""Rows on their way from a source to the trainer: how one is prepared, and which are prepared ahead of need."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sail_rl.data.example import make_example
from sail_rl.data.mixture import JoinedRows
from sail_rl.data.workers import Workers

Item = TypeVar("Item")


@dataclass(frozen=True)
class RowLoader(Generic[Item]):
    """Prepares rows, here or in a worker. What it gives depends on position and row alone, not on when it is asked."""

    rows: JoinedRows
    prepare: Callable[[Any, int], Item]
    """From an example and its position to the item."""
    video_frames: int
    compared: bool = False
    """Completions are compared with the right answer, so its type is fixed."""

    def load(self, position: int, index: int) -> Item:
        """The item of a row, its pictures decoded; raises BadRow."""
        part, number = self.rows.locate(index)
        row, folder, name = part.row(number), part.rows.folder, f"row {number + 1}"
        example = make_example(row, name, part.columns, folder, self.video_frames, self.compared)
        return self.prepare(example, position)

    def row_name(self, index: int) -> str:
        """For messages."""
        return self.rows.row_name(index)


class Ahead(Generic[Item]):
    """Items that workers prepare, by position. Not state: whatever is forgotten here is prepared again when needed."""

    def __init__(self, workers: Workers, loader: RowLoader[Item]):
        self._workers = workers
        self._source = workers.add(loader)
        self._coming: dict[int, Future] = {}

    def expect(self, places: Sequence[tuple[int, int]]) -> None:
        """Have these (position, row number) prepared, first ones first, and forget all others."""
        wanted = dict(places)
        for position in self._coming.keys() - wanted.keys():
            self._coming.pop(position).cancel()
        for position, index in wanted.items():
            if position not in self._coming:
                self._coming[position] = self._workers.submit(self._source, position, index)

    def take(self, position: int) -> Item:
        """The item of an expected position, waited for; raises what preparing it has raised."""
        return self._coming.pop(position).result()
