"""Rows that hold anything at all: a good example or a bad row with a reason, and the rest in the order it had."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from rewards.gold import check_golds
from rewards.ladder import Row
from sail_rl.data.example import make_example
from sail_rl.data.images import BadRow
from sail_rl.data.mixture import JoinedRows, Part
from sail_rl.data.sources import JsonLinesRows
from sail_rl.data.stream import RowStream, Shard

GOOD = {"question": "Why?", "answer": "1", "images": ["a.png"]}
KEYS = ("question", "prompt", "messages", "completion", "answer", "solution", "images", "image", "videos", "video")
KEYS += ("options", "answer_type", "tolerance", "id", "kind")
ATOMS = (None, True, 0, -1, 1e400, float("nan"), 10**30, "", " ", "a", "<image>", "<image><image>", "<video>", "a.png")
ATOMS += ("none.png", "\0", "\ud800", "(A)", r"2\sqrt{", "9^9^9", "x" * 5000, "/dev/null", "..", "integer", "letter")
PARTS = ("role", "content", "type", "text", "path", "bytes")


def anything(chance, depth=0):
    """A value of JSON, often of the form of a conversation or a picture."""
    form = 0 if depth > 3 else chance.choice([0, 0, 0, 1, 2, 3])
    if form == 1:
        return [anything(chance, depth + 1) for _ in range(chance.randrange(4))]
    if form == 2:
        return {chance.choice(PARTS): anything(chance, depth + 1) for _ in range(chance.randrange(4))}
    if form == 3:
        return [{"role": chance.choice(["user", "assistant", None]), "content": anything(chance, depth + 1)}]
    return chance.choice(ATOMS)


@pytest.mark.fault(
    fault="data: columns that hold anything",
    injected="1,500 rows with random values of JSON in one to three columns",
    expected="an example or a bad row, nothing else",
)
def test_whatever_a_row_holds_it_is_an_example_or_a_bad_row(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    chance, bad = random.Random(0), 0
    for number in range(1500):
        changed = {chance.choice(KEYS): anything(chance) for _ in range(chance.randrange(1, 4))}
        try:
            make_example(GOOD | changed, "row", {}, tmp_path, compared=number % 2 == 0)
        except BadRow as reason:
            bad += len(str(reason)) > 0
    assert 300 < bad < 1400


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"options": 1e400}, "`options` must be a list of texts, not float"),
        ({"answer_type": ["integer"]}, "`answer_type` must be text, not list"),
        ({"tolerance": 0.1}, "`tolerance` must be like {relative: 0.05}, not float"),
        ({"tolerance": {"relative": "0.1"}}, "`tolerance` holds '0.1', which is no number"),
    ],
)
def test_what_stands_beside_a_right_answer_is_checked(columns, problem):
    good = {"gold": "1", "answer_type": None, "options": None, "tolerance": None}
    assert check_golds([Row(**good), Row(**good | columns)]) == [None, problem]


LINES = {
    "torn": b'{"question": "Why?", "ans',
    "no JSON": b"\xff\xfe\x00",
    "no object": b"[1, 2]",
    "endless brackets": b"[" * 100_000,
    "a number of 5,000 digits": b'{"question": ' + b"1" * 5000 + b"}",
    "nothing in it": b"{}",
}


def open_stream(folder, most):
    """Good rows with the bad lines among them."""
    lines = [json.dumps({"id": f"r{n}", "question": "Why?", "answer": "1"}).encode() for n in range(12)]
    bad = {n: lines[n] for n in range(12)} | dict(zip(range(0, 12, 2), LINES.values(), strict=True))
    (folder / "rows.jsonl").write_bytes(b"\n".join(bad[n] for n in range(12)))
    return RowStream(
        JoinedRows([Part(JsonLinesRows(folder / "rows.jsonl"))]),
        lambda example, _: example.id,
        seed=0,
        shuffle=False,
        max_bad_rows=most,
        quarantine_file=folder / "quarantine.jsonl",
        shard=Shard(),
    )


@pytest.mark.fault(
    fault="data: lines that are no row",
    injected="torn, binary, 100,000 brackets, 5,000 digits, other values than objects",
    expected="set aside at the start; the order of the rest unchanged",
)
def test_lines_that_are_no_row(tmp_path):
    stream = open_stream(tmp_path, len(LINES))
    stream.check_rows()
    assert stream.next_items(6) == [f"r{n}" for n in range(1, 12, 2)]


@pytest.mark.fault(
    fault="data: killed while a bad row is written down",
    injected="half a last line in quarantine.jsonl",
    expected="the run goes on, with each bad row once",
)
def test_half_a_line_in_the_list_of_bad_rows(tmp_path):
    open_stream(tmp_path, len(LINES)).check_rows()
    file: Path = tmp_path / "quarantine.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    stream = open_stream(tmp_path, len(LINES))
    assert len(stream.bad_rows) == len(LINES) - 1
    stream.check_rows()
    assert file.read_bytes() == whole
