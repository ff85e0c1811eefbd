"""Rows of a dataset that is read while it arrives, without a copy on disk: in order, through a window."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sail_rl.command_line import BadInput

ENDLESS = 2**31


class StreamedRows:
    """A `datasets` stream, over and over. A row's number counts from the first one of the first pass.

    Rows near the last one read are at hand; a resumed run reads on to its place, and drops what it passes undecoded.
    """

    folder = Path()
    checked_at_start = 0

    def __init__(self, name: str, dataset, window: int):
        self.name, self.window = name, window
        self.dataset = dataset.with_format("arrow")  # pictures stay bytes, and a row that is passed is never unpacked
        self._restart()

    def __len__(self) -> int:
        return ENDLESS

    def row(self, index: int) -> Mapping[str, Any]:
        if index < self._first:
            self._restart()
        while index >= self._end:
            self._read_on(keep=index - 2 * self.window)
        start = self._first
        for table in self._tables:
            if index < start + len(table):
                return table.slice(index - start, 1).to_pylist()[0]
            start += len(table)
        raise AssertionError("the window holds the row")

    def _restart(self) -> None:
        """Go back to the first row."""
        self._coming = self._passes()
        self._tables: list[Any] = []
        self._first = self._end = 0

    def _read_on(self, keep: int) -> None:
        """Take in the next rows, and let go of those before `keep`."""
        table = next(self._coming)
        self._tables.append(table)
        self._end += len(table)
        while self._tables and self._first + len(self._tables[0]) <= keep:
            self._first += len(self._tables.pop(0))

    def _passes(self) -> Iterator[Any]:
        """The rows as tables of at most a window, in endless passes."""
        while True:
            found = 0
            for table in self.dataset.iter(batch_size=self.window):
                found += len(table)
                yield table
            if not found:
                raise BadInput(f"{self.name}: there are no rows in it")
