"""The four ways in which an SFT row is bad: each is set aside with its id and the reason, wherever it is met."""

import json
import re

import pytest
from PIL import Image

from sail_rl.command_line import BadInput
from sail_rl.config import SftSection
from sail_rl.config_data import DataSection
from sail_rl.data.mixture import JoinedRows, Part
from sail_rl.data.prompting import make_sample
from sail_rl.data.sources import JsonLinesRows
from sail_rl.data.stream import RowStream, Shard
from sail_rl.model.tiny import tiny_processor

ROWS = 12
PLACES = (0, 4, 7, 11)  # the first and the last row among them
TRACE = "<think>It is as it looks.</think>\n\\boxed{{{}}}"


def turns(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]


def good_row(number):
    return {"id": f"r{number}", "messages": turns("Why?", TRACE.format(number)), "images": ["good.png"]}


BAD = {
    "a broken image": ({"images": ["torn.png"]}, "image torn.png cannot be read"),
    "an image that is not there": ({"images": ["none.png"]}, "cannot be read: .*none.png"),
    "no turn of the assistant's": ({"messages": turns("Why?")}, "does not end with a turn of the assistant's"),
    "an empty turn": ({"messages": turns("Why?", " ")}, "must be text, and not empty"),
    "a think block that is not closed": ({"messages": turns("Why?", "<think>It is 3.")}, "think tags are <think>;"),
    "a target over the limit": (
        {"messages": turns("Why?", TRACE.format("so " * 400))},
        r"prompt and target have \d+ tokens; sft.max_length = 300",
    ),
}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(["Why? <think>It is as it looks.</think>\n\\boxed{2} so so"] * 3)


def open_stream(folder, processor, bad_rows, most):
    """A stream of SFT samples, with these rows in the place of good ones."""
    picture = Image.new("RGB", (56, 56), "red")
    picture.putdata([(x * 7 % 256, x * 5 % 256, x * 3 % 256) for x in range(56 * 56)])
    picture.save(folder / "good.png")
    content = (folder / "good.png").read_bytes()
    (folder / "torn.png").write_bytes(content[: len(content) // 2])
    rows = [good_row(number) | bad_rows.get(number, {}) for number in range(ROWS)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data, sft = DataSection(train="rows.jsonl"), SftSection(max_length=300)
    return RowStream(
        JoinedRows([Part(JsonLinesRows(folder / "rows.jsonl"))]),
        lambda example, _: make_sample(example, processor, data, sft, "terse").prompt.id,
        seed=0,
        shuffle=True,
        max_bad_rows=most,
        quarantine_file=folder / "quarantine.jsonl",
        shard=Shard(),
    )


def order(stream, count):
    """The ids of the next rows, in steps of four."""
    return [name for _ in range(count // 4) for name in stream.next_items(4)]


def checked_order(stream):
    """The same after the check at the start, as a run does it."""
    stream.check_rows()
    return order(stream, ROWS)


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("checked", [True, False], ids=["checked at start", "met on the way"])
@pytest.mark.fault(
    fault="data: bad rows within data.max_bad_rows",
    injected="torn and missing pictures, empty turns, targets too long, at start and on the way",
    expected="set aside with id and reason; the order of the rest unchanged",
)
def test_they_are_set_aside_and_the_rest_keeps_its_order(tmp_path, processor, kind, checked):
    change, reason = BAD[kind]
    whole = order(open_stream(tmp_path, processor, {}, 0), 2 * ROWS)
    bad = {f"r{place}" for place in PLACES}
    stream = open_stream(tmp_path, processor, dict.fromkeys(PLACES, change), len(PLACES))
    if checked:
        stream.check_rows()
    left = [name for name in whole if name not in bad]
    assert order(stream, len(left) // 4 * 4) == left[: len(left) // 4 * 4]
    records = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted((one["row"], one["id"]) for one in records) == [(place + 1, f"r{place}") for place in PLACES]
    assert all(re.search(reason, one["reason"]) for one in records), records
    assert len(stream.bad_rows) == len(PLACES)  # what `data/bad_rows` tells


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.fault(
    fault="data: one bad row more than allowed",
    injected="the same",
    expected="the run ends; all are named",
)
def test_one_more_than_allowed_ends_the_run(tmp_path, processor, kind):
    change, reason = BAD[kind]
    stream = open_stream(tmp_path, processor, dict.fromkeys(PLACES, change), 3)
    with pytest.raises(BadInput, match=r"4 rows cannot be used, and data\.max_bad_rows = 3") as ended:
        checked_order(stream)
    assert re.search(reason, str(ended.value))
    assert all(f"row {place + 1} (id r{place})" in str(ended.value) for place in PLACES)
