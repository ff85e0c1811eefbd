"""The built-in picture task: splits, answers recomputed from the scene, traces, drawing."""

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from fractions import Fraction
from itertools import combinations

import pytest

from sail_rl.data.pictures import FAMILIES, LEVELS, STEPS, draw_scene, picture_row, question_row

ROWS = 2000
STEP_TO = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
RGB = {  # written out again, so that a changed colour or digit is noticed
    "black": (20, 20, 20),
    "brown": (125, 70, 25),
    "red": (220, 30, 35),
    "orange": (255, 140, 0),
    "yellow": (255, 225, 40),
    "green": (30, 140, 50),
    "cyan": (70, 215, 235),
    "blue": (35, 70, 210),
    "purple": (140, 45, 170),
    "pink": (255, 150, 200),
}


def key(row: dict) -> str:
    return json.dumps(row["scene"], sort_keys=True)


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], list[dict]]:
    """Many rows without pictures, by (family, split)."""
    return {
        (family, split): [question_row(split, k, families=(family,)) for k in range(ROWS)]
        for family in FAMILIES
        for split in ("train", "validation")
    }


def flat(rows: dict) -> list[dict]:
    return [row for some in rows.values() for row in some]


# The answers, worked out from the words of the question and the scene alone.


def solve(row: dict) -> tuple[str, tuple]:
    """The answer, and the ordered values that the question asks about."""
    solvers = {
        "cards": solve_cards,
        "shapes": solve_shapes,
        "bars": solve_bars,
        "path": solve_path,
        "geometry": solve_geometry,
    }
    text = row["question"]
    options = re.findall(r"\(([A-Z])\) ([^(]+?)(?= \(|$)", text)
    assert [name for _, name in options] == (row["options"] or [])
    answer, asked = solvers[row["family"]](text.split(" (A)")[0], row["scene"], [name for _, name in options])
    return ({name: letter for letter, name in options}[answer] if options else answer), asked


def solve_cards(text: str, scene: dict, options: list[str]) -> tuple[str, tuple]:
    card = {c["label"]: c for c in scene["cards"]}
    assert list(card) == list("ABCDEFGHIJKLMNOP")[: scene["rows"] * scene["columns"]]
    assert all(list(RGB)[c["digit"]] == c["colour"] for c in scene["cards"])
    if options:
        labels = [option.removeprefix("card ") for option in options]
        return "card " + max(labels, key=lambda k: card[k]["digit"]), tuple(card[k]["digit"] for k in labels)
    a, *rest = re.findall(r"\b[A-P]\b", text)
    if not rest:
        return str(card[a]["digit"] if "number" in text else card[a]["colour"]), ()
    x, y = card[a]["digit"], card[rest[0]]["digit"]
    assert x != y or "larger" not in text
    if "over" in text:
        return str(Fraction(x, y)), (x, y)
    if "larger" in text:
        return list(RGB)[max(x, y)], (x, y)
    return str(x + y if "plus" in text else x - y), (x, y)


def solve_shapes(text: str, scene: dict, options: list[str]) -> tuple[str, tuple]:
    count = Counter(s["kind"] for s in scene["shapes"])
    assert len({(s["row"], s["column"]) for s in scene["shapes"]}) == len(scene["shapes"])
    asked = tuple(count[kind] for kind in re.findall("circle|square|triangle", text))
    if text.startswith("Is there a"):
        return "yes" if asked[0] > 0 else "no", ()
    if len(asked) == 1:
        return str(asked[0]), ()
    x, y = asked
    assert x != y or "than" not in text
    if "more" in text or "fewer" in text:
        return "yes" if (x > y if "more" in text else x < y) else "no", asked
    return str(x + y if "total" in text else abs(x - y)), asked


def solve_bars(text: str, scene: dict, options: list[str]) -> tuple[str, tuple]:
    height = {b["colour"]: b["height"] for b in sorted(scene["bars"], key=lambda b: b["column"])}
    assert len(height) == len(scene["bars"])
    assert all(1 <= h <= scene["top"] for h in height.values())
    if options:
        assert sorted(options) == sorted(height)
        assert list(height.values()).count(max(height.values())) == 1
        return max(height, key=height.__getitem__), tuple(height.values())
    if "furthest left" in text:
        return min(scene["bars"], key=lambda b: b["column"])["colour"], ()
    colours = re.findall("|".join(RGB), text)
    asked = tuple(height[c] for c in colours)
    if len(asked) == 1:
        return str(asked[0]), ()
    if "taller" in text:
        assert asked[0] != asked[1]
        return max(colours, key=height.__getitem__), asked
    return str(sum(asked) if "plus" in text else abs(asked[0] - asked[1])), asked


