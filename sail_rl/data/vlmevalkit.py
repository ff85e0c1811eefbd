"""VLMEvalKit's files: its TSV of questions with pictures in base64, read and written; its files of predictions.

A row of the TSV has `index`, `question`, options in columns `A`, `B`, ..., `answer` and `image`: base64, a list of such
texts, or the index of another row that has the picture. `image_path` may stand in its place, `hint` and `category`
beside it.
"""

import ast
import base64
import binascii
import csv
import io
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from sail_rl.command_line import BadInput
from sail_rl.data.example import answer_text, image_column, prompt_of
from sail_rl.data.images import IMAGE_ERRORS, BadRow, open_image

LONGEST_INDEX = 64  # characters; a longer `image` is a picture
PREDICTION_FILES = (".tsv", ".json")
QUESTION_COLUMNS = ("index", "id", "question", "answer", "category", "question_type", "image", "image_path")
csv.field_size_limit(2**31 - 1)  # pictures are long


class TsvRows:
    """A .tsv of VLMEvalKit's, read a row at a time through an index of row starts; rows under our column names."""

    checked_at_start = 500  # their pictures come along, and may be large

    def __init__(self, path: Path):
        self.name, self.folder, self.path = str(path), path.parent, path
        self.starts = array("q")
        self.places: dict[str, int] = {}
        """Where the row with an index is, for pictures that several rows share."""
        self.columns: list[str] = []
        for start, values in self._records():
            if not self.columns:
                self.columns = values
                continue
            self.starts.append(start)
            if "index" in self.columns and len(values) == len(self.columns):
                self.places[values[self.columns.index("index")]] = len(self.starts) - 1
        missing = [name for name in ("index", "question") if name not in self.columns]
        if missing:
            raise BadInput(
                f"{path}: no column {missing[0]!r} in its first line; a .tsv is a question file of VLMEvalKit's"
            )

    def _records(self, start: int = 0) -> Iterator[tuple[int, list[str]]]:
        """(place in the file, values) of each record from a place on; a quoted value may go over several lines."""
        with self.path.open("rb") as file:
            file.seek(start)
            position = [start]

            def lines() -> Iterator[str]:
                for line in file:
                    position[0] += len(line)
                    yield line.decode("utf-8-sig" if position[0] == len(line) else "utf-8")

            reader = csv.reader(lines(), delimiter="\t")
            while True:
                begin = position[0]
                values = next(reader, None)
                if values is None:
                    return
                if values:
                    yield begin, values

    def __len__(self) -> int:
        return len(self.starts)

    def raw(self, index: int) -> dict[str, str]:
        """The columns of a row that are not empty."""
        _, values = next(self._records(self.starts[index]))
        if len(values) != len(self.columns):
            raise BadRow(f"{len(values)} values for {len(self.columns)} columns")
        return {name: value for name, value in zip(self.columns, values, strict=True) if value != ""}

    def row(self, index: int) -> dict[str, Any]:
        """Raises BadRow for a picture that is not base64, or is another row's that there is not."""
        row = self.raw(index)
        return question_row(row, self.pictures(row))

    def pictures(self, row: Mapping[str, str]) -> list[Any]:
        """The row's own pictures, or those of the row that it names."""
        given = row.get("image")
        if given is not None and len(given) <= LONGEST_INDEX and given in self.places:
            given = self.raw(self.places[given]).get("image")
        if given is None:
            return several(row["image_path"]) if "image_path" in row else []
        return [decoded(text) for text in several(given)]


def several(text: str) -> list[str]:
    """One text, or those of a list that is written as text."""
    try:
        return [str(one) for one in ast.literal_eval(text)] if text.startswith("[") else [text]
    except (ValueError, SyntaxError):
        raise BadRow(f"{text[:40]!r} begins like a list of pictures, but is none") from None


def decoded(text: str) -> bytes:
    """A picture's bytes."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadRow(f"`image` is neither base64 nor the index of another row: {text[:40]!r}") from None


def options_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The options, from A on without a gap."""
    found: dict[str, str] = {}
    for letter in ascii_uppercase:
        if row.get(letter) in (None, ""):
            break
        found[letter] = str(row[letter])
    return found


def question_row(row: Mapping[str, str], pictures: Sequence[Any]) -> dict[str, Any]:
    """A row of the TSV under our column names, its options below the question."""
    options = options_of(row)
    hint = [f"Hint: {row['hint']}"] if "hint" in row else []
    lines = [*hint, row.get("question", ""), *(f"{letter}. {text}" for letter, text in options.items())]
    ours: dict[str, Any] = {"id": row.get("index"), "question": "\n".join(lines), "images": list(pictures)}
    if "answer_option" in row:  # MathVista's: the letter of the answer, which is a text
        ours |= {"answer": row["answer_option"], "answer_type": "choice", "alternatives": [row["answer"]]}
    elif "answer" in row:
        ours |= {"answer": row["answer"]} | ({"answer_type": "choice"} if options else {})
    types = {"type": row.get("question_type"), "category": row.get("category")}
    return ours | {"options": options or None} | {name: value for name, value in types.items() if value}


