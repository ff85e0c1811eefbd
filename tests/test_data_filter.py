"""`sail-rl data filter`: each kind of bad row is dropped with its reason, the others keep their order."""

import json

import pytest
from building import data, dropped, read, write_rows
from PIL import Image, ImageDraw

from sail_rl.data.building import job as job_module
from sail_rl.data.building.filter import bucket, overlap_problem
from sail_rl.data.building.tags import repair
from sail_rl.data.images import BadRow

GOOD = {"question": "What is A plus B?", "answer": "3", "images": ["red.png"], "reasoning": "A is 1 and B is 2."}


def filtered(folder, rows, *more):
    output = folder / "out.jsonl"
    data("filter", write_rows(folder, rows), "--output", output, *more)
    return output


def turn(text):
    return {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}]}


@pytest.mark.parametrize(
    ("row", "reasoning", "answer"),
    [
        (GOOD, "A is 1 and B is 2.", "3"),
        (GOOD | {"reasoning": "<think>\nOne.</think>\n"}, "One.", "3"),
        (GOOD | {"reasoning": "<Thinking>One."}, "One.", "3"),
        (GOOD | {"answer": "So \\boxed{3}."}, "A is 1 and B is 2.", "3"),
        (GOOD | {"answer": "<answer> 3 </answer>"}, "A is 1 and B is 2.", "3"),
        (turn("<think>One.</think>\nIt is \\boxed{2}."), "One.", "2"),
        (turn("One.</think>\\boxed{2}"), "One.", "2"),
        (turn("<thought>One.</thought><answer>2</answer>"), "One.", "2"),
        (turn("<SUMMARY>Sum.</SUMMARY><REASONING>One.</REASONING><CONCLUSION>2</CONCLUSION>"), None, None),
        (turn("<CAPTION>A red one.</CAPTION> Then two.<CONCLUSION>2</CONCLUSION>"), "A red one. Then two.", "2"),
        (turn("\\boxed{2}"), None, "2"),
    ],
)
def test_tags_are_repaired(row, reasoning, answer):
    if (reasoning, answer) == (None, None):  # reasoning tags are a think block, and something stands before it
        mended, _ = repair(row)
        assert (mended["reasoning"], mended["answer"]) == ("One.", "2")
        return
    mended, _ = repair(row)
    assert (mended.get("reasoning"), mended["answer"]) == (reasoning, answer)
    assert "messages" not in mended


@pytest.mark.parametrize(
    "row",
    [
        GOOD | {"reasoning": "One <think> two"},
        GOOD | {"reasoning": "One </think> two <think> three"},
        turn("<think>One, and no end"),
        turn("<think>One.</think><think>Two.</think>\\boxed{2}"),
        turn("<think>One.</think>"),
        turn("</think>One.<think>"),
    ],
)
def test_tags_that_could_mean_anything_are_malformed(row):
    with pytest.raises(BadRow):
        repair(row)


def test_a_plain_turn_stays_as_it_is():
    assert repair(turn("Because.")) == (turn("Because."), "")