def solve_path(text: str, scene: dict, options: list[str]) -> tuple[str, tuple]:
    at = (scene["start"]["row"], scene["start"]["column"])
    start = scene["cells"][at[0]][at[1]]
    if "corner" in text:
        edge = scene["rows"] - 1
        return scene["cells"][edge if "bottom" in text else 0][edge if "right" in text else 0], ()
    moves = re.findall("up|down|left|right", text)
    for move in moves:
        at = (at[0] + STEP_TO[move][0], at[1] + STEP_TO[move][1])
        assert min(at) >= 0
        assert max(at) < scene["rows"]
    end = scene["cells"][at[0]][at[1]]
    return end, (start, end) if moves else ()


def solve_geometry(text: str, scene: dict, options: list[str]) -> tuple[str, tuple]:
    shape, asked = scene["shape"], (scene["shape"]["width"], scene["shape"]["height"])
    width, height = asked
    assert shape["row"] + height <= scene["rows"]
    assert shape["column"] + width <= scene["columns"]
    assert not ("triangle" in text and shape["kind"] == "rectangle")
    if options:
        assert width != height
        return "width" if width > height else "height", asked
    if "missing" in text:
        assert str(scene["columns"]) in text
        return str(scene["columns"] - width), asked
    if "half" in text:
        return str(Fraction(width, 2)), asked
    if "squares wide" in text or "squares tall" in text:
        return str(width if "wide" in text else height), ()
    if "perimeter" in text:
        return str(2 * width + 2 * height), asked
    area = Fraction(width * height, 2 if shape["kind"] == "right triangle" else 1)
    return str(area), asked


def test_answers_follow_from_question_and_scene(rows: dict) -> None:
    for row in flat(rows):
        answer, _ = solve(row)
        assert row["answer"] == answer, row
        form = {
            "integer": r"\d+",
            "fraction": r"\d+/\d+",
            "letter": "[A-D]",
            "word": "yes|no|" + "|".join(RGB),
        }[row["answer_type"]]
        assert re.fullmatch(form, row["answer"])


def test_the_same_arguments_give_the_same_row_in_any_process() -> None:
    code = (
        "import sys; from sail_rl.data.pictures import picture_row, question_row\n"
        "print([question_row('validation', k, seed=3) for k in range(40)])\n"
        "print(picture_row('train', 5)['images'][0].tobytes().hex())\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": s}, capture_output=True, text=True)
        for s in ("1", "2")
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert question_row("train", 5, seed=3)["scene"] != question_row("train", 5, seed=4)["scene"]


def test_no_scene_is_in_both_splits(rows: dict) -> None:
    for family in FAMILIES:
        train = {key(row) for row in rows[family, "train"]}
        other_seed = [question_row("validation", k, seed=9, families=(family,)) for k in range(300)]
        validation = {key(row) for row in rows[family, "validation"] + other_seed}
        assert not train & validation
        assert min(len(train), len(validation)) > 100


def test_kept_combinations_are_asked_in_validation_alone(rows: dict) -> None:
    for (family, split), some in rows.items():
        for k, row in enumerate(some):
            _, asked = solve(row)
            kept = any(pair in FAMILIES[family].novel for pair in combinations(asked, 2))
            assert kept == row["novel"]
            assert row["novel"] == (split == "validation" and row["needs_thinking"] and k % 20 == 19)
    mirrors = {(8, 3), (2, 6)}
    assert mirrors <= {solve(row)[1] for row in rows["cards", "train"]}


def test_every_row_is_complete_and_its_id_unique(rows: dict) -> None:
    for row in flat(rows):
        assert row["difficulty"] in LEVELS
        assert row["id"].startswith(row["family"])
        assert json.loads(json.dumps(row["scene"])) == row["scene"]
    ids = [row["id"] for row in flat(rows)]
    assert len(set(ids)) == len(ids)
    assert question_row("train", 17, seed=0, families=("cards",))["id"] == "cards-train-0-17"


def test_traces_state_the_facts_and_the_answer(rows: dict) -> None:
    for row in flat(rows):
        terse, wordy = row["reasoning"], row["reasoning_wordy"]
        assert len(terse) >= 16
        assert 2 <= len(wordy) / len(terse) <= 7, (terse, wordy)
        assert "boxed" not in terse + wordy
        for text in (terse, wordy):
            words = re.findall(r"\w+(?:/\w+)?", text)
            assert row["answer"] in words, (row["answer"], text)
            assert {str(value) for value in row["facts"].values()} <= set(words), text


