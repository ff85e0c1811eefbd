"""VLMEvalKit's files: questions with pictures read and written, predictions exported, imported and compared."""

import base64
import csv
import io
import json
import pickle

import pytest
from building import data, write_rows
from PIL import Image

from sail_rl.cli import make_parser
from sail_rl.command_line import BadInput
from sail_rl.config_data import FileSource
from sail_rl.data.example import make_example
from sail_rl.data.images import BadRow
from sail_rl.data.mixture import open_sources
from sail_rl.data.vlmevalkit import TsvRows, read_predictions, write_predictions


def picture(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


QUESTIONS = [
    {"index": "1", "question": 'Which "colour"\nis it?', "A": "red", "B": "blue", "C": "", "answer": "A"}
    | {"image": picture("red"), "category": "colours", "hint": "Look."},
    {"index": "2", "question": "How many?", "answer": "4", "image": "1"},
    {"index": "3", "question": "Compare.", "answer": "same", "image": str([picture("red"), picture("blue")])},
    {"index": "4", "question": "Which?", "answer": "tall", "answer_option": "B", "image": picture("red")},
]


def write_tsv(folder, rows, name="questions.tsv"):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


def examples(file):
    rows = open_sources([FileSource(path=str(file))], {}, "validation", "data.eval")
    return [make_example(rows.parts[0].row(n), f"row {n}", {}, file.parent, compared=True) for n in range(len(rows))]


def run(*arguments):
    parsed = make_parser().parse_args([*map(str, arguments)])
    parsed.run_command(parsed)


def test_questions_with_options_pictures_and_shared_pictures(tmp_path):
    first, second, third, fourth = examples(write_tsv(tmp_path, QUESTIONS))
    assert first.question == 'Hint: Look.\nWhich "colour"\nis it?\nA. red\nB. blue'
    assert (first.id, first.columns["answer"], first.columns["answer_type"]) == ("1", "A", "choice")
    assert first.columns["options"] == {"A": "red", "B": "blue"}
    assert first.columns["category"] == "colours"
    assert [len(one.images) for one in (first, second, third)] == [1, 1, 2]
    assert second.images[0].getpixel((0, 0)) == (255, 0, 0)  # the picture of row 1
    assert (fourth.columns["answer"], fourth.columns["alternatives"]) == ("B", ["tall"])


def test_rows_come_in_any_order_and_in_other_processes(tmp_path):
    rows = pickle.loads(pickle.dumps(TsvRows(write_tsv(tmp_path, QUESTIONS))))
    assert [rows.row(n)["id"] for n in (3, 0, 2)] == ["4", "1", "3"]


def test_our_rows_become_a_question_file_and_are_read_again(tmp_path):
    rows = [
        {"question": "What is it?\tSay.", "answer": "5", "images": ["red.png"], "category": "cards", "id": "a"},
        {"question": "And both?", "answer": "6", "images": ["red.png", "blue.png"], "id": "b"},
        {"question": "No picture?", "answer": "7", "id": "c"},
    ]
    data("tsv", write_rows(tmp_path, rows), "--output", tmp_path / "out.tsv")
    found = examples(tmp_path / "out.tsv")
    assert [(one.question, one.columns["answer"], len(one.images)) for one in found] == [
        ("What is it?\tSay.", "5", 1), ("And both?", "6", 2), ("No picture?", "7", 0)]  # fmt: skip
    assert found[1].images[1].getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(BadInput, match=r"row 1 .*none.png"):
        data("tsv", write_rows(tmp_path, [rows[0] | {"images": ["none.png"]}]), "--output", tmp_path / "bad.tsv")
    assert not (tmp_path / "bad.tsv").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [({"image": "!" * 80}, "neither base64 nor the index"), ({"image": "[1"}, "begins like a list of pictures")],
)
def test_pictures_that_are_none_are_bad_rows(tmp_path, row, message):
    file = write_tsv(tmp_path, [{"index": "1", "question": "Which?", "answer": "A"} | row])
    with pytest.raises(BadRow, match=message):
        TsvRows(file).row(0)


def test_a_table_of_something_else_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no column 'index'"):
        TsvRows(write_tsv(tmp_path, [{"question": "Which?", "answer": "A"}]))


def evaluation(folder, texts, right):
    """A greedy evaluation as `sail-rl eval` leaves it."""
    shared = {"well_formed": True, "truncated": False, "thought": True, "length": 9, "sample": 0, "mode": "think"}
    asked = {"question": "Which?\nA. red\nB. blue", "answer": "A", "options": {"A": "red", "B": "blue"}}
    folder.mkdir()
    lines = [
        {"position": n, "id": str(n), "completion": text, "correct": one, "images": [f"{n}.png"]} | asked | shared
        for n, (text, one) in enumerate(zip(texts, right, strict=True))
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"samples": 1}))
    return folder


@pytest.mark.parametrize("ending", ["tsv", "json"])
def test_an_evaluation_goes_out_and_comes_back(tmp_path, ending, capsys):
    texts = ['<think>It is "red".\nSure.</think>\\boxed{A}', "<think>\tBlue.</think>\\boxed{B}", "(A) red"]
    ours = evaluation(tmp_path / "ours", texts, [True, False, False])
    file = tmp_path / f"model_questions.{ending}"
    run("eval-export", ours, file)
    records = read_predictions(file)
    assert [one["prediction"] for one in records] == texts
    assert (records[0]["question"], records[0]["A"], records[0]["index"]) == ("Which?", "red", "0")
    run("eval-import", file, tmp_path / "theirs")
    summary = json.loads((tmp_path / "theirs/summary.json").read_text())
    assert summary["all"]["pass@1"]["mean"] == pytest.approx(2 / 3)  # an answer without a box is meant as a whole
    assert summary["all"]["thinking_rate"]["mean"] == pytest.approx(2 / 3)
    assert "length" not in summary["all"]
    capsys.readouterr()
    run("eval-compare", ours, tmp_path / "theirs")
    assert "| all | 3 | 0.333 | 0.667 | +0.333" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.xlsx", "", "give it the ending .tsv or .json"),
        ("a.json", "[{", "is not valid JSON"),
        ("a.json", '[{"index": 1}]', "row 1 has no 'prediction'"),
        ("a.json", '[{"index": 1, "prediction": "A"}]', "row 1 has no `answer`"),
        ("a.json", "[]", "no predictions"),
    ],
)
def test_other_files_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=message):
        run("eval-import", tmp_path / name, tmp_path / "out")


def test_only_one_prediction_of_each_question_can_be_exported(tmp_path):
    folder = evaluation(tmp_path / "ours", ["\\boxed{A}"], [True])
    (folder / "summary.json").write_text(json.dumps({"samples": 4}))
    with pytest.raises(BadInput, match="4 completions of each question"):
        run("eval-export", folder, tmp_path / "a.tsv")
    with pytest.raises(BadInput, match=r"give it the ending .tsv or .json"):
        write_predictions([], tmp_path / "a.xlsx")
