"""`sail-rl rewards test`: a reward on sample completions, in its own process, with what is odd about it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rewards.accuracy import gold_text
from rewards.call import TrainerState
from rewards.load import Reward, RewardError, load_reward
from rewards.score import call_safely
from rewards.verdict import Outcome, Verdict
from sail_rl.command_line import BadInput
from sail_rl.data.example import BadRow, answer_text, image_column, paths_of
from sail_rl.data.sources import Rows, open_file

MOST_ROWS = 8
SLOW_SECONDS = 0.1  # for one completion: a step of 128 would wait 13 s
THOUGHT = "<think>Let me look at it step by step, and then answer.</think>\n"
WRITTEN = ("completion", "completions")


@dataclass(frozen=True)
class Sample:
    """One completion to try."""

    row: str
    kind: str
    text: str
    finish_reason: str
    columns: Mapping[str, Any]


def try_reward(function: str, data: Path, timeout: float | None, in_process: bool) -> bool:
    """Call the reward, print a table of what it gave and what is wrong with it; whether nothing is wrong."""
    samples = read_samples(data)
    try:
        reward = load_reward(function, function.rsplit(":", 1)[-1], 1.0, {}, timeout, in_process)
    except RewardError as error:
        raise BadInput(str(error)) from error
    print(f"calling {reward.name} on {len(samples)} completions of {data}", flush=True)
    columns, group_size = as_columns(samples, data.parent), sum(one.row == samples[0].row for one in samples)
    start = time.perf_counter()
    verdicts, errors = call_safely(reward, columns, group_size)
    seconds = time.perf_counter() - start
    problems = errors + odd(verdicts, samples) + ([] if errors else unsteady(reward, columns, group_size, verdicts))
    reward.close()
    show(samples, verdicts)
    print(f"\n{len(samples)} completions in {seconds:.2f} s, the start of a process included")
    print("\n".join(["problems:", *(f"  {one}" for one in problems)]) if problems else "no problems")
    return not problems


def read_samples(data: Path) -> list[Sample]:
    """The completions that the rows bring along, or some of ours about each row."""
    rows = open_file(data, "--data")
    if len(rows) == 0:
        raise BadInput(f"--data {data}: there are no rows in it")
    read = [read_row(rows, index, data) for index in range(min(len(rows), MOST_ROWS))]
    answers = [gold_text(row.get("answer")) or gold_text(row.get("solution")) for row in read]
    samples = []
    for index, row in enumerate(read):
        columns = {key: value for key, value in row.items() if key not in WRITTEN}
        other = next((answer for answer in answers if answer != answers[index]), "0")
        name = str(row.get("id", index + 1))
        samples += [Sample(name, *one, columns) for one in written(row) or invented(answers[index], other)]
    return samples


def read_row(rows: Rows, index: int, data: Path) -> dict[str, Any]:
    """A row, with an answer of its own or one that a completion of its own makes needless."""
    try:
        row = dict(rows.row(index))
        if not written(row):
            answer_text(row)
    except BadRow as error:
        raise BadInput(f"--data {data}, row {index + 1}: {error}") from None
    return row


def written(row: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(kind, text, finish reason) of the row's own completions."""
    given = row.get("completions") or ([row["completion"]] if row.get("completion") is not None else [])
    return [("given", str(text), str(row.get("finish_reason") or "stop")) for text in given]


def invented(answer: str, other: str) -> list[tuple[str, str, str]]:
    """(kind, text, finish reason) of completions as a model writes them, good and bad."""
    return [
        ("right", rf"{THOUGHT}The answer is \boxed{{{answer}}}.", "stop"),
        ("wrong", rf"{THOUGHT}The answer is \boxed{{{other}}}.", "stop"),
        ("no box", f"{THOUGHT}The answer is {answer}.", "stop"),
        ("cut off", f"{THOUGHT[:30]}", "length"),
        ("empty", "", "stop"),
        ("hostile", rf"{THOUGHT}\boxed{{9^{{9^{{9^{{9}}}}}}}}" + r"\[" * 2000, "stop"),
    ]


def as_columns(samples: Sequence[Sample], folder: Path) -> dict[str, Any]:
    """The keyword arguments of a reward call."""
    names = dict.fromkeys(name for sample in samples for name in sample.columns if name not in ("prompt", "image"))
    columns: dict[str, Any] = {name: [sample.columns.get(name) for sample in samples] for name in names}
    prompts = [sample.columns.get("prompt") or sample.columns.get("question") or "" for sample in samples]
    talks = [isinstance(prompt, list) for prompt in prompts]
    pairs = zip(talks, samples, strict=True)
    return columns | {
        "prompts": prompts,
        "completions": [[{"role": "assistant", "content": one.text}] if talk else one.text for talk, one in pairs],
        "completion_ids": [list(sample.text.encode("utf-8", "replace")) for sample in samples],
        "finish_reason": [sample.finish_reason for sample in samples],
        "images": [paths_of(image_column(sample.columns), folder) for sample in samples],
        "trainer_state": TrainerState(1, 100),
    }


def odd(verdicts: Sequence[Verdict], samples: Sequence[Sample]) -> list[str]:
    """What would spoil a run without raising anything."""
    values = [verdict.value for verdict in verdicts]
    known = [value for value in values if value is not None]
    found = []
    failed = sum(verdict.outcome == Outcome.INFRA_ERROR for verdict in verdicts)
    if failed:
        found.append(f"it failed on {failed} of {len(values)} completions, which would be masked")
    if len(values) - len(known) > failed:
        found.append(f"it gave None for {len(values) - len(known) - failed} of {len(values)} completions")
    if len(set(known)) == 1 and len(values) > 1:
        found.append(f"it gave {known[0]:g} for every completion: nothing can be learned from that")
    slow = max(verdict.seconds for verdict in verdicts)
    if slow > SLOW_SECONDS:
        found.append(f"it takes {slow:.2f} s for one completion")
    empty = [value for value, sample in zip(values, samples, strict=True) if not sample.text.strip()]
    if known and empty and any(value == max(known) > min(known) for value in empty):
        found.append("an empty completion earns as much as the best one")
    return found


def unsteady(reward: Reward, columns: Mapping[str, Any], group_size: int, verdicts: Sequence[Verdict]) -> list[str]:
    """Whether the same call, and calls in another order, give the same."""
    values = [verdict.value for verdict in verdicts]
    if [verdict.value for verdict in call_safely(reward, columns, group_size)[0]] != values:
        return ["the same call gives other values a second time: a resumed run would differ"]
    turned = {key: value[::-1] if isinstance(value, list) else value for key, value in columns.items()}
    if [verdict.value for verdict in call_safely(reward, turned, group_size)[0]][::-1] != values:
        return ["values depend on the order of the completions"]
    return []


def show(samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> None:
    """One line for each completion."""
    table = Table("row", "completion", "ends with", "reward", "outcome", "ms")
    for sample, verdict in zip(samples, verdicts, strict=True):
        value = "None" if verdict.value is None else f"{verdict.value:g}"
        end = " ".join(sample.text.split())[-40:]
        table.add_row(sample.row, sample.kind, end, value, verdict.outcome, f"{1000 * verdict.seconds:.2f}")
    Console(markup=False, highlight=False).print(table)
