"""`sail-rl data reject`: rejection sampling. The model's own right traces become rows for Think-Fusion SFT.

Of the attempts at each question, all written with reasoning, those with the right answer in the right form may be kept.
"""

import argparse
import random
from collections.abc import Sequence
from functools import partial

from rewards.answers import split_completion
from sail_rl.command_line import BadInput
from sail_rl.data.building.job import Record, Taken, do_job, open_journal
from sail_rl.data.building.rows import traced_row
from sail_rl.data.building.sampling_run import Sampled, Sampler, open_sampler, read_recipe, sampling_job

THINKING = ("think", "by_kind")  # of data.thinking: both ask for reasoning and a boxed answer


def collect(arguments: argparse.Namespace) -> None:
    """The whole command."""
    recipe = read_recipe(arguments)
    if recipe.data.thinking not in THINKING:
        raise BadInput(f"data.thinking = {recipe.data.thinking}: reject collects reasoning; set data.thinking=think")
    if not 1 <= arguments.keep <= arguments.samples:
        raise BadInput(f"--keep {arguments.keep}: give 1 to {arguments.samples}, which is --samples")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"thinking": "think"})})
    job = sampling_job("reject", recipe, arguments, keep=arguments.keep)
    journal = open_journal(job)
    if journal is None:
        return
    with open_sampler(recipe, job, arguments.samples) as sampler:
        do_job(job, journal, partial(work, sampler, arguments.keep, recipe.seed), sampler.at_once)


def work(sampler: Sampler, most: int, seed: int, taken: Sequence[Taken]) -> list[Record]:
    """Records of a chunk."""
    sampled, refused = sampler.sample(taken)
    records = [one.dropped("malformed row", why) for one, why in refused]
    return records + [chosen(one, most, seed) for one in sampled]


def chosen(sampled: Sampled, most: int, seed: int) -> Record:
    """Up to so many different traces, drawn by lot among the right ones: always the shortest would shorten them."""
    one, attempts = sampled.taken, sampled.attempts
    right = [attempt for attempt in attempts if attempt.correct]
    traces = list(dict.fromkeys(trace(attempt.text) for attempt in right if attempt.well_formed))
    figures = {f"right of {len(attempts) + sampled.unscored}": str(len(right))}
    if not traces:
        reason = "right, but in no right form" if right else "no attempt is right"
        return one.dropped(reason, figures=figures)
    picked = random.Random(f"{seed}/{one.number}").sample(traces, min(most, len(traces)))
    counts = {"samples": len(attempts), "correct": len(right)}
    rows = [traced_row(one.row, reasoning) | counts for reasoning in picked]
    return one.kept("a right trace of its own", *rows, figures=figures)


def trace(text: str) -> str:
    """The reasoning of a well-formed completion."""
    return (split_completion(text).think or "").strip()
