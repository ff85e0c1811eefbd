"""`sail-rl data passrate`: questions that are challenging yet solvable for the model that is to be trained on them.

Of the attempts at each question those that are right are counted. Questions that all attempts solve teach nothing; nor
do, where reasoning is needed, those that none solves: these are mostly wrong, or out of reach.
"""

import argparse
from collections.abc import Sequence
from functools import partial

from sail_rl.data.building.job import Record, Taken, do_job, open_journal
from sail_rl.data.building.sampling_run import Sampled, Sampler, open_sampler, read_recipe, sampling_job


def measure(arguments: argparse.Namespace) -> None:
    """The whole command."""
    recipe = read_recipe(arguments)
    job = sampling_job("passrate", recipe, arguments, unsolved=arguments.unsolved)
    journal = open_journal(job)
    if journal is None:
        return
    with open_sampler(recipe, job, arguments.samples) as sampler:
        do_job(job, journal, partial(work, sampler, arguments.unsolved), sampler.at_once)


def work(sampler: Sampler, unsolved: str, taken: Sequence[Taken]) -> list[Record]:
    """Records of a chunk."""
    sampled, refused = sampler.sample(taken)
    return [one.dropped("malformed row", why) for one, why in refused] + [judged(one, unsolved) for one in sampled]


def judged(sampled: Sampled, unsolved: str) -> Record:
    """Keep a question or drop it, with its counts."""
    one, samples = sampled.taken, len(sampled.attempts)
    correct = sum(attempt.correct for attempt in sampled.attempts)
    if sampled.unscored:
        return one.dropped("the rewards could not judge the attempts", f"{sampled.unscored} of them")
    figures = {f"right of {samples}": str(correct)}
    if correct == samples:
        return one.dropped("always solved", figures=figures)
    if correct == 0 and (unsolved == "drop" or (unsolved == "by_row" and needs_reasoning(sampled))):
        return one.dropped("never solved", figures=figures)
    # The name under which the `judging` reward reads what is solved without reasoning.
    rate = "direct_pass_rate" if sampled.form == "direct" else "pass_rate"
    counts = {"samples": samples, "correct": correct, rate: correct / samples}
    reason = "solved now and then" if correct else "never solved, kept all the same"
    return one.kept(reason, one.row | counts, figures=figures)


def needs_reasoning(sampled: Sampled) -> bool:
    """By the row's own word; a row that has none is to be thought about."""
    row = sampled.taken.row
    return row.get("needs_thinking") is not False and row.get("kind") != "direct"
