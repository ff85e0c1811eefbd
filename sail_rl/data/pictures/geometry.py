"""A rectangle, or from level 3 on also a right triangle, on squared paper."""

import random

from PIL import Image

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
    letter_of,
    lettered,
    pick_pair,
)

PAPERS = {"white": (255, 255, 255), "cream": (255, 243, 210), "mint": (218, 244, 224), "grey": (226, 226, 226)}
SIDES = {1: 4, 2: 8, 3: 8}  # squares on a side of the paper
NOVEL = frozenset({(3, 2), (5, 7), (7, 4)})  # (width, height); no other question shows these either
CORNERS = ("top left", "top right", "bottom left", "bottom right")
FACING = dict(zip(CORNERS, reversed(CORNERS), strict=True))  # the corner that a triangle leaves out
RECTANGLE = ("perimeter", "area", "half", "missing", "longer")
FORMS = {
    "direct": {1: ("width", "height"), 2: ("width", "height"), 3: ("width", "height", "base", "rise")},
    "two_step": {1: RECTANGLE, 2: RECTANGLE, 3: (*RECTANGLE, "triangle_area")},
}


def forms(level: int, step: str) -> tuple[str, ...]:
    """The question forms of a level."""
    return FORMS[step][level]


def sample(rng: random.Random, level: int, form: str, novel: bool) -> tuple[Scene, Targets]:
    """A shape somewhere on the paper, and the options if the form has any."""
    squares = SIDES[level]
    lengths = range(1, squares + 1)
    pairs = [(w, h) for w in lengths for h in lengths if fits(form, w, h, squares)]
    width, height = pick_pair(rng, pairs, NOVEL, novel)
    triangle = form in ("base", "rise", "triangle_area")
    shape = {
        "kind": "right triangle" if triangle else "rectangle",
        "colour": rng.choice(list(COLOURS)),
        "row": rng.randint(0, squares - height),
        "column": rng.randint(0, squares - width),
        "width": width,
        "height": height,
    }
    if triangle:
        shape["right_angle"] = rng.choice(CORNERS)
    options = tuple(rng.sample(("width", "height"), 2)) if form == "longer" else ()
    paper = rng.choice(list(PAPERS))
    return {"family": "geometry", "rows": squares, "columns": squares, "paper": paper, "shape": shape}, options


def fits(form: str, width: int, height: int, squares: int) -> bool:
    """Whether a form may ask about a shape of this size."""
    if width == height == squares:
        return False  # it would hide its paper, and different scenes would look the same
    match form:
        case "half":
            return width % 2 == 1  # a proper fraction, in lowest terms
        case "missing":
            return width < squares
        case "longer":
            return width != height
        case "triangle_area":
            return width * height % 2 == 0
    return True


def ask(scene: Scene, form: str, targets: Targets) -> Question:
    """The question of this form about the shape."""
    width, height = scene["shape"]["width"], scene["shape"]["height"]
    if form in ("width", "height", "base", "rise"):
        return ask_one(form, width, height)
    if form in ("half", "missing"):
        return ask_width(form, width, height, scene["columns"])
    if form == "longer":
        return ask_longer(width, height, targets)
    return ask_two(form, width, height)


def ask_one(form: str, width: int, height: int) -> Question:
    """One side of the shape."""
    name, across = ("rectangle", form == "width") if form in ("width", "height") else ("triangle", form == "base")
    side, word, length = ("width", "wide", width) if across else ("height", "tall", height)
    terse = f"Squares: {side} {length}."
    wordy = f"I count the squares along one side: the {side} is {length}."
    text = f"How many squares {word} is the {name}?"
    return Question(text, str(length), "integer", terse, wordy, {side: length}, (width, height))


def ask_width(form: str, width: int, height: int, squares: int) -> Question:
    """The width read and put to use."""
    if form == "half":
        text, answer, kind = "What is half the width, as a fraction?", f"{width}/2", "fraction"
        terse = f"Width {width}. {width} over 2 = {answer}."
        long = f"Half of it is {width} over 2 = {answer}."
    else:
        text, kind = f"How many squares are missing to make it {squares} wide?", "integer"
        answer = str(squares - width)
        terse = f"Width {width}. {squares} - {width} = {answer}."
        long = f"What is missing is {squares} - {width} = {answer}."
    wordy = f"I count along the rectangle: its width is {width}. {long}"
    return Question(text, answer, kind, terse, wordy, {"width": width}, (width, height))


def ask_longer(width: int, height: int, options: Targets) -> Question:
    """Both sides read and compared."""
    side = "width" if width > height else "height"
    answer, order = letter_of(side, options), f"{max(width, height)} > {min(width, height)}"
    terse = f"Width {width}, height {height}. {order}: {side} ({answer})."
    read = f"I count the width, which is {width}, and the height, which is {height}."
    wordy = f"{read} Since {order}, the {side} is longer: option ({answer})."
    text = f"Which is longer? {lettered(options)}"
    facts = {"width": width, "height": height}
    return Question(text, answer, "letter", terse, wordy, facts, (width, height), options)


def ask_two(form: str, width: int, height: int) -> Question:
    """Both sides read and combined."""
    both, product = width + height, width * height
    match form:
        case "perimeter":
            text, answer = "What is the perimeter of the rectangle?", str(2 * both)
            short, long = f"{width} + {height} = {both}, 2 x {both} = {answer}.", "The perimeter is twice their sum"
        case "area":
            text, answer = "What is the area of the rectangle?", str(product)
            short, long = f"{width} x {height} = {answer}.", "The area is their product"
        case "triangle_area":
            text, answer = "What is the area of the triangle?", str(product // 2)
            short, long = f"{width} x {height} = {product}, half is {answer}.", "The area is half their product"
    terse = f"Width {width}, height {height}. {short}"
    wordy = f"I count the width, which is {width}, and the height, which is {height}. {long}: {short}"
    return Question(text, answer, "integer", terse, wordy, {"width": width, "height": height}, (width, height))


def draw(scene: Scene, size: int) -> Image.Image:
    """The shape, solid, with the lines of the paper over it so that its squares can be counted."""
    image, pen = blank(size, PAPERS[scene["paper"]])
    shape, unit = scene["shape"], UNITS / scene["columns"]
    sides = [shape[key] * unit for key in ("column", "row", "width", "height")]
    left, top, right, bottom = box(size, *sides)
    if shape["kind"] == "rectangle":
        pen.rectangle((left, top, right, bottom), COLOURS[shape["colour"]])
    else:
        corners = {"top left": (left, top), "top right": (right, top)}
        corners |= {"bottom left": (left, bottom), "bottom right": (right, bottom)}
        del corners[FACING[shape["right_angle"]]]
        pen.polygon(list(corners.values()), COLOURS[shape["colour"]])
    grid_lines(pen, size, unit)
    return image


FAMILY = Family(forms, sample, ask, draw, NOVEL)
