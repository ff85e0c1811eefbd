"""Rows that ask the same about the same picture: by the picture's content, and if wanted by its look."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rewards.notation import text_key
from sail_rl.data.building.journal import Record
from sail_rl.data.images import decode_image

Row = dict[str, Any]
SIDE = 8  # of the perceptual hash: 64 bits


def content_keys(row: Row, folder: Path, near: bool) -> dict[str, Any]:
    """Hashes of what is asked and shown; raises BadRow for a picture that cannot be read."""
    pictures = [decode_image(path, folder) for path in row.get("images") or []]
    shown = [hashlib.sha256(f"{one.size}".encode() + one.tobytes()).hexdigest() for one in pictures]
    shown += [hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in row.get("videos") or []]
    question = digest(asked_text(row))
    answer = text_key(str(row.get("answer") if row.get("answer") is not None else row.get("solution") or ""))
    keys: dict[str, Any] = {"key": digest([question, shown]), "answer": digest(answer)}
    if near and pictures:
        keys |= {"question": question, "looks": [looks(picture) for picture in pictures]}
    return keys


def asked_text(row: Row) -> str:
    """The conversation as text in one spelling."""
    prompt = row.get("prompt") or row.get("question") or row.get("messages", [])[:-1]
    return " ".join((prompt if isinstance(prompt, str) else json.dumps(prompt)).casefold().split())


def digest(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def looks(picture: Image.Image) -> str:
    """64 bits that say where the picture gets brighter from left to right; equal for a picture scaled or compressed."""
    small = np.asarray(picture.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)).astype(int)
    bits = (small[:, 1:] > small[:, :-1]).flatten()
    return f"{int(''.join(map(str, bits.astype(int))), 2):016x}"


def without_duplicates(records: Iterable[Record], distance: int | None) -> Iterator[Record]:
    """The records with every row dropped that repeats one before it; the first stays."""
    first: dict[str, tuple[int, str]] = {}
    alike = Alike(distance) if distance is not None else None
    for record in records:
        if not record.kept:
            yield record
            continue
        key, answer = record.memo["key"], record.memo["answer"]
        number, its_answer = first.setdefault(key, (record.row, answer))
        if number != record.row:
            reason = "duplicate" if answer == its_answer else "duplicate with another answer"
            yield replace(record, kept=[], reason=reason, detail=f"of row {number + 1}")
        elif alike and (other := alike.seen(record)) is not None:
            yield replace(record, kept=[], reason="near duplicate", detail=f"of row {other + 1}")
        else:
            yield record


class Alike:
    """Rows with one question and one answer whose pictures look alike: hashes that differ in few bits.

    Hashes that differ in `distance` bits at most agree in one of `distance + 1` bands: only those are compared.
    """

    def __init__(self, distance: int) -> None:
        self.distance = distance
        self.known: dict[tuple, list[tuple[int, list[int]]]] = defaultdict(list)

    def seen(self, record: Record) -> int | None:
        """The row before this one that it looks like; remembers this one where there is none."""
        if "looks" not in record.memo:
            return None
        hashes = [int(text, 16) for text in record.memo["looks"]]
        asked = (record.memo["question"], record.memo["answer"], len(hashes))
        bands = [(*asked, band, value) for band, value in enumerate(self.bands(hashes[0]))]
        for band in bands:
            for row, others in self.known[band]:
                pairs = zip(hashes, others, strict=True)
                if all((one ^ other).bit_count() <= self.distance for one, other in pairs):
                    return row
        for band in bands:
            self.known[band].append((record.row, hashes))
        return None

    def bands(self, value: int) -> list[int]:
        """The hash cut into pieces."""
        count = self.distance + 1
        edges = [SIDE * SIDE * place // count for place in range(count + 1)]
        return [(value >> low) & ((1 << high - low) - 1) for low, high in pairwise(edges)]
