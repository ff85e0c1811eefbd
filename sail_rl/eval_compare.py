"""`sail-rl eval-compare`: two evaluations of the same questions, side by side, with a paired test."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from sail_rl.command_line import BadInput, shown
from sail_rl.eval import Prediction
from sail_rl.eval_command import read_predictions
from sail_rl.eval_figures import GROUPED, by_question, escaped, resampled_means, share_right
from sail_rl.run_folder import write_json_lines

# What must be the same of a question, whoever answers it. How it was asked for (`mode`) may be what is compared.
SAME = ("id", "question", "answer")


@dataclass(frozen=True)
class Evaluation:
    """A finished `sail-rl eval`."""

    folder: Path
    samples: int
    questions: list[list[Prediction]]
    """The completions of each question, in the order of the questions."""


@dataclass(frozen=True)
class Difference:
    """How the second does on a set of questions, compared with the first."""

    questions: int
    first: float
    """The share of right completions."""
    second: float
    low: float
    """Of the difference, 95 % interval: a paired bootstrap."""
    high: float
    first_better: int
    """Questions with more right completions in the first."""
    second_better: int
    p: float
    """How likely so large a difference is between equals: two-sided, McNemar's exact test of greedy answers, from the
    paired bootstrap of several samples."""


def mcnemar(first_only: int, second_only: int) -> float:
    """The exact two-sided p of so uneven a split, were each question as likely to fall to either side."""
    total, fewer = first_only + second_only, min(first_only, second_only)
    tail = sum(comb(total, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def difference(first: Sequence[float], second: Sequence[float], exact: bool) -> Difference:
    """Of the shares of right completions of each question; `exact` where these are 0 or 1."""
    gaps_Q = np.array(second) - np.array(first)
    means_R = resampled_means(gaps_Q[:, None], seed=0)[:, 0]
    low, high = np.quantile(means_R, [0.025, 0.975])
    worse, better = int((gaps_Q < 0).sum()), int((gaps_Q > 0).sum())
    side = min(float((means_R <= 1e-12).mean()), float((means_R >= -1e-12).mean()))
    p = mcnemar(worse, better) if exact else min(1.0, 2 * side)
    return Difference(
        len(gaps_Q), float(np.mean(first)), float(np.mean(second)), float(low), float(high), worse, better, p
    )


def read_evaluation(folder: Path) -> Evaluation:
    """The predictions of a folder; raises BadInput for one that is not finished."""
    summary = folder / "summary.json"
    if not summary.is_file():
        raise BadInput(f"{folder}: there is no finished evaluation; `sail-rl eval RECIPE --output {folder}` makes one")
    samples = json.loads(summary.read_text())["samples"]
    return Evaluation(folder, samples, by_question(read_predictions(folder / "predictions.jsonl")))


def check_same_questions(first: Evaluation, second: Evaluation) -> None:
    """Refuse to compare answers to different questions."""
    names = f"{first.folder} and {second.folder} did not ask the same questions"
    advice = "evaluate both on the same data.eval, with the same --limit"
    if len(first.questions) != len(second.questions):
        raise BadInput(f"{names}: {len(first.questions)} and {len(second.questions)} of them; {advice}")
    for number, (ours, theirs) in enumerate(zip(first.questions, second.questions, strict=True), 1):
        old, new = identity(ours[0]), identity(theirs[0])
        for key, value in old.items():
            if value != new[key] and not (key == "images" and [] in (value, new[key])):  # other tools do not keep them
                raise BadInput(f"{names}: {key} of question {number} is {shown(value)} and {shown(new[key])}; {advice}")


def identity(prediction: Prediction) -> dict[str, Any]:
    """What tells a question from others; pictures by their files' names, which do not depend on the folder."""
    pictures = [Path(name).name for name in prediction["images"]]
    return {"row": prediction["position"], **{key: prediction[key] for key in SAME}, "images": pictures}


def compare(first: Evaluation, second: Evaluation) -> dict[str, Difference]:
    """Of all questions, and by the columns that both have, where these tell questions apart."""
    check_same_questions(first, second)
    pairs = list(zip(first.questions, second.questions, strict=True))
    exact = first.samples == second.samples == 1
    groups = {"all": pairs}
    for column in GROUPED:
        named = [(ours[0].get(column), theirs[0].get(column)) for ours, theirs in pairs]
        # A column that differs between the two is what they differ in, not a group of questions.
        values = sorted({str(value) for value, _ in named if value is not None})
        if len(values) > 1 and all(value == other for value, other in named):
            for value in values:
                members = [pair for pair, (own, _) in zip(pairs, named, strict=True) if str(own) == value]
                groups[f"{column}: {value}"] = members
    return {name: difference(*shares(members), exact) for name, members in groups.items()}


def shares(pairs: Sequence[tuple[list[Prediction], list[Prediction]]]) -> tuple[list[float], list[float]]:
    """Shares of right completions, of the first and of the second."""
    return [share_right(ours) for ours, _ in pairs], [share_right(theirs) for _, theirs in pairs]


def markdown_table(differences: dict[str, Difference], first: Path, second: Path) -> str:
    """A line for each set of questions; A and B are the folders."""
    head = "| | questions | A | B | B - A (95 %) | A better | B better | p |"
    lines = [f"A: {first}", f"B: {second}", "", head, "|---|" + "---:|" * 7]
    for name, one in differences.items():
        gap = f"{one.second - one.first:+.3f} ({one.low:+.3f} to {one.high:+.3f})"
        cells = (one.questions, f"{one.first:.3f}", f"{one.second:.3f}", gap, one.first_better, one.second_better)
        lines.append(f"| {escaped(name)} | " + " | ".join(map(str, cells)) + f" | {one.p:.3g} |")
    return "\n".join(lines) + "\n"


def side_by_side(first: Evaluation, second: Evaluation) -> list[dict[str, Any]]:
    """A line for each question: both shares and all completions; the largest differences first."""
    lines = [
        identity(ours[0])
        | {"first": share_right(ours), "second": share_right(theirs)}
        | {"first_completions": texts(ours), "second_completions": texts(theirs)}
        for ours, theirs in zip(first.questions, second.questions, strict=True)
    ]
    return sorted(lines, key=lambda line: -abs(line["second"] - line["first"]))


def texts(completions: Sequence[Prediction]) -> list[str]:
    """What was written."""
    return [one["completion"] for one in completions]


def compare_folders(first: Path, second: Path, output: Path | None) -> None:
    """The whole command."""
    ours, theirs = read_evaluation(first), read_evaluation(second)
    table = markdown_table(compare(ours, theirs), first, second)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_json_lines(output / "comparison.jsonl", side_by_side(ours, theirs))
        (output / "comparison.md").write_text(table)
    print(table, end="")
