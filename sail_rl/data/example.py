"""One row of data, checked and with its pictures and videos decoded: `Example`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sail_rl.data.golds import fixed_type
from sail_rl.data.images import BadRow, decode_image
from sail_rl.data.videos import decode_video

MARKERS = {"<image>": "image", "<video>": "video"}
DECODED_COLUMNS = ("prompt", "messages", "completion", "images", "image", "videos", "video")
RESERVED_TEXT = (
    *("<IMG_CONTEXT>", "<img>", "</img>"),  # SAIL-VL2, InternVL
    *("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),  # Qwen-VL
    *("<|im_start|>", "<|im_end|>"),
)


@dataclass(frozen=True)
class Example:
    """One row of data after column mapping."""

    id: str
    messages: list[dict[str, Any]]
    """The conversation up to the answer; content is a list of parts `{"type": "image"}`, `{"type": "video"}` and
    `{"type": "text", "text": ...}`."""
    images: tuple[Image.Image, ...]
    """Decoded RGB pictures, one for each image part."""
    columns: Mapping[str, Any]
    """What rewards receive: `answer` and every other column of the row, pictures as paths where they have one."""
    conversational: bool
    """The row came as a conversation, so rewards get messages and not strings, as in TRL."""
    videos: tuple[tuple[Image.Image, ...], ...] = ()
    """The sampled frames of each video part, RGB."""
    target: str | None = None
    """The assistant's turn as the row has it, to be imitated to the letter; None where columns say what to answer."""

    @property
    def question(self) -> str:
        """The text of the last user turn."""
        last = [message for message in self.messages if message["role"] == "user"][-1]
        return "".join(part["text"] for part in last["content"] if part["type"] == "text")


def make_example(
    row: Mapping[str, Any],
    default_id: str,
    columns: Mapping[str, str],
    folder: Path,
    video_frames: int = 16,
    compared: bool = False,
) -> Example:
    """Check a raw row and decode its pictures and videos; raises BadRow.

    Where completions are to be `compared` with the right answer, its type is fixed here.
    """
    row = rename_columns(row, columns)
    check_row(row)
    answer_type = fixed_type(row) if compared else None
    raw_images, raw_videos = image_column(row), video_column(row)
    images = tuple(decode_image(image, folder) for image in raw_images)
    videos = tuple(decode_video(video, folder, video_frames) for video in raw_videos)
    row_columns = {name: value for name, value in row.items() if name not in DECODED_COLUMNS}
    row_columns["answer"] = answer_text(row)
    if answer_type:
        row_columns["answer_type"] = answer_type
    row_columns["images"] = paths_of(raw_images, folder)
    if raw_videos:
        row_columns["videos"] = paths_of(raw_videos, folder)
    messages = conversation(row, len(images), len(videos))
    identifier = str(row["id"]) if row.get("id") is not None else default_id
    conversational = isinstance(prompt_of(row), list)
    return Example(identifier, messages, images, row_columns, conversational, videos, assistant_turn(row))


def paths_of(given: list[Any], folder: Path) -> list[str | None]:
    """Files of pictures or videos, for the rewards; None for what came as bytes or pictures."""
    return [str(folder / entry) if isinstance(entry, str) else None for entry in given]


def rename_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Apply `data.columns`; a mapped name that the row lacks is an error, not a silent None."""
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise BadRow(f"no column {missing[0]!r} (named in data.columns); the row has: {', '.join(map(str, row))}")
    mapped = set(columns.values())
    renamed = {name: value for name, value in row.items() if name not in mapped}
    return renamed | {ours: row[theirs] for ours, theirs in columns.items()}


def check_row(row: Mapping[str, Any]) -> None:
    """What can be seen without decoding a picture: a prompt, an answer, a placeholder for each picture and video."""
    turn = assistant_turn(row)
    if not prompt_of(row):
        raise BadRow("no `question` and no `prompt`; map one with data.columns")
    if turn is None:
        answer_text(row)
    conversation(row, len(image_column(row)), len(video_column(row)))


def prompt_of(row: Mapping[str, Any]) -> Any:
    """The conversation up to the answer: `prompt`, `question`, or all but the last turn of `messages`."""
    given = row.get("prompt") or row.get("question")
    messages = row.get("messages")
    return messages[:-1] if not given and isinstance(messages, list) else given


def assistant_turn(row: Mapping[str, Any]) -> str | None:
    """The answer that a whole conversation ends with, in `messages` or, after a prompt, in `completion`."""
    given = row.get("completion") if row.get("prompt") or row.get("question") else row.get("messages")
    if given is None:
        return None
    turns = [{"role": "assistant", "content": given}] if isinstance(given, str) else given
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise BadRow("the conversation does not end with a turn of the assistant's")
    content = content_parts(last.get("content"))
    text = "".join(part.get("text", "") for part in content)
    if not text.strip() or any(part["type"] != "text" for part in content):
        raise BadRow("the assistant's turn must be text, and not empty")
    return text


def answer_text(row: Mapping[str, Any]) -> str | None:
    """What is right, from `answer` or `solution`; None where the row says it only as the assistant's turn."""
    answer = row.get("answer") if row.get("answer") is not None else row.get("solution")
    if answer is not None and str(answer).strip():
        return str(answer)
    if assistant_turn(row) is None:
        raise BadRow("no `answer` (or `solution`); map one with data.columns or drop the row")
    return None


