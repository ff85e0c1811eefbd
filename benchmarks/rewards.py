"""Verifications per second and accuracy: our ladder, TRL's accuracy_reward, and math-verify as verl configures it.

    python benchmarks/rewards.py [--short] [--json PATH]

Everybody judges the same completions in the same order, one side after the other, other completions in each round,
after a round for warming up. Golds are boxed for the others, without which most would be misread. Ours is measured with
one worker, which waits while the trainer's process compares and the other way round: one core's work, as theirs.
Accuracy is on the mix, whose labels follow from how it is made, and on the rows of tests/data/answer_pairs.jsonl.
"""

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.answer_mix import GROUP, KINDS, Case, cases
from benchmarks.common import Timing, interleave, machine, markdown, medians, prepare_process, results_file, save

QUESTIONS, SHORT_QUESTIONS = 128, 16
ROUNDS, SHORT_ROUNDS = 5, 1
PAIRS = Path(__file__).parent.parent / "tests" / "data" / "answer_pairs.jsonl"

Side = Callable[[Sequence[Case]], list[bool]]


def main() -> None:
    """Time and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one round of few questions")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prepare_process()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    questions, rounds = (SHORT_QUESTIONS, SHORT_ROUNDS) if arguments.short else (QUESTIONS, ROUNDS)
    result: dict[str, Any] = {"machine": machine(), "mix": shares(), "completions": questions * GROUP}
    result["rows"] = measure({"ours": ours, "trl": by_trl(), "verl": by_verl()}, questions, rounds)
    save(arguments.json or results_file("rewards", arguments.short), result, table(result))


def measure(sides: dict[str, Side], questions: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each side."""
    from rewards import algebra_pool

    algebra_pool.use_workers(1)
    verdicts: dict[str, list[bool]] = {name: [] for name in sides}
    labels: list[bool] = []
    timings: dict[str, list[Timing]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}", flush=True)
        completions = cases(questions, seed=number)
        labels += [case.right for case in completions]
        steps = {name: partial(judge_into, verdicts[name], side, completions) for name, side in sides.items()}
        for name, runs in interleave(steps, rounds=1).items():
            timings[name] += runs if number else []
    seconds = medians(timings, "wall")
    pairs = labelled_rows()
    rows = [
        {
            "side": name,
            "per_second": questions * GROUP / seconds[name],
            "ratio": seconds[name] / seconds["ours"],
            "right_on_mix": agreement(verdicts[name], labels),
            "right_on_pairs": agreement(sides[name](pairs), [case.right for case in pairs]),
        }
        for name in sides
    ]
    algebra_pool.close()
    return rows


def judge_into(verdicts: list[bool], side: Side, completions: Sequence[Case]) -> None:
    """Judge, and keep the verdicts."""
    verdicts += side(completions)


def ours(completions: Sequence[Case]) -> list[bool]:
    """Our reward as the loop calls it."""
    from rewards import accuracy_reward

    found = accuracy_reward([case.completion for case in completions], answer=[case.gold for case in completions])
    return [value == 1.0 for value in found]


def by_trl() -> Side:
    """TRL's reward with boxed golds."""
    from trl.rewards import accuracy_reward

    def judge(completions: Sequence[Case]) -> list[bool]:
        messages = [[{"role": "assistant", "content": case.completion}] for case in completions]
        found = accuracy_reward(messages, [rf"\boxed{{{case.gold}}}" for case in completions])
        return [value == 1.0 for value in found]

    return judge


def by_verl() -> Side:
    """verl/utils/reward_score/math_verify.py: boxed golds, answers by Expr and Latex, errors and timeouts score 0."""
    from math_verify.errors import TimeoutException
    from math_verify.metric import math_metric
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

    metric = math_metric(
        gold_extraction_target=(LatexExtractionConfig(),),
        pred_extraction_target=(ExprExtractionConfig(), LatexExtractionConfig()),
    )

    def judge_one(case: Case) -> bool:
        try:
            return metric([rf"\boxed{{{case.gold}}}"], [case.completion])[0] == 1.0
        except (Exception, TimeoutException):
            return False

    return lambda completions: [judge_one(case) for case in completions]


def labelled_rows() -> list[Case]:
    """The labelled rows, without those that hold math-verify up."""
    rows = map(json.loads, PAIRS.read_text("utf-8").splitlines())
    kept = [row for row in rows if not row["note"].startswith("path:")]
    return [Case("pair", row["gold"], row["completion"], row["correct"]) for row in kept]


def agreement(verdicts: Sequence[bool], labels: Sequence[bool]) -> float:
    """The share that is as labelled."""
    return sum(verdict == label for verdict, label in zip(verdicts, labels, strict=True)) / len(labels)


def shares() -> dict[str, float]:
    """What the mix is made of."""
    return {kind.__name__: share for kind, share in KINDS}


def table(result: dict[str, Any]) -> str:
    """Speed and accuracy side by side."""
    columns = {
        "side": "side",
        "per_second": "verifications per second",
        "ratio": "times slower than ours",
        "right_on_mix": "right on the mix",
        "right_on_pairs": "right on the labelled rows",
    }
    mix = ", ".join(f"{name} {share:.0%}" for name, share in result["mix"].items())
    return f"{result['completions']} completions a round with thoughts of 0.8 to 4 kB: {mix}.\n\n" + markdown(
        result["rows"], columns
    )


if __name__ == "__main__":
    main()
