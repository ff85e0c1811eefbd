"""What all picture families share: their types, colours, seeded randomness, splits and drawing on a 112-unit square.

Every length below is in units of 1/112 of the picture's side, so that at the default size one unit is one pixel, and
the 28-unit grid on which shapes lie is the grid of a small vision tower (14-pixel patches merged 2x2).
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

from PIL import Image, ImageDraw, ImageFont

UNITS = 112
VALIDATION_SHARE = 10  # one scene in ten
COLOURS = {  # flat and far apart; a colour's position in this table is the digit that it stands for on a card
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
PAPER, LINE, INK = (255, 255, 255), (165, 165, 165), (0, 0, 0)

Scene = dict[str, Any]  # everything that is drawn, JSON-able; equal pictures have equal scenes
Targets = tuple[str, ...]  # what a question points at: labels, kinds, colours, moves, or options in order


@dataclass(frozen=True)
class Question:
    """A question about a scene, its answer and its traces."""

    text: str
    answer: str
    answer_type: str  # integer, fraction, letter or word
    reasoning: str  # terse
    wordy: str  # the same facts in prose
    facts: Mapping[str, int | str]  # each value that must be read from the picture
    values: tuple[Any, ...] = ()  # the combination of asked values, in order, which may be kept for validation
    options: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Family:
    """One kind of picture, as pure functions."""

    forms: Callable[[int, str], tuple[str, ...]]  # (level, step) -> names of question forms
    sample: Callable[[random.Random, int, str, bool], tuple[Scene, Targets]]  # (rng, level, form, novel)
    ask: Callable[[Scene, str, Targets], Question]
    draw: Callable[[Scene, int], Image.Image]  # (scene, size in pixels)
    novel: frozenset[tuple[Any, Any]]  # ordered value pairs that only validation asks about


def rng_for(*key: str | int) -> random.Random:
    """A generator that depends on the key alone, not on the process or the Python version's hash."""
    return random.Random(int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8], "big"))


def canonical(scene: Scene) -> str:
    """The scene as one line of JSON, the same for equal scenes."""
    return json.dumps(scene, sort_keys=True, separators=(",", ":"))


def split_of(scene: Scene) -> str:
    """The split that owns a scene, whatever the seed: train or validation."""
    digest = hashlib.sha256(canonical(scene).encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") % VALIDATION_SHARE == 0 else "train"


def is_novel(values: tuple[Any, ...], novel: frozenset[tuple[Any, Any]]) -> bool:
    """Whether the asked values hold, in order, a pair that is kept for validation."""
    return any(pair in novel for pair in combinations(values, 2))


def pick_pair(rng: random.Random, pairs: Iterable[tuple[Any, Any]], kept: frozenset, novel: bool) -> tuple[Any, Any]:
    """One of the pairs, from those kept for validation or from the others."""
    return rng.choice([pair for pair in pairs if (pair in kept) == novel])


def lettered(options: Targets) -> str:
    """Options as they stand in a question: (A) first (B) second."""
    return " ".join(f"({letter}) {option}" for letter, option in zip("ABCDEFGH", options, strict=False))


def letter_of(option: str, options: Targets) -> str:
    """The letter of one of the options."""
    return "ABCDEFGH"[options.index(option)]


def listed(words: list[str]) -> str:
    """Words as a list in prose: a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def blank(size: int, paper: tuple[int, int, int] = PAPER) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty picture and its pen."""
    image = Image.new("RGB", (size, size), paper)
    return image, ImageDraw.Draw(image)


def box(size: int, x: float, y: float, width: float, height: float) -> tuple[int, int, int, int]:
    """A box given in units as PIL's pixel corners, both inclusive."""
    left, top, right, bottom = (round(v * size / UNITS) for v in (x, y, x + width, y + height))
    return left, top, right - 1, bottom - 1


def grid_lines(pen: ImageDraw.ImageDraw, size: int, step: float, upright: bool = True) -> None:
    """A frame and thin lines every `step` units, for the human reader."""
    pen.rectangle((0, 0, size - 1, size - 1), outline=LINE)
    for k in range(1, round(UNITS / step)):
        at = round(k * step * size / UNITS)
        pen.line((0, at, size, at), fill=LINE)
        if upright:
            pen.line((at, 0, at, size), fill=LINE)


@lru_cache
def font(pixels: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font: no file is needed."""
    return ImageFont.load_default(size=pixels)


def write(
    pen: ImageDraw.ImageDraw, size: int, x: float, y: float, text: str, height: float, ink: tuple[int, int, int] = INK
) -> None:
    """Text centred on a point."""
    pen.text((x * size / UNITS, y * size / UNITS), text, ink, font(max(5, round(height * size / UNITS))), anchor="mm")


def ink_on(colour: str) -> tuple[int, int, int]:
    """Black or white, whichever is easier to read on the colour."""
    red, green, blue = COLOURS[colour]
    return INK if 0.3 * red + 0.59 * green + 0.11 * blue > 120 else PAPER
