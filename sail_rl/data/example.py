"""One row of data, checked and with its pictures decoded: `Example`."""

import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

MAX_PIXELS = 178_956_970  # Pillow's own bound; larger pictures are refused before they are decoded
# What Pillow raises for files that are no pictures, torn ones, and bombs.
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
IMAGE_MARKER = "<image>"
RESERVED_TEXT = ("<IMG_CONTEXT>", "<img>", "</img>", "<|im_start|>", "<|im_end|>")


class BadRow(Exception):
    """A row that cannot be used; the text says why and, where it can, what to change."""


@dataclass(frozen=True)
class Example:
    """One row of data after column mapping."""

    id: str
    messages: list[dict[str, Any]]
    """The conversation up to the answer; content is a list of `{"type": "image"}` and `{"type": "text"}` parts."""
    images: tuple[Image.Image, ...]
    """Decoded RGB pictures, one for each image part."""
    columns: Mapping[str, Any]
    """What rewards receive: `answer` and every other column of the row, pictures as paths where they have one."""
    conversational: bool
    """The row came as a conversation, so rewards get messages and not strings, as in TRL."""

    @property
    def question(self) -> str:
        """The text of the last user turn."""
        last = [message for message in self.messages if message["role"] == "user"][-1]
        return "".join(part["text"] for part in last["content"] if part["type"] == "text")


def make_example(row: Mapping[str, Any], default_id: str, columns: Mapping[str, str], folder: Path) -> Example:
    """Check a raw row and decode its pictures; raises BadRow."""
    row = rename_columns(row, columns)
    check_row(row)
    raw_images = image_column(row)
    images = tuple(decode_image(image, folder) for image in raw_images)
    row_columns = {name: value for name, value in row.items() if name not in ("prompt", "images", "image")}
    row_columns["answer"] = answer_text(row)
    row_columns["images"] = [str(folder / image) if isinstance(image, str) else None for image in raw_images]
    messages = conversation(row, len(images))
    identifier = str(row["id"]) if row.get("id") is not None else default_id
    return Example(identifier, messages, images, row_columns, conversational=isinstance(row.get("prompt"), list))


def rename_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Apply `data.columns`; a mapped name that the row lacks is an error, not a silent None."""
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise BadRow(f"no column {missing[0]!r} (named in data.columns); the row has: {', '.join(map(str, row))}")
    mapped = set(columns.values())
    renamed = {name: value for name, value in row.items() if name not in mapped}
    return renamed | {ours: row[theirs] for ours, theirs in columns.items()}


def check_row(row: Mapping[str, Any]) -> None:
    """What can be seen without decoding a picture: a prompt, an answer, as many pictures as placeholders."""
    if not row.get("prompt") and not row.get("question"):
        raise BadRow("no `question` and no `prompt`; map one with data.columns")
    answer_text(row)
    conversation(row, len(image_column(row)))


def answer_text(row: Mapping[str, Any]) -> str:
    """The right answer, from `answer` or `solution`."""
    answer = row.get("answer") if row.get("answer") is not None else row.get("solution")
    if answer is None or not str(answer).strip():
        raise BadRow("no `answer` (or `solution`); map one with data.columns or drop the row")
    return str(answer)


def image_column(row: Mapping[str, Any]) -> list[Any]:
    """The row's pictures as a list, whatever form the column has."""
    images = row.get("images") if row.get("images") is not None else row.get("image")
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def image_path(image: Any) -> str | None:
    """The path that a picture came with, if any."""
    return image.get("path") if isinstance(image, dict) else getattr(image, "filename", None) or None


def conversation(row: Mapping[str, Any], num_images: int) -> list[dict[str, Any]]:
    """Messages whose content is a list of parts, with exactly one image part for each picture."""
    prompt = row.get("prompt") or row["question"]
    raw = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(raw, list) or not all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in raw
    ):
        raise BadRow("`prompt` (or `question`) must be text or a list of {role, content} messages")
    messages = [{"role": message["role"], "content": content_parts(message["content"])} for message in raw]
    users = [message for message in messages if message["role"] == "user"]
    if not users:
        raise BadRow("`prompt` has no user turn")
    placed = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placed == 0:
        # No placeholders: pictures come first, as the models were trained.
        users[0]["content"] = [{"type": "image"}] * num_images + users[0]["content"]
    elif placed != num_images:
        raise BadRow(f"{num_images} images but {placed} image placeholders in the prompt; they must be equal")
    return messages


def content_parts(content: Any) -> list[dict[str, Any]]:
    """Text with `<image>` markers, or ready-made parts, as a list of parts."""
    if isinstance(content, str):
        pieces = content.split(IMAGE_MARKER)
        parts = [{"type": "text", "text": pieces[0]}]
        for piece in pieces[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": piece.lstrip("\n")}]
        content = [part for part in parts if part.get("text") != ""]
    if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
        raise BadRow("a message's `content` must be text or a list of {type, text} parts")
    parts = [{"type": "image"} if part["type"] == "image" else part for part in content]
    if not all(isinstance(part.get("text"), str) for part in parts if part["type"] == "text"):
        raise BadRow("a part of type text has no `text`")
    text = "".join(part.get("text") or "" for part in parts)
    reserved = [token for token in RESERVED_TEXT if token in text]
    if reserved:
        raise BadRow(f"the prompt's text contains {reserved[0]}, which is reserved for pictures and turns; remove it")
    return parts


def decode_image(image: Any, folder: Path) -> Image.Image:
    """A path, bytes, `{"bytes", "path"}` or a Pillow image as an upright RGB picture."""
    name = image if isinstance(image, str) else image_path(image) or "picture"
    try:
        picture = open_image(image, folder)
        if picture.width * picture.height > MAX_PIXELS:
            raise BadRow(f"image {name} has {picture.width}x{picture.height} pixels; the limit is {MAX_PIXELS}")
        return ImageOps.exif_transpose(picture).convert("RGB")
    except IMAGE_ERRORS as error:
        raise BadRow(f"image {name} cannot be read: {error or type(error).__name__}") from None


def open_image(image: Any, folder: Path) -> Image.Image:
    """The picture with its header read; pixels are read later."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return Image.open(io.BytesIO(image))
    if not isinstance(image, str):
        raise BadRow(f"an image is a path, bytes or a picture, not {type(image).__name__}")
    return Image.open(folder / image)
