"""Rows become examples, or say why not; streams have one order on every process, without the bad rows."""

import io
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from sail_rl.command_line import BadInput
from sail_rl.config import SftRecipe
from sail_rl.config_data import FileSource
from sail_rl.data.example import BadRow, make_example
from sail_rl.data.mixture import JoinedRows, Part
from sail_rl.data.prompting import pick_trace, target_text
from sail_rl.data.sources import JsonLinesRows, open_rows
from sail_rl.data.stream import RowStream, Shard
from sail_rl.launch import counted_in_steps

IMAGE, RED = {"type": "image"}, (255, 0, 0)
HUGE_PNG = b"P6 20000 20000 255\n"  # the header of a picture of 400 million pixels; its name does not count


def text(value):
    return {"type": "text", "text": value}


def turn(*parts, role="user"):
    return {"role": role, "content": list(parts)}


def png(size=(4, 2)):
    buffer = io.BytesIO()
    Image.new("RGB", size, RED).save(buffer, "PNG")
    return buffer.getvalue()


def example_of(folder, **row):
    return make_example({"answer": "1"} | row, "row 1", {}, folder)


UNREADABLE = {"no": None, "text": b"no picture", "empty": b"", "cut": png((50, 50))[:-40], "huge": HUGE_PNG}
PICTURE = {"bytes": png(), "path": None}
TALK = [{"role": "system", "content": "S"}, turn(text("A")), turn(text("B"), role="assistant"), turn(text("C"))]


@pytest.mark.parametrize(
    ("row", "messages", "question", "conversational"),
    [
        ({"question": "Why?"}, [turn(text("Why?"))], "Why?", False),
        ({"prompt": "Why?"}, [turn(text("Why?"))], "Why?", False),
        ({"prompt": None, "question": "Why?"}, [turn(text("Why?"))], "Why?", False),
        ({"prompt": [{"role": "user", "content": "Why?"}]}, [turn(text("Why?"))], "Why?", True),
        ({"prompt": TALK}, [turn(text("S"), role="system"), *TALK[1:]], "C", True),
        ({"question": "Why?", "images": [PICTURE] * 2}, [turn(IMAGE, IMAGE, text("Why?"))], "Why?", False),
        ({"question": "A<image>\nB", "images": PICTURE}, [turn(text("A"), IMAGE, text("B"))], "AB", False),
        ({"prompt": [turn(text("A"), IMAGE | {"text": None})], "images": PICTURE}, [turn(text("A"), IMAGE)], "A", True),
        (
            {"messages": [*TALK, turn(text("D"), role="assistant")]},
            [turn(text("S"), role="system"), *TALK[1:]],
            "C",
            True,
        ),
    ],
)
def test_prompt_forms(tmp_path, row, messages, question, conversational):
    example = example_of(tmp_path, **row)
    assert example.messages == messages
    assert (example.question, example.conversational) == (question, conversational)


IN_BYTES, IN_FILE = {"bytes": png(), "path": "elsewhere.png"}, {"bytes": None, "path": "a.png"}
PILLOW = Image.new("RGB", (4, 2), RED)
FORMS = [("a.png", "a.png"), (png(), None), (IN_BYTES, None), (IN_FILE, None), (PILLOW, None)]


@pytest.mark.parametrize(("image", "path"), FORMS, ids=["path", "bytes", "bytes in a dict", "path in a dict", "Pillow"])
def test_image_forms(tmp_path, image, path):
    (tmp_path / "a.png").write_bytes(png())
    for column in ({"images": [image]}, {"images": image}, {"image": image}):
        example = example_of(tmp_path, question="Why?", **column)
        assert [(image.mode, image.size, image.getpixel((0, 0))) for image in example.images] == [("RGB", (4, 2), RED)]
        assert example.columns["images"] == [str(tmp_path / path) if path else None]


