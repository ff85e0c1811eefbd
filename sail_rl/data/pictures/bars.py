"""Bar charts: wide bars, each of its own colour, with whole heights."""

import random

from PIL import Image

from sail_rl.data.pictures.common import (
    COLOURS,
    INK,
    PAPER,
    UNITS,
    Family,
    Question,
    Scene,
    Targets,
    blank,
    box,
    font,
    grid_lines,
    letter_of,
    lettered,
    listed,
    pick_pair,
)

COLUMNS = 4
WIDTH = UNITS / COLUMNS
CHARTS = {1: (2, 4), 2: (3, 8), 3: (4, 8)}  # number of bars, height of the chart in steps
NOVEL = frozenset({(1, 3), (7, 4), (5, 8)})
FORMS = {"direct": ("height", "leftmost"), "two_step": ("sum", "differ", "taller", "tallest")}


def forms(level: int, step: str) -> tuple[str, ...]:
    """The question forms, the same at every level."""
    return FORMS[step]


def sample(rng: random.Random, level: int, form: str, novel: bool) -> tuple[Scene, Targets]:
    """A chart, and the colours of the bars that are asked about."""
    number, top = CHARTS[level]
    colours = rng.sample(list(COLOURS), number)
    columns = rng.sample(range(COLUMNS), number)
    heights = [rng.randint(1, top) for _ in range(number)]
    if form in FORMS["direct"]:
        return chart(top, columns, colours, heights), (colours[0],) if form == "height" else ()
    ties = form in ("sum", "differ")
    pairs = [(x, y) for x in range(1, top + 1) for y in range(1, top + 1) if ties or x != y]
    pair = pick_pair(rng, pairs, NOVEL, novel)
    if form != "tallest":
        return chart(top, columns, colours, [*pair, *heights[2:]]), tuple(colours[:2])
    heights = [rng.randint(1, max(pair) - 1) for _ in range(number)]  # only the pair holds the tallest bar
    left, right = sorted(rng.sample(range(number), 2))
    heights[left], heights[right] = pair
    return chart(top, sorted(columns), colours, heights), tuple(rng.sample(colours, number))


def chart(top: int, columns: list[int], colours: list[str], heights: list[int]) -> Scene:
    """The scene of these bars, from left to right; columns count from 0."""
    bars = sorted(zip(columns, colours, heights, strict=True))
    placed = [{"colour": colour, "column": column, "height": height} for column, colour, height in bars]
    return {"family": "bars", "columns": COLUMNS, "top": top, "bars": placed}


def ask(scene: Scene, form: str, targets: Targets) -> Question:
    """The question of this form about one bar, two bars or all of them."""
    heights = {bar["colour"]: bar["height"] for bar in scene["bars"]}
    if form in FORMS["direct"]:
        return ask_one(form, heights, *targets)
    return ask_tallest(heights, targets) if form == "tallest" else ask_two(form, heights, *targets)


def ask_one(form: str, heights: dict[str, int], colour: str = "") -> Question:
    """What a single bar shows."""
    if form == "height":
        height = heights[colour]
        terse = f"The {colour} bar reaches {height}."
        wordy = f"I follow the {colour} bar up to its top and read the line there: it reaches {height}."
        return Question(f"How tall is the {colour} bar?", str(height), "integer", terse, wordy, {colour: height})
    colour, height = next(iter(heights.items()))
    terse = f"First from the left: {colour}."
    wordy = f"I look at the bars from left to right. The first one that I meet is {colour}."
    return Question("What colour is the bar furthest left?", colour, "word", terse, wordy, {"leftmost": colour})


def ask_two(form: str, heights: dict[str, int], a: str, b: str) -> Question:
    """Two bars read and combined."""
    x, y = heights[a], heights[b]
    high, low = max(x, y), min(x, y)
    match form:
        case "sum":
            text, answer, kind = f"What is {a} plus {b}?", str(x + y), "integer"
            short, long = f"{x} + {y} = {answer}.", f"Adding the two heights, I get {x} + {y} = {answer}."
        case "differ":
            text, answer, kind = f"By how much do {a} and {b} differ?", str(high - low), "integer"
            short, long = f"{high} - {low} = {answer}.", f"The taller less the shorter is {high} - {low} = {answer}."
        case "taller":
            text, answer, kind = f"Which bar is taller, {a} or {b}?", a if x > y else b, "word"
            short, long = f"{high} > {low}: {answer}.", f"Since {high} > {low}, the taller bar is {answer}."
    terse = f"Bars: {a} {x}, {b} {y}. {short}"
    wordy = f"I read the {a} bar first: it reaches {x}. Then the {b} bar: it reaches {y}. {long}"
    return Question(text, answer, kind, terse, wordy, {a: x, b: y}, (x, y))


def ask_tallest(heights: dict[str, int], options: Targets) -> Question:
    """All bars read and the tallest named by its letter."""
    best = max(heights, key=lambda colour: heights[colour])
    answer = letter_of(best, options)
    read = ", ".join(f"{colour} {height}" for colour, height in heights.items())
    prose = listed([f"the {colour} bar reaches {height}" for colour, height in heights.items()])
    terse = f"Bars: {read}. Tallest: {best} ({answer})."
    wordy = f"I read the bars from left to right: {prose}. The tallest of them is {best}, so the option is ({answer})."
    text = f"Which bar is tallest? {lettered(options)}"
    return Question(text, answer, "letter", terse, wordy, dict(heights), tuple(heights.values()), options)


def draw(scene: Scene, size: int) -> Image.Image:
    """The chart: bars on the bottom edge, a line at every step, its number at the left edge."""
    image, pen = blank(size)
    step = UNITS / scene["top"]
    grid_lines(pen, size, step, upright=False)
    for bar in scene["bars"]:
        height = bar["height"] * step
        pen.rectangle(box(size, bar["column"] * WIDTH + 1, UNITS - height, WIDTH - 2, height), COLOURS[bar["colour"]])
    for value in range(1, scene["top"] + 1):
        at = (2 * size / UNITS, max(5.5, UNITS - value * step) * size / UNITS)  # the top number stays in the picture
        pen.text(at, str(value), INK, font(round(9 * size / UNITS)), anchor="lm", stroke_width=1, stroke_fill=PAPER)
    return image


FAMILY = Family(forms, sample, ask, draw, NOVEL)