def test_hasty_traces_state_a_plausible_answer_that_is_mostly_wrong(rows: dict) -> None:
    right: Counter = Counter()
    for row in flat(rows):
        assert row["answer_hasty"] in row["reasoning_hasty"]
        right[row["answer_hasty"] == row["answer"]] += 1
        assert row["answer_type"] == "fraction" or row["answer_hasty"].isdigit() == row["answer"].isdigit()
    assert right[True] / right.total() < 0.4


def test_careless_traces_find_the_answer_and_take_it_back(rows: dict) -> None:
    for row in flat(rows):
        found, conclusion = row["reasoning_careless"].removesuffix(".").split(" No, it is ")
        assert found == row["reasoning"]
        assert conclusion != row["answer"]
        assert row["answer_type"] == "fraction" or conclusion.isdigit() == row["answer"].isdigit()
        assert "answer_careless" not in row  # it is the right one


def test_no_answer_can_be_guessed(rows: dict) -> None:
    answers: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for row in flat(rows):
        answers[row["family"], row["form"]][row["answer"]] += 1
    for form, count in answers.items():
        assert count.total() >= 50, form
        assert count.most_common(1)[0][1] / count.total() < 0.55, (form, count)


def test_families_levels_and_steps_get_equal_shares() -> None:
    share = Counter(
        (row["family"], row["difficulty"], row["needs_thinking"])
        for row in (question_row("train", k) for k in range(300))
    )
    assert len(share) == 30
    assert set(share.values()) == {10}


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("step", STEPS)
def test_each_combination_gives_rows_with_pictures(family: str, level: int, step: str) -> None:
    drawn: dict[bytes, set[str]] = {}
    for k in range(20):
        row = picture_row("validation", k, families=(family,), levels=(level,), steps=(step,))
        image = row["images"][0]
        assert (row["family"], row["difficulty"], row["needs_thinking"]) == (family, level, step == "two_step")
        assert (image.mode, image.size, len(row["images"])) == ("RGB", (112, 112), 1)
        drawn.setdefault(image.tobytes(), set()).add(key(row))
        assert draw_scene(row["scene"], 224).size == (224, 224)
    assert len(drawn) >= 8
    assert all(len(scenes) == 1 for scenes in drawn.values()), "two scenes look the same"


@pytest.mark.parametrize("size", [56, 112, 224])
def test_shapes_have_their_colours_where_the_scene_says(size: int) -> None:
    unit = size / 112
    for k in range(60):
        row = picture_row("train", k, families=("cards", "path", "shapes", "bars"), size=size)
        for (x, y), colour in points(row["scene"]):
            pixel = row["images"][0].getpixel((int(x * unit), int(y * unit)))
            assert pixel == RGB[colour], (row["scene"], x, y)


def points(scene: dict) -> list[tuple[tuple[float, float], str]]:
    """Places, at size 112, on flat parts of the picture with the colour that must be there."""
    if scene["family"] == "cards":
        width, height, across = 112 / scene["columns"], 112 / scene["rows"], scene["columns"]
        places = [((k % across + 0.88) * width, (k // across + 0.6) * height) for k in range(len(scene["cards"]))]
        return list(zip(places, [card["colour"] for card in scene["cards"]], strict=True))
    if scene["family"] == "path":
        side = 112 / scene["columns"]
        cells = [(r, c, colour) for r, line in enumerate(scene["cells"]) for c, colour in enumerate(line)]
        return [(((c + 0.85) * side, (r + 0.85) * side), colour) for r, c, colour in cells]
    if scene["family"] == "shapes":
        return [((s["column"] * 28 + 14, s["row"] * 28 + 16), s["colour"]) for s in scene["shapes"]]
    step = 112 / scene["top"]
    return [((b["column"] * 28 + 20, 112 - (b["height"] - 0.5) * step), b["colour"]) for b in scene["bars"]]


def test_geometry_colours_as_many_pixels_as_its_area() -> None:
    for k in range(60):
        row = picture_row("train", k, families=("geometry",), size=448)
        shape, unit = row["scene"]["shape"], 448 / row["scene"]["columns"]
        area = shape["width"] * shape["height"] * unit**2 / (2 if shape["kind"] == "right triangle" else 1)
        seen = {rgb: n for n, rgb in row["images"][0].getcolors(100000)}[RGB[shape["colour"]]]
        assert 0.9 * area < seen < 1.02 * area, row["scene"]


def test_wrong_arguments_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="split: got"):
        question_row("test", 0)
    with pytest.raises(ValueError, match="families: got"):
        question_row("train", 0, families=("card",))
    with pytest.raises(ValueError, match="levels: got"):
        question_row("train", 0, levels=())
    with pytest.raises(ValueError, match="index: got"):
        question_row("train", -1)
    with pytest.raises(ValueError, match="size: got"):
        picture_row("train", 0, size=8)
