"""Solid circles, squares and triangles in the cells of a grid, to be counted."""

import random

from PIL import Image, ImageDraw

from sail_rl.data.pictures.common import (
    COLOURS,
    UNITS,
    Family,
    Question,
    Scene,
    Targets,
    blank,
    box,
    grid_lines,
    pick_pair,
)

SIDE = 4  # cells on a side
CELL = UNITS / SIDE
KINDS = ("circle", "square", "triangle")
MOST = {1: 3, 2: 5, 3: 5}  # of one kind; three kinds of five still fit the sixteen cells
NOVEL = frozenset({(1, 3), (4, 2)})
FORMS = {"direct": ("count", "any"), "two_step": ("sum", "differ", "more", "fewer")}


def forms(level: int, step: str) -> tuple[str, ...]:
    """The question forms, the same at every level."""
    return FORMS[step]


def sample(rng: random.Random, level: int, form: str, novel: bool) -> tuple[Scene, Targets]:
    """A grid, and the kinds that are asked about; from level 3 on a colour says nothing about the kind."""
    most = MOST[level]
    targets = tuple(rng.sample(KINDS, 2))
    counts = {kind: rng.randint(0, most) for kind in KINDS}
    if form == "any":
        counts[targets[0]] = rng.choice((0, rng.randint(1, most)))
    if form in FORMS["two_step"]:
        ties = form in ("sum", "differ")
        pairs = [(x, y) for x in range(most + 1) for y in range(most + 1) if ties or x != y]
        counts[targets[0]], counts[targets[1]] = pick_pair(rng, pairs, NOVEL, novel)
    kinds = [kind for kind in KINDS for _ in range(counts[kind])]
    cells = rng.sample(range(SIDE * SIDE), len(kinds))
    own = dict(zip(KINDS, rng.sample(list(COLOURS), 3), strict=True))
    colours = [rng.choice(list(COLOURS)) if level == 3 else own[kind] for kind in kinds]
    return grid(sorted(zip(cells, kinds, colours, strict=True))), targets[: 1 if form in FORMS["direct"] else 2]


def grid(shapes: list[tuple[int, str, str]]) -> Scene:
    """The scene of these shapes, given as (cell, kind, colour) in reading order; rows and columns count from 0."""
    placed = [{"kind": kind, "colour": c, "row": cell // SIDE, "column": cell % SIDE} for cell, kind, c in shapes]
    return {"family": "shapes", "rows": SIDE, "columns": SIDE, "shapes": placed}


def ask(scene: Scene, form: str, targets: Targets) -> Question:
    """The question of this form about one or two kinds."""
    counts = [sum(shape["kind"] == kind for shape in scene["shapes"]) for kind in targets]
    if form in FORMS["direct"]:
        return ask_one(form, targets[0], counts[0])
    return ask_two(form, targets, counts[0], counts[1])


def ask_one(form: str, kind: str, count: int) -> Question:
    """How many there are of one kind, or whether there are any."""
    look = f"I go through the rows and count every {kind} that I see."
    if form == "count":
        terse, wordy = f"Count of {kind}s: {count}.", f"{look} The count is {count}."
        return Question(f"How many {kind}s are there?", str(count), "integer", terse, wordy, {kind: count})
    answer = "yes" if count else "no"
    terse, wordy = (
        f"Count of {kind}s: {count}, so {answer}.",
        f"{look} The count is {count}, so the answer is {answer}.",
    )
    return Question(f"Is there a {kind}?", answer, "word", terse, wordy, {kind: count})


def ask_two(form: str, kinds: Targets, x: int, y: int) -> Question:
    """Two kinds counted and combined."""
    a, b = (f"{kind}s" for kind in kinds)
    order = f"{x} {'>' if x > y else '<'} {y}"
    match form:
        case "sum":
            text, answer, kind = f"How many {a} and {b} are there in total?", str(x + y), "integer"
            short, long = f"{x} + {y} = {answer}.", f"Together that makes {x} + {y} = {answer}."
        case "differ":
            text, answer, kind = f"By how many do {a} and {b} differ?", str(abs(x - y)), "integer"
            step = f"{max(x, y)} - {min(x, y)} = {answer}"
            short, long = f"{step}.", f"The larger count less the smaller one is {step}."
        case "more" | "fewer":
            text, kind = f"Are there {form} {a} than {b}?", "word"
            answer = "yes" if (x > y) == (form == "more") else "no"
            short, long = f"{order}: {answer}.", f"Comparing the two counts, {order}, so the answer is {answer}."
    terse = f"Count: {a} {x}, {b} {y}. {short}"
    wordy = f"I count the {a} first and find {x}. Then I count the {b} and find {y}. {long}"
    return Question(text, answer, kind, terse, wordy, {kinds[0]: x, kinds[1]: y}, (x, y))


def draw(scene: Scene, size: int) -> Image.Image:
    """The grid with its shapes, each filling its cell."""
    image, pen = blank(size)
    grid_lines(pen, size, CELL)
    for shape in scene["shapes"]:
        corners = box(size, shape["column"] * CELL + 2, shape["row"] * CELL + 2, CELL - 3, CELL - 3)
        draw_shape(pen, shape["kind"], corners, COLOURS[shape["colour"]])
    return image


def draw_shape(
    pen: ImageDraw.ImageDraw, kind: str, corners: tuple[int, int, int, int], rgb: tuple[int, int, int]
) -> None:
    """One solid shape that fills the box."""
    left, top, right, bottom = corners
    if kind == "circle":
        pen.ellipse(corners, rgb)
    elif kind == "square":
        pen.rectangle(corners, rgb)
    else:
        pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], rgb)


FAMILY = Family(forms, sample, ask, draw, NOVEL)
