"""`report.html`: one self-contained page per run folder, for a reader without this package and without a network.

Python gathers the run's files into one JSON document (series, cards, pictures as data URIs); `report_template.html`
draws it. What a model or a dataset wrote reaches the page as text nodes, never as markup. A young run lacks some files:
the page is made from what is there and names the rest.
"""

import base64
import hashlib
import html
import io
import json
import math
import os
import random
import re
from pathlib import Path
from typing import Any

from PIL import Image

Row = dict[str, Any]
Series = dict[str, list[list[float | None]]]  # per metric its points [step, value]

# Together these keep the page below about 8 MB, also with photographs and long reasoning.
MAX_PAIRS, MAX_TRANSCRIPTS, MAX_GROUPS, MAX_POINTS = 200, 10, 4, 1000
MAX_COMPLETION, MAX_PICTURES_BYTES = 5000, 4_000_000  # characters of one, data URIs of all
MAX_PICTURE_SIDE, MAX_PICTURE_BYTES = 384, 16_000  # a file above either is encoded again

CARD_KEYS = ("id", "question", "answer", "family", "difficulty", "novel")
ANSWER_KEYS = ("correct", "reward", "advantage", "finish_reason", "rewards")
PREDICTIONS = ("predictions_before.jsonl", "predictions_after.jsonl")
FILES = ("config.yaml", "metrics.jsonl", "summary.json", "environment.json", *PREDICTIONS, "transcripts")


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from what the run folder holds by now and return its path."""
    run_dir = run_dir.resolve()
    before, after = Path(__file__).with_name("report_template.html").read_text("utf-8").split("{{data}}")
    # Without "<" no string of the document can end its script block.
    document = json.dumps(gather(run_dir), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    page = before.replace("{{title}}", html.escape(run_dir.name)) + document + after
    unfinished, target = run_dir / "report.html.tmp", run_dir / "report.html"
    # "replace": a completion may hold half a surrogate pair, which UTF-8 cannot carry.
    unfinished.write_bytes(page.encode("utf-8", "replace"))
    os.replace(unfinished, target)
    return target


def gather(run_dir: Path) -> Row:
    """The document that the page draws."""
    problems: list[str] = []
    pictures = Pictures(run_dir)
    config = read_text(run_dir / "config.yaml")
    summary = read_json(run_dir / "summary.json", problems)
    series = metric_series(read_rows(run_dir / "metrics.jsonl", problems))
    # Before the first step only the recipe can tell the stage; an unused section of it may be there as null.
    grpo = "reward" in series if series else bool(re.search(r"^grpo:\s*$", config, re.MULTILINE))
    expected = [name for name in FILES if grpo or name != "transcripts"]  # SFT has no rollouts to show
    total, pairs = validation_pairs(run_dir, pictures, problems)
    return {
        "run": run_dir.name,
        "stage": "GRPO" if grpo else "SFT",
        "missing": [name for name in expected if not (run_dir / name).exists()],
        "tiles": [*accuracy_tiles(summary), *progress_tiles(summary, series)],
        "summary": summary,
        "series": {key: spread(points, MAX_POINTS) for key, points in series.items()},
        "pairs": pairs,
        "pairs_total": total,
        "transcripts": training_steps(run_dir, pictures, problems),
        "pictures": pictures.uris,
        "config": config,
        "environment": flatten(read_json(run_dir / "environment.json", problems)),
        "problems": problems,
    }


def parse(text: str, where: str, problems: list[str]) -> Row | None:
    """One JSON object, NaN and infinities as None; what cannot be read is named on the page and gives None."""
    try:
        value = json.loads(text, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        value = str(error)
    if isinstance(value, dict):
        return value
    problems.append(f"{where} holds no JSON object: {str(value)[:80]}")
    return None


def read_text(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.exists() else ""


def read_json(path: Path, problems: list[str]) -> Row:
    return parse(read_text(path) or "{}", path.name, problems) or {}


def read_rows(path: Path, problems: list[str]) -> list[Row]:
    """The rows of a JSONL file (none where it is missing); bad lines, as a killed run leaves them, are skipped."""
    # Not splitlines(): it also splits at U+2028 and the like, which a completion may hold.
    lines = enumerate(read_text(path).split("\n"), 1)
    rows = [parse(line, f"{path.name} line {number}", problems) for number, line in lines if line.strip()]
    return [row for row in rows if row]


def spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spaced, the first and the last among them."""
    last = len(items) - 1
    return items if last < count else [items[round(i * last / (count - 1))] for i in range(count)]


def metric_series(rows: list[Row]) -> Series:
    """An absent key is no point, a null is a gap in the line."""
    by_step: dict[int, Row] = {}
    for row in rows:  # A resumed run writes some steps again: the later row counts.
        by_step.setdefault(row["step"], {}).update(row)
    series: Series = {}
    for step, row in sorted(by_step.items()):
        for key, value in row.items():
            if key != "step" and (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
                series.setdefault(key, []).append([step, None if value is None else float(f"{value:.5g}")])
    return {key: points for key, points in series.items() if any(value is not None for _, value in points)}


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def accuracy_tiles(summary: Row) -> list[tuple[str, str, str]]:
    """(label, value, note) of what the evaluations say."""
    before, after, majority = (summary.get(key) for key in ("accuracy_before", "accuracy_after", "majority_rate"))
    formed = [summary.get(f"well_formed_{when}") for when in ("before", "after")]
    note = "not measured yet" if before is None or after is None else gain(before, after, summary.get("eval_questions"))
    note += "" if majority is None else f", majority rate {percent(majority)}"
    tiles = [("Validation accuracy", f"{percent(before)} → {percent(after)}", note)]
    return tiles + ([("Well formed", " → ".join(map(percent, formed)), "")] if any(formed) else [])


def gain(before: float, after: float, questions: int | None) -> str:
    """The difference in points; below two standard errors it is called noise."""
    words = f"{100 * (after - before):+.1f} points"
    if not questions:
        return words
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / questions)
    return f"{words} on {questions:,} questions{' (within noise)' if abs(after - before) < 2 * error else ''}"


