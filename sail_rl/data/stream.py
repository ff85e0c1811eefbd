"""The order of rows: shuffled by seed, resumable by one number, the same on every process, without bad rows."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from sail_rl.command_line import BadInput
from sail_rl.data.ahead import Ahead, RowLoader
from sail_rl.data.example import check_row, image_column, rename_columns, video_column
from sail_rl.data.golds import MOST_BAD_GOLDS, bad_golds, gold_row, is_gold_reason
from sail_rl.data.images import IMAGE_ERRORS, BadRow, open_image
from sail_rl.data.sources import ENDLESS, Rows
from sail_rl.data.videos import check_video
from sail_rl.data.workers import Workers

Item = TypeVar("Item")
MISTAKES_SHOWN = 20


@dataclass(frozen=True)
class Shard:
    """This process's part of the work."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[list[Any]], list[Any]] = list
    """The lists of all processes, joined in the order of their ranks."""

    def slice(self, items: list[Any]) -> list[Any]:
        """This process's contiguous share."""
        share = len(items) // self.world_size
        return items[self.rank * share : (self.rank + 1) * share]


class RowStream(Generic[Item]):
    """An endless stream of prepared rows. `position` is all of its state.

    With workers, while the trainer uses the items of one call those of the next are prepared: items, order and bad rows
    are the same as without.
    """

    def __init__(
        self,
        rows: Rows,
        prepare: Callable[[Any, int], Item],
        *,
        columns: dict[str, str],
        seed: int,
        shuffle: bool,
        max_bad_rows: int,
        quarantine_file: Path | None,
        shard: Shard,
        video_frames: int = 16,
        workers: Workers | None = None,
        one_pass: bool = False,
        compared: bool = False,
    ):
        self.rows, self.columns = rows, columns
        self.loader = RowLoader(rows, prepare, columns, video_frames, compared)
        self.ahead = Ahead(workers, self.loader) if workers else None
        self.one_pass = one_pass  # the next call after the last row begins anew: prepare nothing beyond it
        self.seed, self.shuffle, self.max_bad_rows = seed, shuffle, max_bad_rows
        self.quarantine_file, self.shard = quarantine_file, shard
        self.position = 0
        self.bad_rows: dict[int, str] = self._known_bad_rows()
        self._order: tuple[int, np.ndarray] | None = None

    def check_rows(self) -> None:
        """Find at once all rows that lack something, without decoding pictures; larger sources are checked as read."""
        bad, golds = [], {}
        for index in range(min(len(self.rows), self.rows.checked_at_start)):
            try:
                row = rename_columns(self.rows.row(index), self.columns)
                check_row(row)
                for image in image_column(row):
                    open_image(image, self.rows.folder)
                for video in video_column(row):
                    check_video(video, self.rows.folder)
            except (BadRow, *IMAGE_ERRORS) as error:
                bad.append((index, reason_of(error)))
            else:
                golds[index] = gold_row(row)
        self._quarantine(bad + (bad_golds(golds) if self.loader.compared else []))

    def next_items(self, count: int) -> list[Item]:
        """This process's share of the next `count` good rows."""
        wanted = [self._next_index() for _ in range(count)]
        loaded: dict[int, Item] = {}
        while True:
            bad = []
            missing = [(place, index) for place, index in self.shard.slice(wanted) if place not in loaded]
            if self.ahead:
                self.ahead.expect(missing + self._next_call(count))
            for position, index in missing:
                try:
                    loaded[position] = self.ahead.take(position) if self.ahead else self.loader.load(position, index)
                except BadRow as error:
                    bad.append((index, str(error)))
            bad = self.shard.gather(bad)
            if not bad:
                return [loaded[position] for position, _ in self.shard.slice(wanted)]
            self._quarantine(bad)
            # Every process replaces the same rows, so that all stay at one position.
            wanted = [self._next_index() if index in self.bad_rows else (place, index) for place, index in wanted]

    def _next_call(self, count: int) -> list[tuple[int, int]]:
        """This process's share of what another call would want if no row turned out to be bad."""
        position = self.position
        coming = self.shard.slice([self._next_index() for _ in range(count)])
        self.position = position
        return [(place, index) for place, index in coming if not self.one_pass or place < len(self.rows)]

    def _next_index(self) -> tuple[int, int]:
        """(position, row number) of the next row that is not known to be bad."""
        if len(self.bad_rows) >= len(self.rows):
            raise BadInput(f"{self.rows.name}: no usable row is left")
        while True:
            epoch, offset = divmod(self.position, len(self.rows))
            index = int(self._permutation(epoch)[offset]) if self.shuffle and len(self.rows) < ENDLESS else offset
            self.position += 1
            if index not in self.bad_rows:
                return self.position - 1, index

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.rows)))
        return self._order[1]

    def _quarantine(self, bad: list[tuple[int, str]]) -> None:
        """Set rows aside; stop when there are more than `data.max_bad_rows`, or too many bad right answers."""
        bad = [(i, why) for i, why in dict(bad).items() if i not in self.bad_rows]
        self.bad_rows.update(bad)
        if self.quarantine_file and self.shard.rank == 0 and bad:
            self._record(self.quarantine_file, bad)
        if limit := self._limit_passed(self.bad_rows):
            raise BadInput(
                f"{self.rows.name}: {len(self.bad_rows)} rows cannot be used, and {limit}:\n"
                + self._listed(self.bad_rows)
            )
        golds = {i: why for i, why in bad if is_gold_reason(why)}
        if golds and self.shard.rank == 0:
            print(f"warning: {self.rows.name}: {len(golds)} rows left out:\n{self._listed(golds)}", file=sys.stderr)

    def _limit_passed(self, bad_rows: dict[int, str]) -> str | None:
        """Which limit these rows pass, in words; right answers have one of their own."""
        golds = sum(map(is_gold_reason, bad_rows.values()))
        if len(bad_rows) - golds > self.max_bad_rows:
            return f"data.max_bad_rows = {self.max_bad_rows}; mend or remove them, or raise the limit"
        if golds > MOST_BAD_GOLDS * len(self.rows):
            most = f"at most {MOST_BAD_GOLDS:.0%} of {len(self.rows)}"
            return f"{most} may lack a right answer to compare with; mend or remove them"
        return None

    def _listed(self, rows: dict[int, str]) -> str:
        shown = [f"  row {i + 1} (id {self._id(i)}): {why}" for i, why in sorted(rows.items())]
        more = [f"  and {len(shown) - MISTAKES_SHOWN} more"] if len(shown) > MISTAKES_SHOWN else []
        return "\n".join(shown[:MISTAKES_SHOWN] + more)

    def _known_bad_rows(self) -> dict[int, str]:
        """What an earlier part of this run has set aside: a resumed run leaves out the same rows."""
        file, found = self.quarantine_file, []
        if file and file.is_file() and self.shard.rank == 0:
            records = [json.loads(line) for line in file.read_text().splitlines()]
            found = [(r["row"] - 1, r["reason"]) for r in records if r["source"] == self.rows.name]
        known = dict(self.shard.gather(found))
        # More than may be bad stopped the run; whoever starts it again may have mended them.
        return {} if self._limit_passed(known) else known

    def _record(self, file: Path, bad: list[tuple[int, str]]) -> None:
        """Add rows to the quarantine file, except those that an earlier part of the same run has put there."""
        known = set(file.read_text().splitlines()) if file.is_file() else set()
        source = self.rows.name
        rows = [{"source": source, "row": i + 1, "id": self._id(i), "reason": why} for i, why in bad]
        lines = [line for line in map(json.dumps, rows) if line not in known]
        with file.open("a") as appended:
            appended.writelines(line + "\n" for line in lines)

    def _id(self, index: int) -> str:
        try:
            return str(self.rows.row(index).get(self.columns.get("id", "id"), "-"))
        except BadRow:
            return "-"


def reason_of(error: Exception) -> str:
    """Why a row is bad, for errors of Pillow and of the file system too."""
    return str(error) if isinstance(error, BadRow) else f"an image cannot be read: {error}"