def test_malformed_rows_are_dropped_and_the_rest_keeps_its_order(tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    rows = [GOOD | {"question": f"Number {n}?", "id": f"q{n}"} for n in range(8)]
    rows[1] |= {"images": ["none.png"]}
    rows[2] |= {"images": ["torn.png"]}
    rows[3] = {"question": "No answer?"}
    rows[4] |= {"question": "<image><image>Two?"}
    rows[5] = {"messages": [{"role": "user", "content": "Nobody answers."}]}
    file = write_rows(tmp_path, rows)
    file.write_text(file.read_text() + "{not json\n")
    data("filter", file, "--output", tmp_path / "out.jsonl")
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == ["q0", "q6", "q7"]
    assert dropped(tmp_path / "out.jsonl") == dict.fromkeys((2, 3, 4, 5, 6, 9), "malformed row")
    details = {line["row"]: line["detail"] for line in read(tmp_path / "out.dropped.jsonl")}
    assert "none.png" in details[2]
    assert "not valid JSON" in details[9]


def test_duplicates_by_the_content_of_the_picture(tmp_path):
    rows = [
        GOOD,
        GOOD | {"images": ["same.bmp"], "question": "What  is a plus b?"},  # the same pixels in another file
        GOOD | {"images": ["green.png"]},
        GOOD | {"question": "What is B?"},
        GOOD | {"answer": "4"},
    ]
    file = write_rows(tmp_path, rows)
    Image.open(tmp_path / "red.png").save(tmp_path / "same.bmp")
    data("filter", file, "--output", tmp_path / "out.jsonl")
    assert len(read(tmp_path / "out.jsonl")) == 3
    assert dropped(tmp_path / "out.jsonl") == {2: "duplicate", 5: "duplicate with another answer"}


def scene(size, width):
    picture = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((size // 8, size // 4, size // 8 + width * size // 16, size // 2), fill="black")
    draw.ellipse((size // 2, size // 2, size - 8, size - 8), fill="gray")
    return picture


def test_near_duplicates_only_if_wanted_and_with_one_answer(tmp_path):
    scene(128, 4).save(tmp_path / "a.png")
    scene(128, 4).save(tmp_path / "b.jpg", quality=60)
    scene(192, 4).save(tmp_path / "c.png")
    scene(128, 13).save(tmp_path / "d.png")
    rows = [GOOD | {"images": [name]} for name in ("a.png", "b.jpg", "c.png", "d.png")]
    rows.append(GOOD | {"images": ["c.png"], "question": "Another?"})
    assert len(read(filtered(tmp_path, rows))) == 5
    (tmp_path / "near").mkdir()
    data("filter", tmp_path / "rows.jsonl", "--output", tmp_path / "near/out.jsonl", "--near", 3)
    assert dropped(tmp_path / "near/out.jsonl") == {2: "near duplicate", 3: "near duplicate"}


LONG = " ".join(f"word{n}" for n in range(40))


@pytest.mark.parametrize(
    ("reasoning", "answer", "problem"),
    [
        ("A is 1 and B is 2, so it is 3.", "3", ""),
        ("The answer is 3.", "3", ""),
        ("It is a red car.", "It is a red car.", "the reasoning only repeats the answer"),
        (LONG + " and so on it goes" * 5, LONG, "the answer only repeats the reasoning"),
        (LONG, " ".join(reversed(LONG.split()))[:60], ""),
        ("I see a red car beside a blue one.", "a red car", ""),
    ],
)
def test_overlap(reasoning, answer, problem):
    assert overlap_problem(reasoning, answer, 0.8) == problem


def test_lengths(tmp_path):
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 7, 8, 1000)] == [
        "0", "1 to 1", "2 to 3", "2 to 3", "4 to 7", "4 to 7", "8 to 15", "512 to 1023",
    ]  # fmt: skip
    rows = [GOOD | {"question": f"{n}?", "reasoning": "so " * n, "answer": "9"} for n in (0, 1, 4, 5, 6, 7, 20)]
    output = filtered(tmp_path, rows, "--shortest", 2, "--longest", 10, "--most-per-bucket", 2, "--needs-reasoning")
    kept, reasons = read(output), dropped(output)
    assert {reasons[1], reasons[2], reasons[7]} == {"no reasoning", "reasoning too short", "reasoning too long"}
    assert len(kept) == 2
    assert list(reasons.values()).count("bucket of lengths is full") == 2
    report = json.loads(output.with_suffix(".report.json").read_text())
    assert report["figures"] == {"words of reasoning": {"0": 1, "1 to 1": 1, "4 to 7": 4, "16 to 31": 1}}


def test_pictures_go_along_and_unused_ones_do_not(tmp_path):
    """From a parquet file, whose pictures are bytes, into another folder."""
    from datasets import Dataset, Features, Sequence, Value
    from datasets import Image as DatasetImage

    features = Features({"images": Sequence(DatasetImage()), "problem": Value("string"), "answer": Value("string")})
    pictures = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "red")]
    rows = [{"images": [p], "problem": f"{n % 2}?", "answer": str(n % 2)} for n, p in enumerate(pictures)]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    output = tmp_path / "new" / "out.jsonl"
    data("filter", tmp_path / "rows.parquet", "--columns", "question=problem", "--output", output)
    kept = read(output)
    assert [row["question"] for row in kept] == ["0?", "1?"]
    assert [Image.open(output.parent / row["images"][0]).getpixel((0, 0)) for row in kept] == [(255, 0, 0), (0, 0, 255)]
    assert len(list((output.parent / "out_files").iterdir())) == 2


def test_interrupted_anywhere_the_result_is_the_same(tmp_path, monkeypatch):
    """Ended after every chunk, and between the output and its report."""
    rows = [GOOD | {"question": f"{n % 7}?", "id": str(n)} for n in range(10)]
    (tmp_path / "whole").mkdir()
    whole = filtered(tmp_path / "whole", rows)
    monkeypatch.setattr("sail_rl.data.building.filter.AT_ONCE", 4)
    add, output = job_module.Journal.add, tmp_path / "out.jsonl"

    def add_and_end(journal, records):
        add(journal, records)
        journal.close()
        raise KeyboardInterrupt

    with monkeypatch.context() as ending:
        ending.setattr(job_module.Journal, "add", add_and_end)
        for _ in range(3):
            with pytest.raises(SystemExit, match="130"):
                filtered(tmp_path, rows)
    assert len(read(output.with_name("out.jsonl.progress"))) == 1 + 10
    with monkeypatch.context() as ending:
        ending.setattr(job_module, "write_report", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            filtered(tmp_path, rows)
    filtered(tmp_path, rows)
    for suffix in (".jsonl", ".dropped.jsonl"):
        assert output.with_suffix(suffix).read_bytes() == whole.with_suffix(suffix).read_bytes()
    first, second = (json.loads(one.with_suffix(".report.json").read_text()) for one in (whole, output))
    assert {**first, "settings": 0} == {**second, "settings": 0}
