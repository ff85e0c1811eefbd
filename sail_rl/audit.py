"""What rewards have judged, kept with the run, and `sail-rl rewards audit` which goes through it."""

import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rewards.accuracy import gold_text
from rewards.pool import Pool
from rewards.score import Scores
from rewards.verdict import Outcome, Verdict
from rewards.worker import Job
from rollouts import Rollout
from sail_rl.command_line import BadInput
from sail_rl.launch import Run
from sail_rl.questions import Question
from sail_rl.run_folder import installed

FILE = "verdicts.jsonl"
PLAIN = (Outcome.CORRECT, Outcome.WRONG)
REMARKABLE = (Outcome.REFUSED, Outcome.TIMEOUT, Outcome.INFRA_ERROR)
KEPT_EACH = 8  # of each reward and step: so many remarkable ones, and a sample of so many others
SLOW_KEPT = 2
SHOWN = 20
CUT_AT = 200  # characters of an answer
MOST_COMPARED = 400  # with math-verify, which takes milliseconds to seconds for each
CPU_SECONDS, WALL_SECONDS, MEMORY = 5.0, 60.0, 2 << 30

Record = dict[str, Any]


def log_verdicts(
    run: Run, step: int, questions: Sequence[Question], rollouts: Sequence[Rollout], scores: Scores
) -> None:
    """Add to `verdicts.jsonl` what is worth a look of this step's verdicts, of the first process."""
    if not run.is_main:
        return
    group_size = len(rollouts) // len(questions)
    lines = []
    for name, verdicts in scores.verdicts.items():
        for index in kept(verdicts, random.Random(step)):
            example, verdict = questions[index // group_size].example, verdicts[index]
            record = {
                "step": step,
                "reward": name,
                "id": example.id,
                "gold": gold_text(example.columns["answer"]),
                "answer_type": example.columns.get("answer_type"),
                "answer": None if verdict.answer is None else verdict.answer[:CUT_AT],
                "outcome": str(verdict.outcome),
                "value": verdict.value,
                "seconds": verdict.seconds,
            }
            lines.append(json.dumps(record, default=str) + "\n")
    with (run.folder / FILE).open("a") as file:
        file.writelines(lines)


def kept(verdicts: Sequence[Verdict], draw: random.Random) -> list[int]:
    """The remarkable ones, the slowest, and a sample of those with an answer."""
    remarkable = [i for i, verdict in enumerate(verdicts) if verdict.outcome in REMARKABLE][:KEPT_EACH]
    slowest = sorted(range(len(verdicts)), key=lambda i: -verdicts[i].seconds)[:SLOW_KEPT]
    answered = [i for i, verdict in enumerate(verdicts) if verdict.answer is not None and verdict.outcome in PLAIN]
    return sorted({*remarkable, *slowest, *draw.sample(answered, min(KEPT_EACH, len(answered)))})


def audit(run: Path) -> None:
    """Print the slowest, the refused, and where the ladder and math-verify disagree."""
    if not (run / FILE).is_file():
        raise BadInput(f"{run} has no {FILE}: it is no run folder of train_grpo.py, or it has done no step")
    records = [json.loads(line) for line in (run / FILE).read_text().splitlines()]
    counts = Counter((record["reward"], record["outcome"]) for record in records)
    print(f"{len(records)} verdicts kept: " + ", ".join(f"{r} {o} {n}" for (r, o), n in sorted(counts.items())))
    show("slowest", sorted(records, key=lambda record: -record["seconds"])[:SHOWN])
    show("refused, out of time, or failed", [one for one in records if one["outcome"] in REMARKABLE][:SHOWN])
    compared = [one for one in records if one["outcome"] in PLAIN and one["answer"] is not None]
    compared = random.Random(0).sample(compared, min(MOST_COMPARED, len(compared)))
    print(f"comparing {len(compared)} answers with math-verify {installed('math-verify')}", file=sys.stderr, flush=True)
    differing = [one for one, right in zip(compared, by_math_verify(compared), strict=True) if right != one["value"]]
    show(f"{len(differing)} of {len(compared)} judged differently by math-verify", differing[:SHOWN])


def by_math_verify(records: Sequence[Record]) -> list[bool]:
    """What math-verify says by itself, in a process that can be killed; what it does not finish is wrong."""
    jobs = [Job((one["gold"], one["answer"]), CPU_SECONDS, WALL_SECONDS) for one in records]
    pool = Pool("rewards.algebra:by_math_verify", 1, MEMORY)
    results = pool.run(jobs)
    pool.close()
    return [bool(result.done.value) for result in results]


def show(title: str, records: Sequence[Record]) -> None:
    """A table, or that there is nothing to show."""
    if not records:
        print(f"\n{title}: none")
        return
    table = Table(
        "step", "id", "reward", "right answer", "type", "answer", "outcome", "ms", title=title, title_justify="left"
    )
    for one in records:
        texts = (one["gold"], one["answer_type"] or "", one["answer"] or "")
        table.add_row(
            str(one["step"]), one["id"], one["reward"], *texts, one["outcome"], f"{1000 * one['seconds']:.1f}"
        )
    Console(markup=False, highlight=False).print(table)
