"""What a command has done so far: one line for each row, written as it is done, so that any interruption keeps it."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sail_rl.command_line import BadInput, shown

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """What became of one row of the input."""

    row: int
    """Its number, from 0."""
    id: str
    """Its own id, or `-`."""
    kept: list[Row]
    """The rows that are written for it; none where it is dropped."""
    reason: str
    """Why it was dropped, or what was done to it: one of few, since they are counted."""
    detail: str = ""
    """What can be said of this row alone."""
    figures: dict[str, str] = field(default_factory=dict)
    """A class that the row falls into, by what was looked at: the report counts them."""
    memo: dict[str, Any] = field(default_factory=dict)
    """What the command's last pass over all records needs of this one."""


class Journal:
    """`<output>.progress`: the settings in the first line, then a record a line. A torn last line is forgotten."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.path = file
        self.file = file.open("a+b")
        refuse_company(self.file, file)
        self.places: dict[int, int] = {}
        """Where the record of each row begins."""
        self.file.seek(0)
        first = self.file.readline()
        if not first.endswith(b"\n"):
            self.file.truncate(0)
            self._append([settings])
        else:
            refuse_changes(file, json.loads(first), settings)
            self._read_places()

    def _read_places(self) -> None:
        position = self.file.tell()
        for line in self.file:
            if not line.endswith(b"\n"):  # the command was ended while it wrote
                self.file.truncate(position)
                break
            self.places[json.loads(line)["row"]] = position
            position += len(line)

    def _append(self, values: Iterable[Any]) -> None:
        self.file.seek(0, os.SEEK_END)
        self.file.write("".join(json.dumps(value, default=str) + "\n" for value in values).encode())
        self.file.flush()
        os.fsync(self.file.fileno())

    def __contains__(self, row: int) -> bool:
        return row in self.places

    def __len__(self) -> int:
        return len(self.places)

    def add(self, records: Iterable[Record]) -> None:
        """Write records down; they are on the disk when this returns."""
        self.file.seek(0, os.SEEK_END)
        position, written = self.file.tell(), [asdict(record) for record in records]
        self._append(written)
        for value in written:
            self.places[value["row"]] = position
            position += len(json.dumps(value, default=str)) + 1

    def records(self) -> Iterator[Record]:
        """All of them, in the order of the input."""
        for _, position in sorted(self.places.items()):
            self.file.seek(position)
            yield Record(**json.loads(self.file.readline()))

    def close(self) -> None:
        """Let go of the file."""
        self.file.close()


def refuse_company(file, path: Path) -> None:
    """Two commands that write one output would spoil it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"{path}: another process is at work on this output; wait for it, or end it") from None


def refuse_changes(file: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """What was begun goes on with the same settings, or not at all."""
    new = json.loads(json.dumps(new, default=str))
    changes = [
        f"  {key}: it was {shown(old.get(key))}, now {shown(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
    if changes:
        raise BadInput(
            f"{file} was written with other settings; go on with the same, remove it, or name another --output:\n"
            + "\n".join(changes)
        )
