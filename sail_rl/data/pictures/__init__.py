"""The built-in picture task: drawn on the fly, seeded, no download.

`picture_row(split, index)` is a pure function of its arguments: question, picture, answer, the scene drawn, a judgement
whether it needs reasoning, and four traces: terse, wordy, that of a hasty teacher who answers without a look, and that
of a careless one, who takes back what it rightly found and yet gives the right answer. No scene is in both splits,
whatever the seeds, and some combinations of asked values are in validation alone (`novel` rows). Each family module
holds pure functions: sample a scene, ask about it, draw it.
"""

import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

from PIL import Image

from sail_rl.data.pictures import bars, cards, geometry, path, shapes
from sail_rl.data.pictures.common import Family, Question, Scene, is_novel, rng_for, split_of

__all__ = ["FAMILIES", "LEVELS", "SPLITS", "STEPS", "draw_scene", "picture_row", "question_row", "split_of"]

FAMILIES: dict[str, Family] = {
    "cards": cards.FAMILY,
    "shapes": shapes.FAMILY,
    "bars": bars.FAMILY,
    "path": path.FAMILY,
    "geometry": geometry.FAMILY,
}
SPLITS, LEVELS, STEPS = ("train", "validation"), (1, 2, 3), ("direct", "two_step")
Turn = tuple[str, int, str, tuple[str, ...]]  # family, level, step, forms
JUDGEMENTS = {
    "direct": "One look at the picture tells, so no reasoning is needed.",
    "two_step": "What I see must be put together, so reasoning is needed.",
}
NOVEL_EVERY = 20  # validation rows 19, 39, 59, ... ask about kept combinations where they are two-step questions
TRIES = 5000  # a draw is accepted with a chance of about 1 in 10 at worst, so this is never reached


def picture_row(
    split: str,
    index: int,
    *,
    seed: int = 0,
    families: Sequence[str] = tuple(FAMILIES),
    levels: Sequence[int] = LEVELS,
    steps: Sequence[str] = STEPS,
    forms: Sequence[str] | None = None,
    size: int = 112,
) -> dict[str, Any]:
    """Row `index` of a split, with its picture of `size` x `size` pixels in `images`."""
    row = question_row(split, index, seed=seed, families=families, levels=levels, steps=steps, forms=forms)
    return row | {"images": [draw_scene(row["scene"], size)]}


def question_row(
    split: str,
    index: int,
    *,
    seed: int = 0,
    families: Sequence[str] = tuple(FAMILIES),
    levels: Sequence[int] = LEVELS,
    steps: Sequence[str] = STEPS,
    forms: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The same row without its picture."""
    for name, given, allowed in (
        ("split", (split,), SPLITS),
        ("families", families, FAMILIES),
        ("levels", levels, LEVELS),
        ("steps", steps, STEPS),
    ):
        if not given or not set(given) <= set(allowed):
            raise ValueError(f"{name}: got {given!r}, allowed are {list(allowed)}")
    if index < 0:
        raise ValueError(f"index: got {index}, allowed are 0 and more")
    turns = possible_turns(tuple(families), tuple(levels), tuple(steps), tuple(forms) if forms else None)
    family, level, step, asked = turn(split, index, seed, turns)
    novel = split == "validation" and step == "two_step" and index % NOVEL_EVERY == NOVEL_EVERY - 1
    form, scene, question = pose(split, index, seed, family, level, asked, novel)
    guess = guessed_answer(rng_for("guess", seed, split, index), family, level, form)
    slip = wrong_answer(rng_for("slip", seed, split, index), family, level, form, question.answer)
    return {
        "id": f"{family}-{split}-{seed}-{index}",
        "question": question.text,
        "answer": question.answer,
        "answer_type": question.answer_type,
        "options": list(question.options) if question.options else None,
        "difficulty": level,
        "needs_thinking": step == "two_step",
        "judgement": JUDGEMENTS[step],
        "reasoning": question.reasoning,
        "reasoning_wordy": question.wordy,
        "reasoning_hasty": f"I need no closer look: it is {guess}.",
        "answer_hasty": guess,
        "reasoning_careless": f"{question.reasoning} No, it is {slip}.",
        "family": family,
        "form": form,
        "facts": dict(question.facts),
        "scene": scene,
        "novel": novel,
    }


@lru_cache
def possible_turns(
    families: tuple[str, ...], levels: tuple[int, ...], steps: tuple[str, ...], forms: tuple[str, ...] | None
) -> list[Turn]:
    """Each combination of family, level and step, with the forms that it may ask."""
    turns = []
    for family, level, step in product(families, levels, steps):
        asked = tuple(form for form in FAMILIES[family].forms(level, step) if forms is None or form in forms)
        turns += [(family, level, step, asked)] if asked else []
    known = {form for *_, asked in turns for form in asked}
    if not turns or not set(forms or ()) <= known:
        raise ValueError(f"forms: got {forms!r}; these families, levels and steps ask {sorted(known)}")
    return turns


def turn(split: str, index: int, seed: int, turns: list[Turn]) -> Turn:
    """Whose turn a row is: every block of rows holds each combination once, in a shuffled order."""
    block, place = divmod(index, len(turns))
    order = list(turns)
    rng_for("block", seed, split, block).shuffle(order)
    return order[place]


def pose(
    split: str, index: int, seed: int, family: str, level: int, forms: tuple[str, ...], novel: bool
) -> tuple[str, Scene, Question]:
    """Form, scene and question of a row: drawn until the scene belongs to the split and the values are as wanted."""
    rng = rng_for("row", seed, split, index)
    chosen = FAMILIES[family]
    form = rng.choice(forms)
    for _ in range(TRIES):
        scene, targets = chosen.sample(rng, level, form, novel)
        if split_of(scene) != split:
            continue
        question = chosen.ask(scene, form, targets)
        if is_novel(question.values, chosen.novel) == novel:
            return form, scene, question
    raise RuntimeError(f"no {family} scene for form {form}, level {level}, {split}, novel={novel} in {TRIES} draws")


def guessed_answer(rng: random.Random, family: str, level: int, form: str) -> str:
    """An answer as good as any without a look at the picture: that of another scene."""
    scene, targets = FAMILIES[family].sample(rng, level, form, False)
    return FAMILIES[family].ask(scene, form, targets).answer


def wrong_answer(rng: random.Random, family: str, level: int, form: str, answer: str) -> str:
    """A plausible answer that is not the right one."""
    for _ in range(TRIES):
        guess = guessed_answer(rng, family, level, form)
        if guess != answer:
            return guess
    raise RuntimeError(f"no {family} answer for form {form}, level {level}, but {answer} in {TRIES} draws")


def draw_scene(scene: Scene, size: int = 112) -> Image.Image:
    """The picture of a scene, `size` x `size` pixels; shapes keep to a vision tower's tokens if size is 28 x n."""
    if size < 56:
        raise ValueError(f"size: got {size}, allowed are 56 and more")
    return FAMILIES[scene["family"]].draw(scene, size)
