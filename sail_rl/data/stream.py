"""The order of rows: shuffled by seed, resumable by one number, the same on every process, without bad rows."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

from sail_rl.command_line import BadInput
from sail_rl.data.ahead import Ahead, RowLoader
from sail_rl.data.curriculum import Curriculum
from sail_rl.data.example import check_row, image_column, rename_columns, video_column
from sail_rl.data.golds import MOST_BAD_GOLDS, bad_golds, gold_row, is_gold_reason
from sail_rl.data.images import IMAGE_ERRORS, BadRow, open_image
from sail_rl.data.mixture import JoinedRows, Part, make_order
from sail_rl.data.videos import check_video
from sail_rl.data.workers import Workers
from sail_rl.run_folder import replace_text

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
    """An endless stream of prepared rows. `position` is all of its state, but for a curriculum's pass rates.

    With workers, while the trainer uses the items of one call those of the next are prepared: items, order and bad rows
    are the same as without.
    """

    def __init__(
        self,
        rows: JoinedRows,
        prepare: Callable[[Any, int], Item],
        *,
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
        self.rows = rows
        self.loader = RowLoader(rows, prepare, video_frames, compared)
        self.ahead = Ahead(workers, self.loader) if workers else None
        self.one_pass = one_pass  # the next call after the last row begins anew: prepare nothing beyond it
        self.order, self.max_bad_rows = make_order(rows, seed, shuffle), max_bad_rows
        self.quarantine_file, self.shard = quarantine_file, shard
        self.position = 0
        self.curriculum: Curriculum | None = None
        self.bad_rows: dict[int, str] = self._known_bad_rows()
        self._check_rest()

    def check_rows(self) -> None:
        """Find at once all rows that lack something, without decoding pictures; larger sources are checked as read."""
        bad, golds = [], {}
        for part, start in zip(self.rows.parts, self.rows.starts, strict=False):
            for number in range(min(len(part.rows), part.rows.checked_at_start)):
                try:
                    golds[start + number] = gold_row(undecoded_row(part, number))
                except (BadRow, *IMAGE_ERRORS) as error:
                    bad.append((start + number, reason_of(error)))
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
        """(position, row number) of the next row that is not known to be bad and that a curriculum wants."""
        while True:
            index = self.order.row_at(self.position)
            self.position += 1
            place = self.position - 1
            if index not in self.bad_rows and (self.curriculum is None or self.curriculum.wants(place, index)):
                return place, index

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
        self._check_rest()

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
        shown = [f"  {self._described(i)}: {why}" for i, why in sorted(rows.items())]
        more = [f"  and {len(shown) - MISTAKES_SHOWN} more"] if len(shown) > MISTAKES_SHOWN else []
        return "\n".join(shown[:MISTAKES_SHOWN] + more)

    def _check_rest(self) -> None:
        """Every source that is drawn from must have a row left."""
        bounds = pairwise(self.rows.starts if self.rows.weights else [0, len(self.rows)])
        for start, end in bounds:
            if sum(start <= index < end for index in self.bad_rows) == end - start:
                name = self.rows.locate(start)[0].name if self.rows.weights else self.rows.name
                raise BadInput(f"{name}: no usable row is left")

    def _known_bad_rows(self) -> dict[int, str]:
        """What an earlier part of this run has set aside: a resumed run leaves out the same rows."""
        file, found = self.quarantine_file, []
        if file and file.is_file() and self.shard.rank == 0:
            starts = dict(zip((part.name for part in self.rows.parts), self.rows.starts, strict=False))
            records = [json.loads(line) for line in whole_lines(file)]
            ours = [record for record in records if record["source"] in starts]
            found = [(starts[record["source"]] + record["row"] - 1, record["reason"]) for record in ours]
        known = dict(self.shard.gather(found))
        # More than may be bad stopped the run; whoever starts it again may have mended them.
        return {} if self._limit_passed(known) else known

    def _record(self, file: Path, bad: list[tuple[int, str]]) -> None:
        """Add rows to the quarantine file, except those that an earlier part of the same run has put there."""
        lines = whole_lines(file) if file.is_file() else []
        for index, why in bad:
            part, number = self.rows.locate(index)
            lines.append(
                json.dumps({"source": part.name, "row": number + 1, "id": row_id(part, number), "reason": why})
            )
        replace_text(file, "".join(f"{line}\n" for line in dict.fromkeys(lines)))

    def _described(self, index: int) -> str:
        """A row by number and id, and by source where there are several."""
        part, number = self.rows.locate(index)
        name = f"row {number + 1}" if len(self.rows.parts) == 1 else self.rows.row_name(index)
        return f"{name} (id {row_id(part, number)})"


def whole_lines(file: Path) -> list[str]:
    """The records of a file, without one that a killed run has left unfinished."""
    return [line.removesuffix("\n") for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def undecoded_row(part: Part, number: int) -> dict[str, Any]:
    """A row, checked as far as can be without decoding; raises BadRow, or what Pillow raises."""
    row = rename_columns(part.row(number), part.columns)
    check_row(row)
    for image in image_column(row):
        open_image(image, part.rows.folder)
    for video in video_column(row):
        check_video(video, part.rows.folder)
    return row


def row_id(part: Part, number: int) -> str:
    """The row's own id, if it can be read and has one."""
    try:
        return str(part.row(number).get(part.columns.get("id", "id"), "-"))
    except BadRow:
        return "-"


def reason_of(error: Exception) -> str:
    """Why a row is bad, for errors of Pillow and of the file system too."""
    return str(error) if isinstance(error, BadRow) else f"an image cannot be read: {error}"
