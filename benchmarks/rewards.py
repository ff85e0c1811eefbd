"""Verifications per second and accuracy: our ladder, TRL's accuracy_reward, and math-verify as verl configures it.

    python benchmarks/rewards.py [--short] [--json PATH]

Everybody judges the same completions in the same order, one side after the other, other completions in each round,
after a round for warming up. Golds are boxed for the others, without which most would be misread. Ours is measured with
one worker, which waits while the trainer's process compares and the other way round: one core's work, as theirs.
Accuracy is on the mix, whose labels follow from how it is made, and on the rows of tests/data/answer_pairs.jsonl.

Of ours also the slowest of all labelled rows, hostile ones included, and for how long a thread of the trainer's process
gets no turn at most while hostile completions are scored (it asks for one every 10 ms).
"""

import argparse
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.answer_mix import GROUP, KINDS, Case, cases
from benchmarks.common import Timing, interleave, machine, markdown, medians, prepare_process, results_file, save

QUESTIONS, SHORT_QUESTIONS = 128, 16
ROUNDS, SHORT_ROUNDS = 5, 1
HOSTILE, BEAT_SECONDS = 512, 0.01
PAIRS = Path(__file__).parent.parent / "tests" / "data" / "answer_pairs.jsonl"

GOLDS = ["5", "x^2+1", r"2\sqrt{3}", "B", "yes", "1, 2", "(1,2)", "5 cm"]

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
    result["slowest"], result["heartbeat"] = slowest_row(), heartbeat_gap()
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


def slowest_row() -> dict[str, Any]:
    """The labelled row that takes our reward longest, the time in a worker included."""
    from rewards import algebra_pool
    from rewards.accuracy import accuracy_verdicts

    rows = [json.loads(line) for line in PAIRS.read_text("utf-8").splitlines()]
    algebra_pool.use_workers(1)
    found = accuracy_verdicts([row["completion"] for row in rows], answer=[row["gold"] for row in rows])
    algebra_pool.close()
    seconds, place = max((verdict.seconds, place) for place, verdict in enumerate(found))
    return {"rows": len(rows), "seconds": seconds, "completion": rows[place]["completion"][:80]}


def heartbeat_gap() -> dict[str, Any]:
    """The longest that a thread waits for its turn, and the score of the hostile completions that are scored then."""
    from rewards import accuracy_reward, algebra_pool

    algebra_pool.use_workers(1)
    completions = hostile_completions(HOSTILE)
    beats, stopped = [time.perf_counter()], threading.Event()

    def beat() -> None:
        while not stopped.wait(BEAT_SECONDS):
            beats.append(time.perf_counter())

    thread = threading.Thread(target=beat)
    thread.start()
    scores = accuracy_reward(completions, answer=[GOLDS[n % len(GOLDS)] for n in range(HOSTILE)])
    beats.append(time.perf_counter())
    stopped.set()
    thread.join()
    algebra_pool.close()
    gap = max(after - before for before, after in pairwise(beats))
    return {"completions": HOSTILE, "seconds": beats[-1] - beats[0], "gap": gap, "earned": sum(map(float, scores))}


def hostile_completions(count: int) -> list[str]:
    """Towers, factorials, deep brackets and floods, and hard expressions that algebra is asked about; none is right."""
    towers = ["9^{9^{9}}", "9" * 5000 + "!", "10^{" + "9" * 1000 + "}", r"\sum_{k=1}^{1000000000} k", "(((5!)!)!)!"]
    nested = ["(" * 2000 + "5" + ")" * 2000, r"\frac{1}{" * 300 + "2" + "}" * 300, "{" * 500 + "5" + "}" * 500]
    floods = ["\\[" * 50_000, r"\boxed{" * 15_000, "x" * 100_000, "</think>" * 2000, r"\boxed{1} or " * 8000]
    hard = [rf"\boxed{{e^{{\pi^{{{n}.5}}}}+\sqrt[{n}]{{7}}}}" for n in range(40)]
    kinds = [*(rf"\boxed{{{text}}}" for text in towers + nested), *floods, *hard]
    return [kinds[n % len(kinds)] for n in range(count)]


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
    slowest, beat = result["slowest"], result["heartbeat"]
    return (
        f"{result['completions']} completions a round with thoughts of 0.8 to 4 kB: {mix}.\n\n"
        + markdown(result["rows"], columns)
        + f"\nOurs: the slowest of {slowest['rows']} labelled rows takes {slowest['seconds']:.2f} s "
        f"(`{slowest['completion']}`). While {beat['completions']} hostile completions are scored in "
        f"{beat['seconds']:.1f} s, a thread of the trainer waits at most {beat['gap']:.3f} s for its turn; they earn "
        f"{beat['earned']:g}.\n"
    )


if __name__ == "__main__":
    main()
