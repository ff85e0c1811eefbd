"""`sail-rl data filter`: tags are repaired, and rows dropped that are malformed, say nothing, or repeat another."""

import argparse
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from sail_rl.command_line import BadInput
from sail_rl.data.building.duplicates import content_keys, without_duplicates
from sail_rl.data.building.job import Job, Record, Records, Taken, do_job, open_journal
from sail_rl.data.building.tags import repair
from sail_rl.data.images import BadRow
from sail_rl.data.mixture import JoinedRows

AT_ONCE = 64
LONG_ANSWER = 20  # words; a shorter answer is bound to be found in its reasoning
_WORD = re.compile(r"\w+")
LENGTHS = "words of reasoning"


def clean_rows(rows: JoinedRows, arguments: argparse.Namespace) -> None:
    """The whole command."""
    named = ("split", "overlap", "shortest", "longest", "most_per_bucket", "near", "needs_reasoning", "seed")
    settings = {name: getattr(arguments, name) for name in named}
    if not 0 < arguments.overlap <= 1:
        raise BadInput(f"--overlap {arguments.overlap}: give a share above 0, up to 1")
    if arguments.near is not None and not 0 <= arguments.near <= 16:
        raise BadInput(f"--near {arguments.near}: give 0 to 16 of 64 bits")
    if arguments.longest is not None and arguments.longest < arguments.shortest:
        raise BadInput(f"--longest {arguments.longest} is less than --shortest {arguments.shortest}")
    job = Job("filter", rows, arguments.output, settings, arguments.limit)
    journal = open_journal(job)
    if journal is not None:
        do_job(job, journal, partial(work, job.output.parent, arguments), AT_ONCE, partial(finish, arguments))


def work(folder: Path, arguments: argparse.Namespace, taken: Sequence[Taken]) -> list[Record]:
    """Records of a chunk, each row by itself, in threads: most of the time goes into decoding, which may run aside."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(partial(look_at, folder=folder, arguments=arguments), taken))


def look_at(one: Taken, folder: Path, arguments: argparse.Namespace) -> Record:
    """All that can be seen of one row without the others."""
    try:
        row, mended = repair(one.row)
        keys = content_keys(row, folder, arguments.near is not None)
    except (BadRow, OSError) as error:
        return one.dropped("malformed row", str(error))
    reasoning = str(row.get("reasoning") or "")
    row.setdefault("kind", "cot" if reasoning else "direct")
    length = len(reasoning.split())
    figures = {LENGTHS: bucket(length)}
    if not reasoning:
        if arguments.needs_reasoning:
            return one.dropped("no reasoning", figures=figures)
    elif problem := overlap_problem(reasoning, str(row.get("answer") or ""), arguments.overlap):
        return one.dropped(problem, figures=figures)
    elif length < arguments.shortest:
        return one.dropped("reasoning too short", f"{length} words", figures=figures)
    elif arguments.longest is not None and length > arguments.longest:
        return one.dropped("reasoning too long", f"{length} words", figures=figures)
    return one.kept(mended or "as it was", row, figures=figures, memo=keys)


def overlap_problem(reasoning: str, answer: str, limit: float) -> str:
    """Whether one of them merely repeats the other; empty where not."""
    thought, said = words(reasoning), words(answer)
    if share_in(thought, said) >= limit:
        return "the reasoning only repeats the answer"
    if len(said) >= LONG_ANSWER and share_in(triples(said), triples(thought)) >= limit:
        return "the answer only repeats the reasoning"
    return ""


def words(text: str) -> list[str]:
    """Words and numbers in one spelling."""
    return _WORD.findall(text.casefold())


def triples(tokens: Sequence[str]) -> list[tuple[str, ...]]:
    """Every three words in a row."""
    return list(zip(tokens, tokens[1:], tokens[2:], strict=False))


def share_in(some: Sequence, others: Sequence) -> float:
    """Of these, the share that is among the others, each as often as it occurs."""
    common = Counter(some) & Counter(others)
    return common.total() / max(len(some), 1)


def bucket(length: int) -> str:
    """Lengths from one power of two to the next."""
    if length == 0:
        return "0"
    low = 1 << (length.bit_length() - 1)
    return f"{low} to {2 * low - 1}"


def finish(arguments: argparse.Namespace, records: Records) -> Iterator[Record]:
    """What needs all rows: duplicates, and then the buckets that are too full."""
    single = partial(without_duplicates, distance=arguments.near)
    if arguments.most_per_bucket is None:
        return single(records())
    surplus = surplus_rows(single(records()), arguments.most_per_bucket, arguments.seed)
    return without(single(records()), surplus)


def surplus_rows(records: Iterable[Record], most: int, seed: int) -> set[int]:
    """Drawn by lot from the rows with reasoning of each length, where there are more than so many."""
    members: dict[str, list[int]] = {}
    for record in records:
        if record.kept and record.kept[0].get("reasoning"):
            members.setdefault(record.figures[LENGTHS], []).append(record.row)
    draws = {name: random.Random(f"{seed}/{name}") for name in members}
    return {row for name, rows in members.items() for row in draws[name].sample(rows, max(0, len(rows) - most))}


def without(records: Iterable[Record], surplus: set[int]) -> Iterator[Record]:
    """The records with these rows dropped."""
    for record in records:
        full = record.row in surplus
        yield replace(record, kept=[], reason="bucket of lengths is full") if full else record
