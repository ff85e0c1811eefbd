"""Where rows come from: files, the Hub, the picture task. None is loaded whole; all but streams give random access."""

import json
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sail_rl.command_line import BadInput
from sail_rl.config_data import FileSource, HubSource, PictureSource
from sail_rl.data.example import BadRow
from sail_rl.data.pictures import picture_row
from sail_rl.data.streamed import ENDLESS, StreamedRows
from sail_rl.data.vlmevalkit import TsvRows


class Rows(Protocol):
    """Raw rows by number."""

    name: str
    folder: Path
    checked_at_start: int
    """Most rows that are looked at before the first step; the others are checked when they are read."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Mapping[str, Any]:
        """The raw row; raises BadRow when it cannot even be parsed."""
        ...


class PictureRows:
    """The built-in picture task."""

    folder = Path()
    checked_at_start = 0

    def __init__(self, source: PictureSource, split: str):
        self.source = source
        self.split = source.split or split
        self.name = f"pictures ({self.split})"

    def __len__(self) -> int:
        return self.source.rows or (ENDLESS if self.split == "train" else 400)

    def row(self, index: int) -> Mapping[str, Any]:
        source = self.source
        return picture_row(
            self.split,
            index,
            seed=source.seed,
            families=tuple(source.families),
            levels=tuple(source.levels),
            steps=tuple(source.steps),
            forms=tuple(source.forms) if source.forms else None,
        )


class JsonLinesRows:
    """A .jsonl file, read line by line through an index of line starts (8 bytes a row in memory)."""

    checked_at_start = 20_000

    def __init__(self, path: Path):
        self.name = str(path)
        self.folder = path.parent
        self.path = path
        self.file = path.open("rb")
        self.starts = array("q")
        position = 0
        for line in self.file:
            if line.strip():
                self.starts.append(position)
            position += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"file": None}  # a worker opens its own, with a place of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.file = self.path.open("rb")

    def row(self, index: int) -> Mapping[str, Any]:
        self.file.seek(self.starts[index])
        try:
            row = json.loads(self.file.readline())
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of 5,000 digits, endless brackets
            raise BadRow(f"not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise BadRow(f"a row is a JSON object, not {type(row).__name__}")
        return row


class JsonRows:
    """A .json file that is one list of rows, or one object of them, as benchmarks are published; in memory."""

    checked_at_start = 20_000

    def __init__(self, path: Path):
        self.name, self.folder = str(path), path.parent
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path} is not valid JSON: {error}") from None
        self.rows = list(values.values()) if isinstance(values, dict) else values

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Mapping[str, Any]:
        if not isinstance(self.rows[index], dict):
            raise BadRow(f"a row is a JSON object, not {type(self.rows[index]).__name__}")
        return self.rows[index]


def is_one_value(path: Path) -> bool:
    """Whether a .json file is one list or object over several lines, or a list in one, and not a row a line."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    return first.strip() == b"{" or first.lstrip().startswith(b"[")


class ArrowRows:
    """A parquet file or a Hub dataset, memory-mapped by `datasets`; pictures and videos stay bytes until used."""

    checked_at_start = 500  # their pictures come along, and may be large

    def __init__(self, name: str, folder: Path, dataset):
        from datasets import Image, Sequence, Video

        self.name = name
        self.folder = folder
        for column, feature in dataset.features.items():
            inner = getattr(feature, "feature", None)
            for kind in (Image, Video):
                if isinstance(feature, kind):
                    dataset = dataset.cast_column(column, kind(decode=False))
                elif isinstance(inner, kind):
                    dataset = dataset.cast_column(column, Sequence(kind(decode=False)))
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int) -> Mapping[str, Any]:
        return self.dataset[index]


def open_rows(source: PictureSource | FileSource | HubSource, split: str, key: str) -> Rows:
    """The rows of `data.train` or `data.eval`; a source that cannot be opened is the user's mistake."""
    if isinstance(source, PictureSource):
        return PictureRows(source, split)
    rows = open_file(Path(source.path), key) if isinstance(source, FileSource) else open_hub(source, key)
    if len(rows) == 0:
        raise BadInput(f"{key}.path = {source.path}: there are no rows in it")
    return rows


def open_file(path: Path, key: str) -> Rows:
    """A local file by its ending."""
    if not path.is_file():
        raise BadInput(f"{key}.path = {path}: there is no such file")
    if path.suffix == ".json" and is_one_value(path):
        return JsonRows(path)
    if path.suffix in (".jsonl", ".json"):
        return JsonLinesRows(path)
    if path.suffix == ".parquet":
        from datasets import load_dataset

        try:
            dataset = load_dataset("parquet", data_files=str(path), split="train")
        except Exception as error:  # datasets raises its own, pyarrow's and OS errors alike
            raise BadInput(f"{key}.path = {path} is not readable parquet: {first_line(error)}") from None
        return ArrowRows(str(path), path.parent, dataset)
    if path.suffix == ".tsv":
        return TsvRows(path)
    raise BadInput(f"{key}.path = {path}: rows come from .jsonl, .parquet or .tsv files, not {path.suffix or 'this'}")


def open_hub(source: HubSource, key: str) -> Rows:
    """A dataset id (or a local dataset folder), through the `datasets` cache."""
    from datasets import load_dataset

    try:
        dataset = load_dataset(source.path, source.config, split=source.split, streaming=source.streaming)
    except Exception as error:  # network, permission, missing split: all are the user's to mend
        raise BadInput(f"{key}.path = {source.path}: the dataset cannot be loaded: {first_line(error)}") from None
    if source.streaming:
        return StreamedRows(source.path, dataset, source.shuffle_buffer)
    return ArrowRows(source.path, Path(), dataset)


def first_line(error: Exception) -> str:
    """The gist of an error of another library."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