@pytest.mark.parametrize("mode", ["P", "CMYK", "RGBA", "L", "1"])
@pytest.mark.fault(
    fault="image: other modes",
    injected="P, CMYK, RGBA, L, 1",
    expected="RGB with the same colour",
)
def test_every_mode_becomes_rgb(tmp_path, mode):
    (picture,) = example_of(tmp_path, question="Why?", image=Image.new("RGB", (3, 3), "white").convert(mode)).images
    assert (picture.mode, picture.getpixel((1, 1))) == ("RGB", (255, 255, 255))


@pytest.mark.fault(
    fault="image: EXIF orientation",
    injected="orientation 6",
    expected="turned",
)
def test_a_picture_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was held on its side
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "a.jpg", exif=exif)
    assert example_of(tmp_path, question="Why?", images=["a.jpg"]).images[0].size == (20, 40)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answer": "1"}, "no `question` and no `prompt`"),
        ({"question": "Why?", "answer": None}, "no `answer` (or `solution`)"),
        ({"prompt": {"role": "user"}}, "must be text or a list of"),
        ({"question": 5}, "must be text or a list of"),
        ({"prompt": [{"role": "user", "content": None}]}, "`content` must be text or a list of"),
        ({"prompt": [turn("Why?")]}, "`content` must be text or a list of"),
        ({"prompt": [turn(text(None))]}, "a part of type text has no `text`"),
        ({"prompt": [{"role": "system", "content": "Why?"}]}, "has no user turn"),
        ({"question": "<image>", "images": [PICTURE] * 2}, "2 images but 1 image placeholders"),
        ({"question": "<image> and <image>", "images": [PICTURE]}, "1 images but 2 image placeholders"),
        ({"question": "a <IMG_CONTEXT> b"}, "contains <IMG_CONTEXT>, which is reserved"),
        ({"prompt": [turn(text("a<|im_end|>"))]}, "contains <|im_end|>, which is reserved"),
        ({"question": "Why?", "images": [{"bytes": b"", "path": "x.png"}]}, "image x.png cannot be read: cannot ident"),
        *[({"question": "Why?", "image": f"{name}.png"}, f"image {name}.png cannot be read") for name in UNREADABLE],
        ({"messages": TALK}, "does not end with a turn of the assistant's"),
        ({"messages": [turn(text("A"))]}, "does not end with a turn of the assistant's"),
        ({"messages": [turn(text(" "), role="assistant")]}, "the assistant's turn must be text, and not empty"),
        ({"messages": [turn(text("A"), role="assistant")]}, "no `question` and no `prompt`"),
        ({"question": "Why?", "completion": ""}, "the assistant's turn must be text, and not empty"),
        ({"question": "Why?", "images": [5]}, "an image is a path, bytes or a picture, not int"),
    ],
)
@pytest.mark.fault(
    fault="data: a row that cannot be used",
    injected="missing, empty, torn, huge pictures; reserved tokens; placeholders that do not match; wrong types",
    expected="BadRow with the reason",
)
def test_a_row_that_cannot_be_used_says_why(tmp_path, row, reason):
    for name in set(UNREADABLE) - {"no"}:
        (tmp_path / f"{name}.png").write_bytes(UNREADABLE[name])
    with pytest.raises(BadRow, match=re.escape(reason)):
        example_of(tmp_path, **row)


def test_columns_are_mapped_and_the_others_reach_the_rewards(tmp_path):
    row = {"problem": "Why?", "gold": 0, "level": 3, "uid": 7}
    example = make_example(row, "row 1", {"question": "problem", "answer": "gold", "id": "uid"}, tmp_path)
    columns = {"question": "Why?", "level": 3, "id": 7, "answer": "0", "images": []}
    assert (example.id, example.question, example.columns) == ("7", "Why?", columns)
    with pytest.raises(BadRow, match=r"no column 'wrong' \(named in data.columns\); the row has: problem, gold"):
        make_example(row, "row 1", {"question": "wrong"}, tmp_path)
    assert make_example({"question": "Why?", "solution": 2.5}, "row 9", {}, tmp_path).id == "row 9"


