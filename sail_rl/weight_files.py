"""Safetensors folders read and written tensor by tensor: what one holds, and a writer that never holds a whole file.

The safetensors library reads lazily but writes from memory alone, so the file format (eight bytes of header length, a
JSON header, the data) is written here.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sail_rl.command_line import BadInput

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Stored:
    """A tensor as a safetensors header describes it."""

    dtype: str
    """Safetensors' name, such as BF16."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return torch.Size(self.shape).numel() * BYTES[self.dtype]


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file: its free metadata, and its tensors in the order of their data."""

    metadata: dict[str, str]
    tensors: dict[str, Stored]

    @property
    def size(self) -> int:
        """Of the tensors, in bytes."""
        return sum(stored.size for stored in self.tensors.values())


def read_weight_files(folder: Path) -> dict[str, WeightFile]:
    """Every weight file of a checkpoint by its name; headers only."""
    if not (folder / INDEX_NAME).is_file():
        if not (folder / SINGLE_NAME).is_file():
            raise BadInput(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}")
        return {SINGLE_NAME: read_header(folder / SINGLE_NAME)}
    try:
        names = sorted(set(json.loads((folder / INDEX_NAME).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise BadInput(f"{folder / INDEX_NAME} is not an index of weight files: {error!r}") from error
    for name in names:
        if Path(name).name != name:  # results are written under the same names: never outside their folder
            raise BadInput(f"{folder / INDEX_NAME} names {name!r}, which is no plain file name")
    return {name: read_header(folder / name) for name in names}


def read_header(path: Path) -> WeightFile:
    """What a file holds; a file that is missing, cut short or of another kind is the user's mistake."""
    if not path.is_file():
        raise BadInput(f"{path} is missing, though {INDEX_NAME} names it")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.offset_keys()}
            tensors = {key: Stored(part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise BadInput(f"{path} is damaged or no safetensors file: {error}") from error
    strange = sorted({stored.dtype for stored in tensors.values()} - set(BYTES))
    if strange:
        raise BadInput(f"{path} holds tensors of type {', '.join(strange)}; expected one of {', '.join(BYTES)}")
    return WeightFile(metadata, tensors)


def write_weight_file(
    path: Path, file: WeightFile, tensors: Iterable[torch.Tensor], advance: Callable[[int], object]
) -> None:
    """Write tensors one after another, in the header's order; `advance` is told the bytes of each."""
    header: dict[str, object] = {"__metadata__": file.metadata} if file.metadata else {}
    start = 0
    for key, stored in file.tensors.items():
        offsets = [start, start := start + stored.size]
        header[key] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the library's padding, so that its files come out the same to the byte
    with path.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for stored, tensor in zip(file.tensors.values(), tensors, strict=True):
            output.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            advance(stored.size)


def write_index(folder: Path, files: dict[str, WeightFile]) -> None:
    """The index that a checkpoint of several weight files needs."""
    index = {
        "metadata": {"total_size": sum(file.size for file in files.values())},
        "weight_map": {key: name for name, file in files.items() for key in file.tensors},
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def refuse_occupied(target: Path) -> None:
    """A target must be new or an empty folder."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise BadInput(f"{target} exists and is not an empty folder; name a new one")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write to, which takes the target's name when it is whole and is gone when writing fails."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
