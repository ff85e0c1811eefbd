"""Does a curriculum save rollouts? A few fair questions among many that are too hard, asked again and again.

    .venv/bin/python benchmarks/curriculum.py [--seeds 0 1 2]
        (one to two minutes a run on 2 quiet cores; finished runs are skipped, so it can be stopped and resumed)

The start is the quickstart's SFT, which can add two cards but mostly guesses, and has seen no question about shapes.
A quarter of the questions are sums of cards, the rest are about shapes, and are not learnt in this time. The learning
rate is a quarter of the quickstart's, at which sums take some thousand rollouts. Accuracy is that on unseen sums.
Writes benchmarks/results/curriculum.{json,md}.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import SHORT_RESULTS, machine, markdown, results_file, save
from benchmarks.quickstart_runs import launch, sft_start

STEPS, SHORT_STEPS = 80, 2
EVAL_EVERY = 4
LEARNING_RATE = 5e-5
REACHED = 0.9  # accuracy
SUMS = "{source: pictures, families: [cards], levels: [1], forms: [sum], rows: 32, seed: 1}"
OTHERS = "{source: pictures, families: [shapes], levels: [2, 3], rows: 96, seed: 1}"
EVAL = "{source: pictures, families: [cards], levels: [1], forms: [sum], rows: 300}"
RUNS = {
    "in turn": (),
    "curriculum": ("data.curriculum={}",),
    "dynamic sampling": ("grpo.dynamic_sampling=3",),
    "both": ("data.curriculum={}", "grpo.dynamic_sampling=3"),
}
COLUMNS = {
    "run": "prompts",
    "seeds": "seeds",
    "without_signal": "groups without signal",
    "quarter": "accuracy, a quarter of the rollouts",
    "half": "accuracy, half of the rollouts",
    "whole": "accuracy, all rollouts",
    "rollouts_to_reach": f"rollouts to {REACHED:.0%}",
    "seconds": "training, s",
}


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS), help="some of the rows")
    parser.add_argument("--short", action="store_true", help="two steps each, to see that it works")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    path, here = arguments.json or results_file("curriculum", arguments.short), machine()
    for seed in arguments.seeds:
        for name in arguments.only:
            run_of(name, seed, arguments.short)
            rows = finished_rows(arguments.short)
            text = f"Greedy accuracy on 300 unseen sums.\n\n{markdown(summary(rows), COLUMNS)}"
            save(path, {"machine": here, "rows": rows}, text)


def folder_of(name: str, seed: int, short: bool) -> Path:
    """Where a run is kept."""
    return SHORT_RESULTS / f"curriculum_{name.replace(' ', '_')}_{seed}{'_short' if short else ''}"


def run_of(name: str, seed: int, short: bool) -> None:
    """One training run through its real command; a finished one returns at once."""
    overrides = [
        *RUNS[name],
        f"optim.learning_rate={LEARNING_RATE}",
        f"data.train=[{SUMS}, {OTHERS}]",
        f"seed={seed}",
        f"model={sft_start(seed, short)}",
    ]
    overrides += [f"trainer.eval_every={EVAL_EVERY}", f"output_dir={folder_of(name, seed, short)}"]
    overrides += [f"data.eval={EVAL.replace('300', '8') if short else EVAL}"]
    launch("sail_rl/train_grpo.py", "recipes/quickstart.yaml", SHORT_STEPS if short else STEPS, *overrides)


def finished_rows(short: bool) -> list[dict[str, Any]]:
    """A row of every run that is finished, whenever that was."""
    folders = {(name, seed): folder_of(name, seed, short) for name in RUNS for seed in range(10)}
    return [
        {"run": name, "seed": seed, **row_of(folder)}
        for (name, seed), folder in folders.items()
        if (folder / "summary.json").is_file()
    ]


def row_of(folder: Path) -> dict[str, Any]:
    """Accuracy at equal numbers of rollouts, which with dynamic sampling are made in fewer steps."""
    ended = json.loads((folder / "summary.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    budget, rollouts, points = 16 * 8 * len(records), 0, [(0, ended["accuracy_before"])]
    for record in records:
        rollouts += 8 * record["groups/total"]
        last = record["step"] == records[-1]["step"]
        accuracy = ended["accuracy_after"] if last else record.get("eval/accuracy")
        points += [(rollouts, accuracy)] if accuracy is not None else []
    return {
        "quarter": [accuracy for made, accuracy in points if made <= budget / 4][-1],
        "half": [accuracy for made, accuracy in points if made <= budget / 2][-1],
        "whole": [accuracy for made, accuracy in points if made <= budget][-1],
        "rollouts_to_reach": next((made for made, accuracy in points if accuracy >= REACHED), None),
        "without_signal": sum(r["groups/dropped"] for r in records) / sum(r["groups/total"] for r in records),
        "seconds": ended["seconds_this_stage"],
    }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds; no number of rollouts where a seed has not reached the accuracy."""
    lines = []
    for name in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == name]
        reached = [row["rollouts_to_reach"] for row in mine]
        line = {
            key: mean(row[key] for row in mine) for key in ("without_signal", "quarter", "half", "whole", "seconds")
        }
        line["rollouts_to_reach"] = None if None in reached else round(mean(reached))
        lines.append({"run": name, "seeds": len(mine), **line})
    return lines


if __name__ == "__main__":
    main()
