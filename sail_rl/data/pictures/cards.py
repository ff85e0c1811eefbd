"""Coloured cards on a board: a card's colour stands for its digit, which is also printed on it."""

import random
from math import gcd

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
    ink_on,
    letter_of,
    lettered,
    listed,
    pick_pair,
    write,
)

BOARDS = {1: (2, 2), 2: (2, 4), 3: (4, 4)}  # rows, columns: all divide the 28-unit grid
LABELS = "ABCDEFGHIJKLMNOP"
READ_WHOLE = 4  # cards
DIGIT_COLOURS = tuple(COLOURS)
DIGITS = {1: range(1, 7), 2: range(10), 3: range(10)}  # a level's numbers: few enough at first to learn their sums
NOVEL = frozenset({(3, 5), (6, 2), (4, 1), (3, 8), (9, 4), (7, 5)})
EVERY_PAIR = [(x, y) for x in range(10) for y in range(10)]
UNEQUAL = [(x, y) for x, y in EVERY_PAIR if x != y]
PAIRS = {
    "sum": EVERY_PAIR,
    "minus": [(x, y) for x, y in EVERY_PAIR if x >= y],
    "larger": UNEQUAL,
    "larger_colour": UNEQUAL,
    "fraction": [(x, y) for x, y in EVERY_PAIR if x >= 1 and y >= 2 and gcd(x, y) == 1],  # lowest terms: one spelling
}
FORMS = {"direct": ("number", "colour"), "two_step": tuple(PAIRS)}


def forms(level: int, step: str) -> tuple[str, ...]:
    """The question forms, the same at every level."""
    return FORMS[step]


def sample(rng: random.Random, level: int, form: str, novel: bool) -> tuple[Scene, Targets]:
    """A board, and the labels of the cards that are asked about."""
    rows, columns = BOARDS[level]
    digits = [rng.choice(DIGITS[level]) for _ in range(rows * columns)]
    if form in FORMS["direct"]:
        return board(rows, columns, digits), (LABELS[rng.randrange(len(digits))],)
    first, second = rng.sample(range(len(digits)), 2)
    digits[first], digits[second] = pick_pair(rng, pairs_of(form, level), NOVEL, novel)
    return board(rows, columns, digits), (LABELS[first], LABELS[second])


def pairs_of(form: str, level: int) -> list[tuple[int, int]]:
    """Pairs of digits that a form may ask about at a level."""
    return [pair for pair in PAIRS[form] if set(pair) <= set(DIGITS[level])]


def board(rows: int, columns: int, digits: list[int]) -> Scene:
    """The scene of these digits in reading order."""
    cards = [{"label": LABELS[k], "digit": d, "colour": DIGIT_COLOURS[d]} for k, d in enumerate(digits)]
    return {"family": "cards", "rows": rows, "columns": columns, "cards": cards}


def ask(scene: Scene, form: str, targets: Targets) -> Question:
    """The question of this form about one or two cards."""
    cards = {card["label"]: card for card in scene["cards"]}
    asked = [cards[label] for label in targets]
    text, answer, kind, short, long, options = ask_one(form, *asked) if len(asked) == 1 else ask_two(form, *asked)
    # A small board is read whole, in order; of a large one only the cards that are asked about.
    read = scene["cards"] if len(cards) <= READ_WHOLE else asked
    values = tuple(card["digit"] for card in asked) if len(asked) == 2 else ()
    facts = {card["label"]: card["digit"] for card in read}
    return Question(
        text, answer, kind, f"{terse_reading(read)} {short}", f"{wordy_reading(read)} {long}", facts, values, options
    )


def terse_reading(cards: list[dict]) -> str:
    """What is on these cards, in as few words as can be."""
    readings = ", ".join(f"{card['label']} {card['digit']}" for card in cards)
    return f"Card {readings}." if len(cards) == 1 else f"{readings}."


def wordy_reading(cards: list[dict]) -> str:
    """The same in prose."""
    readings = [f"card {card['label']} is {card['digit']}" for card in cards]
    return f"I read the cards: {listed(readings)}."


def ask_one(form: str, card: dict) -> tuple[str, str, str, str, str, Targets | None]:
    """Text, answer, its type, terse and wordy conclusion, options: about a single card."""
    label, digit, colour = card["label"], card["digit"], card["colour"]
    if form == "number":
        text, short = f"What number is on card {label}?", f"{label} is {digit}."
        return text, str(digit), "integer", short, f"So the number on card {label} is {digit}.", None
    long = f"The colour that stands for {digit} is {colour}, so card {label} is {colour}."
    return f"What colour is card {label}?", colour, "word", f"{label} is {colour}.", long, None


def ask_two(form: str, one: dict, two: dict) -> tuple[str, str, str, str, str, Targets | None]:
    """The same about two cards and what comes of them together."""
    (a, x), (b, y) = (one["label"], one["digit"]), (two["label"], two["digit"])
    options: Targets | None = None
    top = one if x > y else two
    step = f"{max(x, y)} > {min(x, y)}"
    match form:
        case "sum":
            text, answer, kind = f"What is {a} plus {b}?", str(x + y), "integer"
            short, long = f"{x} + {y} = {answer}.", f"Adding these two numbers, I get {x} + {y} = {answer}."
        case "minus":
            text, answer, kind = f"What is {a} minus {b}?", str(x - y), "integer"
            short, long = f"{x} - {y} = {answer}.", f"Taking the second from the first, I get {x} - {y} = {answer}."
        case "fraction":
            text, answer, kind = f"What is {a} over {b} as a fraction?", f"{x}/{y}", "fraction"
            short = f"{a} over {b} = {answer}."
            long = f"The first number goes on top, so I get {short}"
        case "larger":
            options = (f"card {a}", f"card {b}")
            text, kind = f"Which is larger? {lettered(options)}", "letter"
            answer = letter_of(f"card {top['label']}", options)
            short, long = f"{step}: ({answer}).", f"Since {step}, card {top['label']} is larger: option ({answer})."
        case "larger_colour":
            text, answer, kind = f"What colour is the larger of {a} and {b}?", top["colour"], "word"
            short, long = f"{step}: {answer}.", f"Since {step}, card {top['label']} is larger, and it is {answer}."
    return text, answer, kind, short, long, options


def draw(scene: Scene, size: int) -> Image.Image:
    """The board: flat cards with a numeral in the middle and the label on a tab in the top left corner."""
    image, pen = blank(size)
    width, height = UNITS / scene["columns"], UNITS / scene["rows"]
    tab, gap = (14, 2) if scene["columns"] == 2 else (9, 1)
    for k, card in enumerate(scene["cards"]):
        x, y = k % scene["columns"] * width, k // scene["columns"] * height
        pen.rectangle(box(size, x + gap, y + gap, width - 2 * gap, height - 2 * gap), COLOURS[card["colour"]])
        pen.rectangle(box(size, x + gap, y + gap, tab, tab), PAPER)
        write(pen, size, x + gap + tab / 2 - 0.5, y + gap + tab / 2, card["label"], tab, INK)
        middle = (x + width / 2 + 2, y + height / 2 + 3)
        write(pen, size, *middle, str(card["digit"]), 0.5 * min(width, height), ink_on(card["colour"]))
    return image


FAMILY = Family(forms, sample, ask, draw, NOVEL)