def progress_tiles(summary: Row, series: Series) -> list[tuple[str, str, str]]:
    seconds = summary.get("seconds")
    steps = summary.get("steps") or max((points[-1][0] or 0 for points in series.values()), default=0)
    tiles = [("Steps", f"{steps:,.0f}", ""), ("Training time", "–" if seconds is None else duration(seconds), "")]
    # The loss of GRPO says nothing about progress.
    wanted = [("Completion length", "completion/length", 0)] + ([] if "reward" in series else [("Loss", "loss", 3)])
    for label, key, digits in wanted:
        if values := [value for _, value in series.get(key, []) if value is not None]:
            width = max(1, min(5, len(values) // 2))
            first, last = (sum(part) / width for part in (values[:width], values[-width:]))
            tiles.append((label, f"{first:.{digits}f} → {last:.{digits}f}", f"first and last {width} steps"))
    return tiles


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


class Pictures:
    """Pictures as data URIs, each distinct content once; cards refer to them by key."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.uris: dict[str, str] = {}
        self.room = MAX_PICTURES_BYTES

    def key(self, image: str) -> str:
        """The key in `uris`; a picture that cannot be shown gives the words to put in its place."""
        try:
            content = (self.run_dir / image).read_bytes()
            key = hashlib.sha256(content).hexdigest()[:16]
            uri = self.uris.get(key) or data_uri(content)
        except OSError:
            return f"{image}: no readable picture"
        if key not in self.uris and len(uri) > self.room:
            return f"{image}: left out to keep this page small"
        self.room -= 0 if key in self.uris else len(uri)
        self.uris[key] = uri
        return key


def data_uri(content: bytes) -> str:
    """The file as it is where it is small, else scaled down as WebP."""
    with Image.open(io.BytesIO(content)) as picture:
        kind = str(picture.format)
        small = max(picture.size) <= MAX_PICTURE_SIDE and len(content) <= MAX_PICTURE_BYTES
        if not small or kind not in ("PNG", "JPEG", "WEBP"):
            scaled = picture.convert("RGBA")
            scaled.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
            buffer = io.BytesIO()
            scaled.save(buffer, "WEBP", quality=80)
            kind, content = "WEBP", buffer.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode('ascii')}"


def card(row: Row, pictures: Pictures) -> Row:
    """What all completions of one question share."""
    shared = {key: row[key] for key in CARD_KEYS if row.get(key) is not None}
    return shared | {"images": [pictures.key(str(image)) for image in row.get("images") or []]}


def answer(row: Row | None) -> Row | None:
    """One completion and its judgement; of a very long one the beginning and the end, where the answer stands."""
    if row is None:
        return None
    text, half = str(row.get("completion") or ""), MAX_COMPLETION // 2
    if len(text) > MAX_COMPLETION:
        text = f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"
    return {key: row[key] for key in ANSWER_KEYS if row.get(key) is not None} | {"completion": text}


def validation_pairs(run_dir: Path, pictures: Pictures, problems: list[str]) -> tuple[int, list[Row]]:
    """How many questions there are, and some of them with the completions before and after."""
    before, after = ({str(row["id"]): row for row in read_rows(run_dir / name, problems)} for name in PREDICTIONS)
    ids = list(before | after)
    # At random and not every k-th: the families may take turns in the file.
    shown = [ids[i] for i in sorted(random.Random(0).sample(range(len(ids)), min(len(ids), MAX_PAIRS)))]
    pairs = [
        card(before.get(q) or after[q], pictures) | {"before": answer(before.get(q)), "after": answer(after.get(q))}
        for q in shown
    ]
    return len(ids), pairs


def training_steps(run_dir: Path, pictures: Pictures, problems: list[str]) -> list[Row]:
    """An even sample of the logged steps, each with its first groups."""
    steps = []
    for path in spread(sorted((run_dir / "transcripts").glob("step_*.jsonl")), MAX_TRANSCRIPTS):
        groups: dict[str, list[Row]] = {}
        for row in read_rows(path, problems):
            groups.setdefault(str(row["id"]), []).append(row)
        first = list(groups.values())[:MAX_GROUPS]
        shown = [card(group[0], pictures) | {"members": [answer(row) for row in group]} for group in first]
        steps.append({"step": int(path.stem.removeprefix("step_")), "groups": shown})
    return steps


def flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text) rows."""
    if isinstance(value, dict):
        return [row for key, part in value.items() for row in flatten(part, f"{name}.{key}" if name else str(key))]
    return [(name, value if isinstance(value, str) else json.dumps(value))]
