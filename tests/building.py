"""What the tests of `sail-rl data` share: running a command here, and reading what it wrote."""

import json
import re

from judge_server import completion
from PIL import Image

from sail_rl.cli import make_parser


def data(*arguments):
    """Run `sail-rl data …` in this process."""
    parsed = make_parser().parse_args(["data", *map(str, arguments)])
    parsed.run_command(parsed)


def write_rows(folder, rows, name="rows.jsonl"):
    """Rows and a picture of each colour beside them."""
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (56, 56), colour).save(folder / f"{colour}.png")
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def read(file):
    """The rows of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def dropped(output):
    """(row, reason) of what an output lacks."""
    return {line["row"]: line["reason"] for line in read(output.with_suffix(".dropped.jsonl"))}


def asked_text(body):
    """The text of the last turn that an endpoint was sent."""
    return "\n".join(part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text")


def says(text, finish_reason="stop", **more):
    """A scripted endpoint's reply."""
    return (200, completion(text, finish_reason, **more))


def number_in(body):
    """The number that a question of these tests ends with."""
    return int(re.search(r"Question (\d+)", asked_text(body))[1])
