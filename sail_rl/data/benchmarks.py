"""Published benchmarks as rows of ours: which of their columns says what, as their dataset cards have it.

A source with `benchmark: mathvista` is read through this table: options are shown below the question, right answers are
letters where there are options, and numbered placeholders of pictures become ours.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sail_rl.data.images import BadRow
from sail_rl.data.sources import Rows

Row = Mapping[str, Any]
MARKER = re.compile(r"<image\s?(\d+)>")
LETTERED = re.compile(r"(?:^|[;\n])\s*([A-Z])\s*[.．:、)]\s*")  # "A. 5; B. 7"
IN_THE_PICTURE = "Answer the question in the picture."  # where a row's text is empty: MathVerse's Vision Only
# Their names of answer types -> ours; all others are told by the right answer itself.
ANSWER_TYPES = {
    **dict.fromkeys(("multi_choice", "multi-choice", "multiple choice", "multiple-choice"), "choice"),
    **{name: name for name in ("integer", "float", "list")},
}


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's columns; a dot leads into a nested one. All but question and answer may be missing in a row."""

    id: tuple[str, ...] = ("id",)
    """Together they tell a row from all others; none: its number does."""
    question: str = "question"
    answer: str = "answer"
    images: tuple[str, ...] = ("image",)
    """All pictures of a row; of `decoded_image` and `image` the first that there is."""
    options: str | None = None
    answer_is_text: bool = False
    """The right option's text instead of its letter."""
    answer_type: str | None = None
    precision: str | None = None
    """Digits behind the point that a number is right to."""
    type: str | None = None
    """By these three, accuracies are given."""
    category: str | None = None
    difficulty: str | None = None


BENCHMARKS = {
    "mathvista": Benchmark(
        ("pid",),
        images=("decoded_image", "image"),
        options="choices",
        answer_is_text=True,
        answer_type="answer_type",
        precision="precision",
        type="question_type",
        category="metadata.task",
    ),
    "mathvision": Benchmark(
        images=("decoded_image", "image"), options="options", category="subject", difficulty="level"
    ),
    "mathverse": Benchmark(
        ("sample_index",), answer_type="question_type", type="problem_version", category="metadata.subject"
    ),
    "dynamath": Benchmark(
        answer="ground_truth",
        images=("decoded_image", "image"),
        answer_type="answer_type",
        type="answer_type",
        category="subject",
        difficulty="knowledge_level",
    ),
    "wemath": Benchmark(
        ("ID", "key"), images=("image_path",), options="option", type="key", category="knowledge concept"
    ),
    "logicvista": Benchmark(("imagename",), images=("image", "imagename"), category="skill", type="capability"),
    "mmmu": Benchmark(
        images=tuple(f"image_{number}" for number in range(1, 8)),
        options="options",
        type="question_type",
        category="subfield",
        difficulty="topic_difficulty",
    ),
    "ocrbench": Benchmark((), type="question_type", category="dataset"),
}
# Columns that hold the same picture in two forms.
SAME_PICTURE = (("decoded_image", "image"), ("image", "imagename"))
# Benchmarks whose answers are of one type, whatever they look like.
ONE_TYPE = {"ocrbench": "text"}


class BenchmarkRows:
    """The rows of a source, as rows of ours."""

    def __init__(self, rows: Rows, benchmark: str):
        self.rows, self.benchmark = rows, benchmark
        self.name, self.folder, self.checked_at_start = rows.name, rows.folder, rows.checked_at_start

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Any]:
        """Raises BadRow for one that lacks a column that its benchmark has."""
        return converted(self.rows.row(index), self.benchmark, index)


