"""A walk over a board of coloured cells, from a marked start."""

import random
from functools import lru_cache
from itertools import accumulate, pairwise, product

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
    letter_of,
    lettered,
    listed,
    pick_pair,
    write,
)

BOARDS = {1: (2, (1, 2)), 2: (4, (2, 3)), 3: (4, (4, 5))}  # cells on a side, numbers of moves
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
OPPOSITE = {"up": "down", "down": "up", "left": "right", "right": "left"}
NAMES = tuple(COLOURS)
EVERY_PAIR = [(start, end) for start in NAMES for end in NAMES]
NOVEL = frozenset({("red", "blue"), ("green", "orange"), ("black", "cyan"), ("pink", "yellow"), ("brown", "purple")})
CORNERS = ("top left", "top right", "bottom left", "bottom right")
FORMS = {"direct": ("start", "corner"), "two_step": ("end", "end_letter")}


def forms(level: int, step: str) -> tuple[str, ...]:
    """The question forms, the same at every level."""
    return FORMS[step]


def sample(rng: random.Random, level: int, form: str, novel: bool) -> tuple[Scene, Targets]:
    """A board, and the corner, or the moves (then the options) of the question."""
    side, lengths = BOARDS[level]
    cells = [[rng.choice(NAMES) for _ in range(side)] for _ in range(side)]
    row, column = rng.randrange(side), rng.randrange(side)
    scene = {"family": "path", "rows": side, "columns": side, "cells": cells, "start": {"row": row, "column": column}}
    if form in FORMS["direct"]:
        return scene, (rng.choice(CORNERS),) if form == "corner" else ()
    moves, (end_row, end_column) = rng.choice(walks(side, row, column, rng.choice(lengths)))
    cells[row][column], cells[end_row][end_column] = pick_pair(rng, EVERY_PAIR, NOVEL, novel)
    if form == "end":
        return scene, moves
    others = sorted({colour for line in cells for colour in line} - {cells[end_row][end_column]})
    others = rng.sample(others if len(others) > 1 else [c for c in NAMES if c != cells[end_row][end_column]], 2)
    return scene, (*moves, *rng.sample([cells[end_row][end_column], *others], 3))


@lru_cache
def walks(side: int, row: int, column: int, length: int) -> list[tuple[Targets, tuple[int, int]]]:
    """Every walk from a cell with the cell where it ends: none turns back at once, leaves the board or ends at S."""
    start, found = (row, column), []
    for moves in product(MOVES, repeat=length):
        cells = list(
            accumulate(moves, lambda at, move: (at[0] + MOVES[move][0], at[1] + MOVES[move][1]), initial=start)
        )
        turns_back = any(OPPOSITE[a] == b for a, b in pairwise(moves))
        if not turns_back and cells[-1] != start and all(0 <= k < side for cell in cells for k in cell):
            found.append((moves, cells[-1]))
    return found


def ask(scene: Scene, form: str, targets: Targets) -> Question:
    """The question of this form: about a cell, or about the end of a walk."""
    if form in FORMS["direct"]:
        return ask_one(scene, form, *targets)
    moves, options = [t for t in targets if t in MOVES], tuple(t for t in targets if t not in MOVES)
    return ask_end(scene, moves, options)


def ask_one(scene: Scene, form: str, corner: str = "") -> Question:
    """The colour of a single cell."""
    row, column = scene["start"]["row"], scene["start"]["column"]
    if form == "corner":
        row, column = -("bottom" in corner), -("right" in corner)  # 0 or, from the end, -1
    colour = scene["cells"][row][column]
    place = f"{corner} corner" if corner else "start cell"
    terse = f"The {place} is {colour}."
    wordy = f"I find the {place} on the board and look at its colour. It is {colour}."
    return Question(f"What colour is the {place}?", colour, "word", terse, wordy, {place: colour})


def ask_end(scene: Scene, moves: list[str], options: Targets) -> Question:
    """Where a walk ends, as a word, or as a letter if there are options."""
    row, column = scene["start"]["row"], scene["start"]["column"]
    colours = [scene["cells"][row][column]]
    for move in moves:
        row, column = row + MOVES[move][0], column + MOVES[move][1]
        colours.append(scene["cells"][row][column])
    start, end = colours[0], colours[-1]
    answer = letter_of(end, options) if options else end
    result = f"{end} ({answer})" if options else end
    steps = list(zip(moves, colours[1:], strict=True))
    terse = f"Start {start}; {', '.join(f'{move} {colour}' for move, colour in steps)}. End: {result}."
    prose = " ".join(f"Going {move} takes me to {colour}." for move, colour in steps)
    wordy = f"I begin at the start cell, which is {start}. {prose} So the walk ends on {result}."
    way = listed([moves[0], *(f"then {move}" for move in moves[1:])]).replace(" and", ",")
    text = f"Start at S and go {way}. What colour is that cell?"
    facts = {"start": start, **{f"{k} {move}": colour for k, (move, colour) in enumerate(steps, 1)}}
    if options:
        return Question(f"{text} {lettered(options)}", answer, "letter", terse, wordy, facts, (start, end), options)
    return Question(text, answer, "word", terse, wordy, facts, (start, end))


def draw(scene: Scene, size: int) -> Image.Image:
    """The board of flat cells; the start carries an S on a white disc."""
    image, pen = blank(size)
    side = UNITS / scene["columns"]
    for row, line in enumerate(scene["cells"]):
        for column, colour in enumerate(line):
            pen.rectangle(box(size, column * side, row * side, side - 1, side - 1), COLOURS[colour])
    x, y = (scene["start"][axis] * side for axis in ("column", "row"))
    pen.ellipse(box(size, x + 0.2 * side, y + 0.2 * side, 0.6 * side, 0.6 * side), PAPER, outline=INK)
    write(pen, size, x + side / 2, y + side / 2, "S", 0.5 * side)
    return image


FAMILY = Family(forms, sample, ask, draw, NOVEL)