def write_questions(rows: Iterable[tuple[Mapping[str, Any], Path]], output: Path) -> None:
    """Rows of ours, each with the folder of its pictures, as a TSV of VLMEvalKit's.

    Options stay in the question, where our rows have them.
    """
    written = (question_record(row, folder, number) for number, (row, folder) in enumerate(rows))
    write_table(QUESTION_COLUMNS, written, output)


def question_record(row: Mapping[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """One row; raises BadRow for a picture that cannot be read."""
    pictures = [encoded(image, folder) for image in image_column(row)]
    names = [f"{number}_{place}.png" for place in range(len(pictures))]  # VLMEvalKit unpacks several under these
    facts = {"index": number, "id": row.get("id", ""), "question": asked_text(row), "answer": answer_text(row)}
    more = {"category": row.get("category", ""), "question_type": row.get("type", "")}
    return facts | more | {"image": one_or_list(pictures), "image_path": one_or_list(names)}


def one_or_list(texts: Sequence[str]) -> str:
    """One text, or a list of several as text; empty for none."""
    return texts[0] if len(texts) == 1 else str(list(texts)) if texts else ""


def asked_text(row: Mapping[str, Any]) -> str:
    """The question of a row that asks one; raises BadRow for a conversation, for which the file has no place."""
    question = prompt_of(row)
    if not isinstance(question, str):
        raise BadRow("a conversation; a .tsv has rows with one `question`")
    return question


def encoded(image: Any, folder: Path) -> str:
    """A picture in base64, in the file format that it has."""
    if isinstance(image, dict) and image.get("bytes") is not None:
        image = image["bytes"]
    if isinstance(image, bytes):
        return base64.b64encode(image).decode()
    try:
        if isinstance(image, str):
            return base64.b64encode((folder / image).read_bytes()).decode()
        buffer = io.BytesIO()
        open_image(image, folder).save(buffer, "PNG")
    except IMAGE_ERRORS as error:
        raise BadRow(f"image {image} cannot be read: {error}") from None
    return base64.b64encode(buffer.getvalue()).decode()


def write_predictions(predictions: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Predictions as VLMEvalKit keeps them: the question file's columns without pictures, and `prediction`."""
    records = [prediction_record(one) for one in predictions]
    columns = sorted({name for record in records for name in record if name in ascii_uppercase})
    write_table(["index", "question", *columns, "answer", "category", "prediction"], records, output)


def prediction_record(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """One prediction; the options in columns of their own and not in the question."""
    options = prediction.get("options") or {}
    letters = options if isinstance(options, Mapping) else dict(zip(ascii_uppercase, options, strict=False))
    letters = {letter: text for letter, text in letters.items() if text is not None}
    below = "".join(f"\n{letter}. {text}" for letter, text in letters.items())
    facts = {"index": prediction["id"], "question": prediction["question"].removesuffix(below), **letters}
    more = {"answer": prediction["answer"], "category": prediction.get("category") or ""}
    return facts | more | {"prediction": prediction["completion"]}


def write_table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], output: Path) -> None:
    """Rows as .tsv or .json (a list of records), by the file's ending; the file is there when all of it is."""
    check_ending(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(output.suffix + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        if output.suffix == ".json":
            json.dump([{name: row.get(name, "") for name in columns} for row in rows], file)
        else:
            writer = csv.DictWriter(file, columns, restval="", delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    temporary.replace(output)


def check_ending(file: Path) -> None:
    """Refuse what cannot be read and written without a further package."""
    if file.suffix not in PREDICTION_FILES:
        raise BadInput(f"{file}: give it the ending .tsv or .json; VLMEvalKit reads both (PRED_FORMAT=tsv or json)")


def read_predictions(file: Path) -> list[dict[str, Any]]:
    """The records of a file of predictions; each must have `index` and `prediction`."""
    check_ending(file)
    if not file.is_file():
        raise BadInput(f"{file}: there is no such file")
    if file.suffix == ".json":
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(f"{file} is not valid JSON: {error}") from None
    else:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines, delimiter="\t"))
    for number, row in enumerate(rows, 1):
        missing = [name for name in ("index", "prediction") if name not in row]
        if missing:
            raise BadInput(f"{file}: row {number} has no {missing[0]!r}; it has: {', '.join(map(str, row))}")
    return rows
