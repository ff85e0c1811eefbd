"""Published benchmarks, read from small files that are made as the real ones are."""

import json
from typing import get_args

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from pydantic import ValidationError
from test_eval import predictions

from sail_rl.command_line import BadInput
from sail_rl.config_data import BenchmarkName, DataSection, FileSource, HubSource
from sail_rl.data.benchmarks import BENCHMARKS, converted, listed, with_pictures
from sail_rl.data.example import make_example
from sail_rl.data.images import BadRow
from sail_rl.data.mixture import open_sources

PUBLISHED = {
    "mathvista": {"pid": "7", "question": "Which is it?", "image": "red.png", "choices": ["3", "A", "B"], "answer": "B"}
    | {"unit": None, "precision": None, "question_type": "multi_choice", "answer_type": "text", "query": "Hint: ..."}
    | {"metadata": {"task": "geometry problem solving", "category": "math-targeted-vqa"}},
    "mathvision": {"id": "4", "question": "Which piece?\n<image1>", "options": ["A", "B", "C"], "image": "red.png"}
    | {"answer": "C", "solution": None, "level": 2, "subject": "combinatorics"},
    "mathverse": {"sample_index": "9", "problem_index": "2", "problem_version": "Vision Only", "question": ""}
    | {"image": "red.png", "answer": "D", "question_type": "multi-choice", "metadata": {"subject": "Plane Geometry"}},
    "dynamath": {"id": "1", "question": "What is x?", "image": "red.png", "ground_truth": "2.5"}
    | {"answer_type": "float", "subject": "algebra", "knowledge_level": "high school"},
    "wemath": {"ID": "3steps_1", "split": "testmini", "knowledge concept": "Area of Squares", "question": "How large?"}
    | {"option": "A. 16; B. 8; C. No correct answer", "answer": "A", "image_path": "red.png", "key": "3steps"},
    "logicvista": {"imagename": "red.png", "question": "Which comes next?\nA, B, C or D", "answer": "A, C"}
    | {"reasoning": "...", "skill": ["inductive"], "capability": ["ocr", "pattern"]},
    "mmmu": {"id": "Math_1", "question": "Compare <image 2> with <image 1>.", "answer": "B"}
    | {"options": "['the first', \"it's <image 2>\"]", "image_1": "red.png", "image_2": "green.png", "image_3": None}
    | {"question_type": "multiple-choice", "subfield": "Geometry", "topic_difficulty": "Easy", "explanation": ""},
    "ocrbench": {"dataset": "IIIT5K", "question": "What is written?", "question_type": "Regular Text Recognition"}
    | {"answer": ["CENTRE", "CENTER"], "image": "red.png"},
}
READ = {
    "mathvista": ("mathvista/7", "Which is it?\nA. 3\nB. A\nC. B", "C", "choice", "multi_choice"),
    "mathvision": ("mathvision/4", "Which piece?\nA. A\nB. B\nC. C", "C", "choice", None),
    "mathverse": ("mathverse/9", "Answer the question in the picture.", "D", "choice", "Vision Only"),
    "dynamath": ("dynamath/1", "What is x?", "2.5", "float", "float"),
    "wemath": ("wemath/3steps_1/3steps", "How large?\nA. 16\nB. 8\nC. No correct answer", "A", "choice", "3steps"),
    "logicvista": ("logicvista/red.png", "Which comes next?\nA, B, C or D", "A, C", "choice", "ocr, pattern"),
    "mmmu": ("mmmu/Math_1", "Compare  with .\nA. the first\nB. it's image 2", "B", "choice", "multiple-choice"),
    "ocrbench": ("ocrbench/1", "What is written?", "CENTRE", "text", "Regular Text Recognition"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for colour in ("red", "green"):
        Pictures.new("RGB", (30, 30), colour).save(tmp_path / f"{colour}.png")
    return tmp_path


def write(folder, *rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(source):
    rows = open_sources([source], {"question": "never_used"}, "validation", "data.eval")
    part, number = rows.locate(0)
    return make_example(part.row(number), "row 1", part.columns, part.rows.folder, compared=True)


def test_every_benchmark_has_a_name_in_recipes_and_a_test():
    assert set(get_args(BenchmarkName)) == set(BENCHMARKS) == set(PUBLISHED) == set(READ)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_published_row_is_a_question_of_ours(folder, name):
    example = read(FileSource(path=str(write(folder, PUBLISHED[name])), benchmark=name))
    identifier, question, answer, answer_type, kind = READ[name]
    assert (example.id, example.question) == (identifier, question)
    assert (example.columns["answer"], example.columns["answer_type"]) == (answer, answer_type)
    assert (example.columns.get("type"), example.columns["benchmark"]) == (kind, name)
    assert len(example.images) == (2 if name == "mmmu" else 1)


def test_pictures_stand_where_the_text_speaks_of_them(folder):
    example = read(FileSource(path=str(write(folder, PUBLISHED["mmmu"])), benchmark="mmmu"))
    assert [part["type"] for part in example.messages[0]["content"]][:4] == ["text", "image", "text", "image"]
    assert [image.getpixel((0, 0)) for image in example.images] == [(0, 128, 0), (255, 0, 0)]
    assert with_pictures("See <image1>.", ["a", "b"]) == ("<image>\nSee <image>.", ["b", "a"])
    assert with_pictures("Look.", ["a", "b"]) == ("Look.", ["a", "b"])
    assert with_pictures("See <image 3>.", ["a"]) == ("See image 3.", ["a"])


def test_parquet_with_pictures_in_it_as_the_hub_has_it(folder):
    features = Features({"pid": Value("string"), "question": Value("string"), "image": Value("string")}
        | {"decoded_image": Image(), "choices": List(Value("string")), "precision": Value("float64")}
        | {"answer": Value("string"), "question_type": Value("string"), "answer_type": Value("string")}
        | {"metadata": {"task": Value("string")}})  # fmt: skip
    row = {"pid": "1", "question": "How long?", "image": "images/1.jpg", "choices": None, "precision": 1.0}
    row |= {"answer": "1.2", "question_type": "free_form", "answer_type": "float", "metadata": {"task": "figure"}}
    row["decoded_image"] = Pictures.new("RGB", (20, 10), "blue")
    Dataset.from_list([row], features=features).to_parquet(folder / "testmini.parquet")
    example = read(FileSource(path=str(folder / "testmini.parquet"), benchmark="mathvista"))
    assert [image.size for image in example.images] == [(20, 10)]
    assert (example.columns["tolerance"], example.columns["category"]) == ({"absolute": 0.05}, "figure")
    assert "options" not in example.columns


def test_json_files_that_are_one_list_or_one_object(folder):
    rows = [PUBLISHED["wemath"], PUBLISHED["wemath"] | {"ID": "3steps_2"}]
    named = {row["ID"]: row for row in rows}
    for text in (json.dumps(rows), json.dumps(rows, indent=4), json.dumps(named, indent=4)):
        (folder / "testmini.json").write_text(text)
        opened = open_sources([FileSource(path=str(folder / "testmini.json"), benchmark="wemath")], {}, "", "data.eval")
        identifiers = [opened.parts[0].row(number)["id"] for number in range(len(opened))]
        assert identifiers == ["wemath/3steps_1/3steps", "wemath/3steps_2/3steps"]
    (folder / "testmini.json").write_text("[1,")
    with pytest.raises(BadInput, match=r"testmini.json is not valid JSON"):
        open_sources([FileSource(path=str(folder / "testmini.json"))], {}, "", "data.eval")


def test_answers_that_are_right_as_well(tmp_path):
    texts = [f"<think>It can be read.</think>\n\\boxed{{{word}}}" for word in ("centre", "center", "middle")]
    found = predictions(texts, tmp_path, answer="CENTRE", answer_type="text", alternatives=["CENTER"])
    assert [one["correct"] for one in found] == [True, True, False]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, []),
        ("[]", []),
        (["a", "b"], ["a", "b"]),
        ("['$A$', \"it's\"]", ["$A$", "it's"]),
        ("A. 5; B. 7", ["5", "7"]),
        ("A. 5 cm;\nB. 7 cm;", ["5 cm", "7 cm"]),
    ],
)
def test_options_in_every_form(given, expected):
    assert listed(given) == expected


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mathvista", {"answer": "17"}, "the answer '17' is none of the options"),
        ("mathvision", {"answer": None}, "no right answer"),
        ("ocrbench", {"answer": []}, "no right answer"),
        ("mmmu", {"options": "['a', "}, "is not a list of options"),
    ],
)
def test_what_cannot_be_asked_is_named(name, changes, message):
    with pytest.raises(BadRow, match=message):
        converted(PUBLISHED[name] | changes, name, 0)


def test_a_file_of_another_benchmark_is_refused():
    with pytest.raises(BadRow, match="no column 'ground_truth', which dynamath has; the row has: pid, question"):
        converted(PUBLISHED["mathvista"], "dynamath", 0)


def test_a_benchmark_in_a_recipe():
    source = {"source": "hub", "path": "AI4Math/MathVista", "split": "testmini", "benchmark": "mathvista"}
    (found,) = DataSection(train="pictures", eval=source).eval_sources
    assert (found.benchmark, found.split) == ("mathvista", "testmini")
    with pytest.raises(ValidationError, match="leave out `columns`"):
        FileSource(path="a.jsonl", benchmark="mmmu", columns={"question": "q"})
    with pytest.raises(ValidationError, match="leave out `streaming`"):
        HubSource(path="MMMU/MMMU", benchmark="mmmu", streaming=True)
