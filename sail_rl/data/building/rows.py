"""Rows on their way in and out: columns under our names, pictures and videos as files beside the output."""

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rewards.accuracy import gold_text
from sail_rl.command_line import BadInput
from sail_rl.config_data import FileSource, HubSource, PictureSource, Source, expand_source
from sail_rl.data.example import check_row, image_column, rename_columns, video_column
from sail_rl.data.images import IMAGE_ERRORS, BadRow, image_path, open_image
from sail_rl.data.mixture import JoinedRows, open_sources

Row = dict[str, Any]
END = 2**20  # bytes
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tiff"}


def open_input(given: str, columns: Mapping[str, str], split: str) -> JoinedRows:
    """The rows of a .jsonl or .parquet file, of a dataset of the Hub, or of the picture task."""
    value = expand_source(given)
    if value.get("source") == "pictures" or value.get("source") == "hub":
        value["split"] = split
    try:
        source: FileSource | HubSource | PictureSource = TypeAdapter(Source).validate_python(value)
    except ValidationError as error:
        raise BadInput(f"INPUT {given}: {error.errors()[0]['msg']}") from None
    return open_sources([source], columns, split, "INPUT")


def identity(rows: JoinedRows) -> list[str]:
    """What tells these rows from others, also when a file has been written anew."""
    files = [Path(part.rows.name) for part in rows.parts]
    digests = [f", {file_digest(file)}" if file.is_file() else "" for file in files]
    columns = [f", {dict(part.columns)}" if part.columns else "" for part in rows.parts]
    parts = zip(rows.parts, digests, columns, strict=True)
    return [f"{part.name}, {len(part.rows)} rows{digest}{mapped}" for part, digest, mapped in parts]


def file_digest(path: Path) -> str:
    """Size and a hash of both ends, which is enough to tell apart files that somebody has changed."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(END)
        file.seek(max(0, size - END))
        both = first + file.read(END)
    return f"{size} bytes, {hashlib.sha256(both).hexdigest()[:12]}"


def read_row(rows: JoinedRows, index: int) -> tuple[Row, Path]:
    """A row under our column names, checked without decoding, and the folder of its pictures; raises BadRow."""
    part, number = rows.locate(index)
    row = rename_columns(part.row(number), part.columns)
    check_row(row)
    return row, part.rows.folder


def row_id(rows: JoinedRows, index: int) -> str:
    """The row's own id, if it can be read and has one."""
    part, number = rows.locate(index)
    try:
        return str(part.row(number).get(part.columns.get("id", "id"), "-"))
    except BadRow:
        return "-"


def with_files(row: Mapping[str, Any], folder: Path, output: Path) -> Row:
    """The row with its pictures and videos as paths that hold from the output's folder; raises BadRow."""
    kept = {name: value for name, value in row.items() if name not in ("image", "images", "video", "videos")}
    images, videos = image_column(row), video_column(row)
    if images:
        kept["images"] = [picture_file(image, folder, output) for image in images]
    if videos:
        kept["videos"] = [video_file(video, folder, output) for video in videos]
    return kept


def picture_file(image: Any, folder: Path, output: Path) -> str:
    """A picture's path; one that has none is written beside the output."""
    try:
        picture = open_image(image, folder)
        if isinstance(image, str):
            return moved(image, folder, output)
        content = image.get("bytes") if isinstance(image, dict) else image
        if isinstance(image, dict) and content is None:
            return moved(str(image["path"]), folder, output)
        if isinstance(content, bytes) and picture.format in SUFFIXES:
            return write_file(content, SUFFIXES[picture.format], output)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
    except IMAGE_ERRORS as error:
        name = image if isinstance(image, str) else image_path(image) or "picture"
        raise BadRow(f"image {name} cannot be read: {error}") from None
    return write_file(buffer.getvalue(), ".png", output)


def video_file(video: Any, folder: Path, output: Path) -> str:
    """A video's path; bytes are written beside the output."""
    if isinstance(video, str):
        return moved(video, folder, output)
    content = video.get("bytes") if isinstance(video, dict) else video
    if isinstance(content, bytes):
        name = video.get("path") if isinstance(video, dict) else None
        return write_file(content, Path(name or "video.mp4").suffix, output)
    if isinstance(video, dict) and video.get("path"):
        return moved(str(video["path"]), folder, output)
    raise BadRow("a video that is given as frames cannot be kept by path; save it as a file")


def moved(path: str, folder: Path, output: Path) -> str:
    """A path as it reads from the output's folder; an absolute one stays."""
    return path if os.path.isabs(path) else os.path.relpath(folder / path, output.parent)


def write_file(content: bytes, suffix: str, output: Path) -> str:
    """Write content under a name made of its hash, if it is not there; its path from the output's folder."""
    name = f"{output.stem}_files/{hashlib.sha256(content).hexdigest()[:32]}{suffix}"
    file = output.parent / name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, file)
    return name


def question_text(row: Mapping[str, Any]) -> str:
    """What the last turn of the user's asks; raises BadRow where it is not one text."""
    return asked(row)[1]


def with_question(row: Row, text: str) -> Row:
    """The row with another text in the last turn of the user's."""
    name, _ = asked(row)
    if isinstance(row[name], str):
        return row | {name: text}
    turns = [dict(turn) for turn in row[name]]
    last = max(place for place, turn in enumerate(turns) if turn["role"] == "user")
    content = turns[last]["content"]
    turns[last]["content"] = (
        text if isinstance(content, str) else [p | {"text": text} if p["type"] == "text" else p for p in content]
    )
    return row | {name: turns}


def asked(row: Mapping[str, Any]) -> tuple[str, str]:
    """The column that holds the question, and its text."""
    name = next(name for name in ("prompt", "question", "messages") if row.get(name))
    if isinstance(row[name], str):
        return name, row[name]
    content = [turn["content"] for turn in row[name] if turn["role"] == "user"][-1]
    texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
    if len(texts) != 1:
        raise BadRow(f"the last question has {len(texts)} parts of text; this command reads one")
    return name, texts[0]


def without_turn(row: Mapping[str, Any]) -> Row:
    """The row without the turn of the assistant's that it may have."""
    kept = {name: value for name, value in row.items() if name not in ("completion", "messages")}
    asks = row.get("prompt") or row.get("question")
    return kept if asks else kept | {"prompt": row["messages"][:-1]}


def traced_row(row: Mapping[str, Any], reasoning: str) -> Row:
    """A row for SFT that is to be answered with this reasoning and the right answer, in the place of a turn it had."""
    kept = {name: value for name, value in without_turn(row).items() if name != "solution"}
    answer = gold_text(row.get("answer")) or gold_text(row.get("solution"))
    return kept | {"answer": answer, "reasoning": reasoning, "kind": "cot"}