def converted(row: Row, name: str, number: int) -> dict[str, Any]:
    """A row of a benchmark, under our column names."""
    benchmark = BENCHMARKS[name]
    for column in (benchmark.question, benchmark.answer):
        if column not in row:
            raise BadRow(f"no column {column!r}, which {name} has; the row has: {', '.join(map(str, row))}")
    options = listed(found(row, benchmark.options))
    answers = right_answers(row[benchmark.answer], options, benchmark)
    question = str(row[benchmark.question] or "").strip() or IN_THE_PICTURE
    text, images = with_pictures(with_options(question, options), pictures_of(row, benchmark))
    more: dict[str, Any] = {
        key: shortened(found(row, getattr(benchmark, key))) for key in ("type", "category", "difficulty")
    }
    more |= {"answer_type": answer_type(row, name, options), "tolerance": tolerance(row, benchmark)}
    more |= {"options": options or None, "alternatives": answers[1:] or None}
    identifier = "/".join(str(row[column]) for column in benchmark.id if column in row) or str(number + 1)
    facts = {"id": f"{name}/{identifier}", "benchmark": name, "question": text, "answer": answers[0], "images": images}
    return facts | {key: value for key, value in more.items() if value is not None}


def found(row: Row, column: str | None) -> Any:
    """The value of a column, which may be nested; None where there is none."""
    value: Any = row
    for part in column.split(".") if column else []:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if column else None


def listed(value: Any) -> list[str]:
    """Options or answers as texts, from a list, the text of one, or `A. 5; B. 7`; empty where there is none."""
    if value is None or value == "":
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise BadRow(f"{value[:60]!r} is not a list of options") from None
    if isinstance(value, str):
        pieces = LETTERED.split(value)
        return [text.strip().rstrip(";").strip() for text in pieces[2::2]] if len(pieces) > 2 else [value]
    return [str(one) for one in value]


def right_answers(answer: Any, options: Sequence[str], benchmark: Benchmark) -> list[str]:
    """All answers that are right, the first one being the answer; a letter where there are options."""
    given = listed(answer) if isinstance(answer, list | tuple) or str(answer).startswith("['") else [str(answer)]
    given = [one for one in given if one.strip() and answer is not None]
    if not given:
        raise BadRow("no right answer; the benchmark keeps it to itself, or the column is empty")
    if not options or not benchmark.answer_is_text:
        return given
    if given[0] not in options:
        raise BadRow(f"the answer {given[0]!r} is none of the options {list(options)}")
    return [letter(options.index(given[0]))]


def letter(index: int) -> str:
    """Of an option."""
    return chr(ord("A") + index)


def with_options(question: str, options: Sequence[str]) -> str:
    """The question with a line for each option."""
    return "\n".join([question, *(f"{letter(index)}. {text}" for index, text in enumerate(options))])


def pictures_of(row: Row, benchmark: Benchmark) -> list[Any]:
    """The row's pictures, in the order of the columns."""
    there = [row[column] for column in benchmark.images if row.get(column) is not None]
    return there[:1] if benchmark.images in SAME_PICTURE else there


def with_pictures(text: str, pictures: Sequence[Any]) -> tuple[str, list[Any]]:
    """The text with our placeholder for each picture, and the pictures in that order.

    A picture that is mentioned again is named by its number; those that are never mentioned come first.
    """
    mentioned: list[int] = []

    def placed(match: re.Match) -> str:
        number = int(match[1])
        if number > len(pictures) or number in mentioned:
            return f"image {number}"
        mentioned.append(number)
        return "<image>"

    text = MARKER.sub(placed, text)
    others = [number for number in range(1, len(pictures) + 1) if number not in mentioned]
    if mentioned:
        text = "<image>\n" * len(others) + text
    return text, [pictures[number - 1] for number in others + mentioned]


def answer_type(row: Row, name: str, options: Sequence[str]) -> str | None:
    """Ours; None where the right answer tells it."""
    if options:
        return "choice"
    return ONE_TYPE.get(name) or ANSWER_TYPES.get(str(found(row, BENCHMARKS[name].answer_type)))


def tolerance(row: Row, benchmark: Benchmark) -> dict[str, float] | None:
    """What rounding to the row's precision leaves open."""
    digits = found(row, benchmark.precision)
    is_float = found(row, benchmark.answer_type) == "float"
    return {"absolute": 0.5 * 10.0 ** -int(digits)} if digits is not None and is_float else None


def shortened(value: Any) -> str | None:
    """A value to tell answers apart by; several are one."""
    if value is None:
        return None
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