def image_column(row: Mapping[str, Any]) -> list[Any]:
    """The row's pictures as a list, whatever form the column has."""
    images = row.get("images") if row.get("images") is not None else row.get("image")
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def video_column(row: Mapping[str, Any]) -> list[Any]:
    """The row's videos as a list: `videos` holds several, where `video` is one, which a list gives frame by frame."""
    videos = row.get("videos")
    if videos is None:
        return [] if row.get("video") is None else [row["video"]]
    return list(videos) if isinstance(videos, list | tuple) else [videos]


def conversation(row: Mapping[str, Any], num_images: int, num_videos: int = 0) -> list[dict[str, Any]]:
    """Messages whose content is a list of parts, with exactly one part for each picture and each video."""
    prompt = prompt_of(row)
    raw = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(raw, list) or not all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in raw
    ):
        raise BadRow("`prompt` (or `question`) must be text or a list of {role, content} messages")
    messages = [{"role": message["role"], "content": content_parts(message["content"])} for message in raw]
    users = [message for message in messages if message["role"] == "user"]
    if not users:
        raise BadRow("`prompt` has no user turn")
    for kind, count in (("video", num_videos), ("image", num_images)):
        place_parts(messages, users[0], kind, count)
    return messages


def place_parts(messages: list[dict[str, Any]], first_user: dict[str, Any], kind: str, count: int) -> None:
    """Put pictures (or videos) without placeholders ahead of the text, as the models were trained."""
    placed = sum(part["type"] == kind for message in messages for part in message["content"])
    if placed == 0:
        first_user["content"] = [{"type": kind}] * count + first_user["content"]
    elif placed != count:
        raise BadRow(f"{count} {kind}s but {placed} {kind} placeholders in the prompt; they must be equal")


def content_parts(content: Any) -> list[dict[str, Any]]:
    """Text with `<image>` and `<video>` markers, or ready-made parts, as a list of parts."""
    if isinstance(content, str):
        content = marked_parts(content)
    if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
        raise BadRow("a message's `content` must be text or a list of {type, text} parts")
    parts = [{"type": part["type"]} if part["type"] in MARKERS.values() else part for part in content]
    for part in parts:
        if part["type"] not in ("text", *MARKERS.values()):
            raise BadRow(f"a part of type {part['type']!r}; text, image and video can be used")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise BadRow("a part of type text has no `text`")
    check_reserved("".join(part.get("text") or "" for part in parts), "the conversation")
    return parts


def check_reserved(text: str, name: str) -> None:
    """Refuse text that the tokenizer would take for a picture or for the end of a turn."""
    reserved = [token for token in RESERVED_TEXT if token in text]
    if reserved:
        raise BadRow(f"{name} contains {reserved[0]}, which is reserved for pictures and turns; remove it")


def marked_parts(text: str) -> list[dict[str, Any]]:
    """Cut text at its markers; the line break that a picture brings along is not doubled."""
    first, *pieces = re.split(f"({'|'.join(MARKERS)})", text)
    parts = [{"type": "text", "text": first}]
    for marker, piece in zip(pieces[::2], pieces[1::2], strict=True):
        parts += [{"type": MARKERS[marker]}, {"type": "text", "text": piece.lstrip("\n")}]
    return [part for part in parts if part.get("text") != ""]