def test_parquet_rows(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = [[], [{"bytes": png(), "path": "a.png"}]]
    rows = {"question": ["Why?", "<image>How?"], "answer": ["1", "2"], "images": images, "level": [1, 2]}
    plain, typed = tmp_path / "plain.parquet", tmp_path / "typed.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(plain)
    datasets.Dataset.from_dict(rows).cast_column("images", datasets.List(datasets.Image())).to_parquet(typed)
    for opened in (open_rows(FileSource(path=str(path)), "train", "data.train") for path in (plain, typed)):
        examples = [make_example(opened.row(i), "-", {}, opened.folder) for i in range(len(opened))]
        assert [len(example.images) for example in examples] == [0, 1]
        assert examples[1].images[0].getpixel((0, 0)) == RED
        assert examples[1].columns["level"] == 2


def test_videos_of_a_parquet_file_stay_undecoded(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Image.new("RGB", (4, 2), RED).save(tmp_path / "a.gif")
    film = {"bytes": (tmp_path / "a.gif").read_bytes(), "path": "a.gif"}
    rows = {"question": ["Why?"], "answer": ["1"], "videos": [[film, film]]}
    typed = datasets.List(datasets.Video())
    datasets.Dataset.from_dict(rows).cast_column("videos", typed).to_parquet(tmp_path / "a.parquet")
    opened = open_rows(FileSource(path=str(tmp_path / "a.parquet")), "train", "data.train")
    assert [video["bytes"] for video in opened.row(0)["videos"]] == [film["bytes"]] * 2
    example = make_example(opened.row(0), "-", {}, opened.folder)
    assert [[frame.size for frame in video] for video in example.videos] == [[(4, 2)], [(4, 2)]]


NO_ROWS = ["no.jsonl: there is no", "bad.parquet is not", "a.csv: rows come", "a.jsonl: there are no rows"]


@pytest.mark.parametrize("message", NO_ROWS)
@pytest.mark.fault(
    fault="data: a file that cannot be opened",
    injected="missing, empty, torn files",
    expected="exit code 2 with the reason",
)
def test_a_file_that_cannot_be_opened(tmp_path, message):
    for name in ("bad.parquet", "a.csv", "a.jsonl"):
        (tmp_path / name).write_text("\n")
    with pytest.raises(BadInput, match=f"data.eval.path = .*{message}"):
        open_rows(FileSource(path=str(tmp_path / message.split(":")[0].split()[0])), "validation", "data.eval")


# Rows of the stream tests: these are found bad at the start, and those once their picture is decoded.
BROKEN_AT_START, BROKEN_PICTURE, ROWS = (3, 5), (8, 11), 20


def write_rows(folder, broken_at_start=(), broken_picture=(), good=PICTURE["bytes"]):
    (folder / "good.png").write_bytes(good)
    (folder / "cut.png").write_bytes(UNREADABLE["cut"])
    lines = []
    for number in range(ROWS):
        image = "cut.png" if number in broken_picture else "good.png"
        line = json.dumps({"uid": f"r{number}", "question": "Why?", "image": image, "answer": "1"})
        lines.append((line[:9] if number in broken_at_start else line) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder / "rows.jsonl"


def open_stream(path, **changed):
    keys = {"seed": 0, "shuffle": True, "max_bad_rows": 0, "shard": Shard()} | changed
    keys["quarantine_file"] = path.parent / "quarantine.jsonl"
    rows = JoinedRows([Part(JsonLinesRows(path), {"id": "uid"})])
    return RowStream(rows, lambda example, place: (int(example.id[1:]), place), **keys)


def rows_of(stream, count):
    return [row for row, _ in stream.next_items(count)]


def test_every_epoch_is_another_permutation(tmp_path):
    stream = open_stream(path := write_rows(tmp_path))
    first, second = rows_of(stream, ROWS), rows_of(stream, ROWS)
    assert sorted(first) == sorted(second) == list(range(ROWS))
    assert list(range(ROWS)) != first != second
    assert rows_of(open_stream(path), 2 * ROWS) == first + second
    assert rows_of(open_stream(path, seed=1), ROWS) != first
    assert rows_of(open_stream(path, shuffle=False), ROWS + 2) == [*range(ROWS), 0, 1]


def test_position_is_all_that_a_resumed_stream_needs(tmp_path):
    path = write_rows(tmp_path, BROKEN_AT_START, BROKEN_PICTURE)
    whole, resumed = open_stream(path, max_bad_rows=4), open_stream(path, max_bad_rows=4)
    whole.next_items(7)
    resumed.position = whole.position
    assert [resumed.next_items(1) for _ in range(2 * ROWS)] == [whole.next_items(1) for _ in range(2 * ROWS)]


@pytest.mark.parametrize("checked", [True, False], ids=["checked at start", "found on the way"])
@pytest.mark.fault(
    fault="data: bad rows within data.max_bad_rows",
    injected="bad JSON and missing answers",
    expected="set aside; the order of the rest unchanged",
)
def test_bad_rows_are_set_aside_and_the_others_keep_their_order(tmp_path, checked):
    (tmp_path / "all_good").mkdir()
    everything = rows_of(open_stream(write_rows(tmp_path / "all_good")), 2 * ROWS)
    expected = [row for row in everything if row not in BROKEN_AT_START + BROKEN_PICTURE]
    stream = open_stream(write_rows(tmp_path, BROKEN_AT_START, BROKEN_PICTURE), max_bad_rows=4)
    if checked:
        stream.check_rows()
        assert sorted(stream.bad_rows) == list(BROKEN_AT_START)
    assert [rows_of(stream, 1)[0] for _ in expected] == expected
    records = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted((record["row"], record["id"]) for record in records) == [(4, "-"), (6, "-"), (9, "r8"), (12, "r11")]
    assert {record["reason"][:14] for record in records} == {"not valid JSON", "image cut.png "}


def test_a_bad_row_met_twice_in_one_batch_is_recorded_once(tmp_path):
    open_stream(write_rows(tmp_path)).check_rows()
    assert not (tmp_path / "quarantine.jsonl").exists()
    rows_of(open_stream(write_rows(tmp_path, (), (0,)), max_bad_rows=1), 2 * ROWS)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 1


def write_golds(folder, golds):
    rows = [
        {"uid": f"r{i}", "question": "Why?", **({"answer": one} if isinstance(one, str) else one)} for i, one in golds
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.mark.fault(
    fault="data: right answers that cannot be read",
    injected="golds that are empty, torn or no option",
    expected="left out and listed before the first step",
)
def test_rows_whose_right_answer_cannot_be_compared_with_are_left_out_and_listed(tmp_path, capsys):
    golds = ["1", "x+1", r"2\sqrt{", {"answer": "E", "options": ["4", "5"]}, *map(str, range(4, 40))]
    stream = open_stream(write_golds(tmp_path, enumerate(golds)), compared=True)
    stream.check_rows()
    assert sorted(stream.bad_rows) == [2, 3]  # of 40, and data.max_bad_rows = 0
    shown = capsys.readouterr().err
    assert "2 rows left out" in shown
    assert r"row 3 (id r2): the right answer cannot be compared with: the braces of '2\\sqrt{' do not match" in shown
    assert "row 4 (id r3): the right answer cannot be compared with: 'E' is none of the 2 options" in shown
    assert sorted(rows_of(stream, 38)) == [0, 1, *range(4, 40)]
    again = open_stream(tmp_path / "rows.jsonl", compared=True, shuffle=False)  # as a resumed run does
    assert sorted(again.bad_rows) == [2, 3]
    open_stream(tmp_path / "rows.jsonl").check_rows()  # nobody compares: nothing to find


@pytest.mark.fault(
    fault="data: right answers that cannot be read",
    injected="more than 5 % of the rows",
    expected="the run is refused",
)
def test_more_than_a_twentieth_of_bad_right_answers_stops_the_run(tmp_path):
    path = write_golds(tmp_path, enumerate(["9^{9^9}", r"\frac{1}{", *map(str, range(30))]))
    for find in (lambda stream: stream.check_rows(), lambda stream: stream.next_items(32)):
        with pytest.raises(BadInput, match=r"2 rows cannot be used, and at most 5% of 32 may lack a right answer"):
            find(open_stream(path, compared=True, max_bad_rows=9))
        (tmp_path / "quarantine.jsonl").unlink()


def test_the_type_of_the_right_answer_is_fixed_at_load(tmp_path):
    golds = ["5 cm", "x+1", {"answer": "5", "answer_type": "integer"}]
    rows = JsonLinesRows(write_golds(tmp_path, enumerate(golds)))
    examples = [make_example(rows.row(i), "row", {}, tmp_path, compared=True) for i in range(3)]
    assert [example.columns["answer_type"] for example in examples] == ["unit", "expression", "integer"]
    assert "answer_type" not in make_example(rows.row(0), "row", {}, tmp_path).columns


@pytest.mark.fault(
    fault="data: one bad row more than allowed",
    injected="bad JSON lines",
    expected="the run ends; all are named",
)
def test_more_bad_rows_than_allowed_stop_the_run(tmp_path):
    with pytest.raises(BadInput, match=r"(?s)2 rows cannot be used, and data.max_bad_rows = 1.*row 4 .*row 6 "):
        open_stream(write_rows(tmp_path, BROKEN_AT_START), max_bad_rows=1).check_rows()
    with pytest.raises(BadInput, match=r"1 rows cannot be used[^\n]*\n  row 9 \(id r8\): image cut.png cannot be read"):
        open_stream(write_rows(tmp_path, (), (8,)), shuffle=False).next_items(ROWS)
    with pytest.raises(BadInput, match="no usable row is left"):
        open_stream(write_rows(tmp_path, (), range(ROWS)), max_bad_rows=ROWS).next_items(1)
    with pytest.raises(BadInput, match="exceeds limit"):
        open_stream(write_rows(tmp_path, good=HUGE_PNG)).check_rows()


@pytest.mark.parametrize("bad", [(), BROKEN_PICTURE], ids=["good rows", "bad rows"])
@pytest.mark.fault(
    fault="data: bad rows in two processes",
    injected="bad rows in one's share",
    expected="both replace the same rows",
)
def test_two_processes_see_together_what_one_sees(tmp_path, bad):
    path = write_rows(tmp_path, (), bad)
    alone = open_stream(path, max_bad_rows=len(bad))
    expected = [alone.next_items(4) for _ in range(8)]
    (tmp_path / "quarantine.jsonl").unlink(missing_ok=True)
    barrier, slots = threading.Barrier(2, timeout=60), [None, None]

    def process(rank):
        def gather(items):
            slots[rank] = items
            barrier.wait()
            joined = slots[0] + slots[1]
            barrier.wait()
            return joined

        stream = open_stream(path, max_bad_rows=len(bad), shard=Shard(rank, 2, gather))
        return [stream.next_items(4) for _ in range(8)]

    with ThreadPoolExecutor(2) as pool:
        seen = list(pool.map(process, range(2)))
    assert [first + second for first, second in zip(*seen, strict=True)] == expected


def mixture_of(folder, weights, counts=(6, 4, 3), **changed):
    """A stream over sources of letters and numbers, such as a0, with the kind of each."""
    parts = []
    for name, count in zip("abc", counts[: len(weights)] if weights else counts, strict=False):
        lines = [json.dumps({"q": f"{name}{n}", "answer": "1"}) for n in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        parts.append(Part(JsonLinesRows(folder / f"{name}.jsonl"), {"question": "q"}, "cot" if name == "a" else None))
    keys = {"seed": 0, "shuffle": True, "max_bad_rows": 0, "quarantine_file": None, "shard": Shard()} | changed
    return RowStream(JoinedRows(parts, weights), lambda e, _: (e.question, e.columns.get("kind")), **keys)


def test_sources_without_weights_are_one_source(tmp_path):
    stream = mixture_of(tmp_path, None)
    first, second = stream.next_items(13), stream.next_items(13)
    assert sorted(first) == sorted(second) == sorted(mixture_of(tmp_path, None, shuffle=False).next_items(13))
    assert first != second
    assert {row[0] for row, kind in first if kind == "cot"} == {"a"}
    in_order = [row for row, _ in mixture_of(tmp_path, None, shuffle=False).next_items(14)]
    assert in_order == ["a0", "a1", "a2", "a3", "a4", "a5", "b0", "b1", "b2", "b3", "c0", "c1", "c2", "a0"]


@pytest.mark.parametrize("weights", [(9, 1), (0.5, 0.5), (0.1, 0.7, 0.2), (1, 1, 1), (1e-3, 5.0)])
def test_every_stretch_of_a_mixture_keeps_the_weights(tmp_path, weights):
    stream = mixture_of(tmp_path, weights, shuffle=False)
    rows = [row for row, _ in stream.next_items(1000)]
    for source, weight in zip("abc", weights, strict=False):
        share = weight / sum(weights)
        drawn = [row for row in rows if row[0] == source]
        counts = [sum(row[0] == source for row in rows[:end]) for end in range(1001)]
        # Each cut in two is exact to one row, and the third source is what two cuts leave.
        assert all(abs(count - share * end) < 2 for end, count in enumerate(counts))
        length = {"a": 6, "b": 4, "c": 3}[source]
        assert drawn == [f"{source}{n % length}" for n in range(len(drawn))]


def test_a_mixture_reads_each_source_in_shuffled_passes_and_goes_on_anywhere(tmp_path):
    stream = mixture_of(tmp_path, (2, 1))
    rows = stream.next_items(36)
    drawn = [[row for row, _ in rows if row[0] == source] for source in "ab"]
    assert [len(own) for own in drawn] == [24, 12]
    for own, length in zip(drawn, (6, 4), strict=True):
        passes = [own[start : start + length] for start in range(0, len(own), length)]
        assert all(sorted(one) == sorted(passes[0]) for one in passes)
        assert len({tuple(one) for one in passes}) > 1
    assert mixture_of(tmp_path, (2, 1)).next_items(36) == rows
    assert mixture_of(tmp_path, (2, 1), seed=1).next_items(36) != rows
    resumed = mixture_of(tmp_path, (2, 1))
    resumed.position = 17
    assert [resumed.next_items(1)[0] for _ in range(19)] == rows[17:]


def test_bad_rows_of_a_mixture_are_named_by_their_source(tmp_path):
    good = mixture_of(tmp_path, (2, 1))
    expected = [row for row, _ in good.next_items(60) if row not in ("a2", "b1")]
    for file, number in (("a.jsonl", 2), ("b.jsonl", 1)):
        lines = (tmp_path / file).read_text().splitlines()
        lines[number] = json.dumps({"q": None, "answer": "1", "id": "x"})
        (tmp_path / file).write_text("\n".join(lines))
    parts = [
        Part(JsonLinesRows(tmp_path / "a.jsonl"), {"question": "q"}, "cot"),
        Part(JsonLinesRows(tmp_path / "b.jsonl"), {"question": "q"}),
    ]
    quarantine, rest = tmp_path / "quarantine.jsonl", {"seed": 0, "shuffle": True, "shard": Shard()}

    def open_again(limit):
        rows = JoinedRows(parts, (2, 1))
        return RowStream(rows, lambda e, _: e.question, max_bad_rows=limit, quarantine_file=quarantine, **rest)

    found = open_again(2)
    assert [found.next_items(1)[0] for _ in expected] == expected
    records = [json.loads(line) for line in quarantine.read_text().splitlines()]
    names = [f"{tmp_path / 'a.jsonl'} (cot)", str(tmp_path / "b.jsonl")]
    assert sorted((record["source"], record["row"]) for record in records) == [(names[0], 3), (names[1], 2)]
    assert sorted(open_again(2).bad_rows) == [2, 7]  # a resumed run knows them
    with pytest.raises(BadInput, match=r"(?s)row 3 of .*a.jsonl \(cot\) \(id x\): no `question`.*row 2 of .*b.jsonl"):
        open_again(1).check_rows()


@pytest.mark.parametrize(
    ("epochs", "samples", "steps"), [(1, 4, 4), (2, 4, 7), (0.5, 4, 2), (1, 13, 1), (1, 100, 1), (3, 13, 3)]
)
def test_epochs_are_counted_in_steps(tmp_path, epochs, samples, steps):
    mixture_of(tmp_path, None, counts=(6, 4, 3))
    train = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": 0.1} for name in "abc"]
    recipe = {"output_dir": "runs/x", "model": {"path": "x"}, "data": {"train": train}}
    recipe |= {"sft": {"samples_per_step": samples}, "trainer": {"num_train_epochs": float(epochs)}}
    trainer = counted_in_steps(SftRecipe.model_validate(recipe)).trainer
    assert (trainer.max_steps, trainer.num_train_epochs) == (steps, None)
    recipe["data"] = {"train": "pictures"}
    with pytest.raises(BadInput, match=r"data.train has no end; set trainer.max_steps"):
        counted_in_steps(SftRecipe.model_validate(recipe))
    with pytest.raises(ValueError, match="exactly one of `max_steps` and `num_train_epochs`"):
        SftRecipe.model_validate(recipe | {"trainer": {"max_steps": 3, "num_train_epochs": 1.0}})


def test_a_source_without_a_usable_row_stops_a_mixture(tmp_path):
    stream = mixture_of(tmp_path, (2, 1), max_bad_rows=9)
    with pytest.raises(BadInput, match=r"b.jsonl: no usable row is left"):
        stream._quarantine([(index, "broken") for index in range(6, 10)])


def test_the_target_is_the_trace_and_answer_of_its_kind(tmp_path):
    traces = {"reasoning": "Two ones.", "reasoning_hasty": "A guess.", "answer_hasty": "7", "reasoning_wordy": "Long."}
    example = example_of(tmp_path, question="Why?", answer="2", **traces)
    assert target_text(example, "think") == "<think>Two ones.</think>\n\\boxed{2}"
    assert target_text(example, "think", "wordy") == "<think>Long.</think>\n\\boxed{2}"
    assert target_text(example, "think", "hasty") == "<think>A guess.</think>\n\\boxed{7}"
    assert target_text(example, "direct", "hasty") == "\\boxed{2}"
    with pytest.raises(BadRow, match="no `reasoning_wordy` to imitate"):
        target_text(example_of(tmp_path, question="Why?", reasoning="Two ones."), "think", "wordy")


def test_traces_of_reasoning_come_in_their_shares_and_do_not_depend_on_the_run():
    kinds = [pick_trace({"terse": 1.0, "hasty": 3.0}, 5, position) for position in range(2000)]
    assert kinds == [pick_trace({"terse": 1.0, "hasty": 3.0}, 5, position) for position in range(2000)]
    assert kinds != [pick_trace({"terse": 1.0, "hasty": 3.0}, 6, position) for position in range(2000)]
    assert 0.7 < kinds.count("hasty") / 2000 < 0.8
    assert {pick_trace({"wordy": 0.1}, 0, position) for position in range(20)} == {"wordy"}
