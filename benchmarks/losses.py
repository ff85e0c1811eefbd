"""The loss types, baselines and ways of sampling on the picture task: accuracy at equal numbers of rollouts.

    .venv/bin/python benchmarks/losses.py [--seeds 0 1 2] [--only dapo gspo]
        (half a minute to a minute a run on 2 quiet cores; finished runs are skipped, so it can be stopped and resumed)

Every run starts from the quickstart's SFT and is the quickstart's GRPO with four optimizer steps for each batch of
rollouts, so that ratios of probabilities are not 1 and the losses differ, at a quarter of its learning rate, at which
the first thousand rollouts do not yet solve the task. Writes benchmarks/results/losses.{json,md}.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common import SHORT_RESULTS, machine, markdown, results_file, save
from benchmarks.quickstart_runs import launch, sft_start

STEPS, SHORT_STEPS = 20, 2
EVAL_EVERY = 2
REACHED = 0.9  # accuracy
POINTS = (512, 1024, 1536, 2560)  # rollouts
COMMON = ("grpo.mini_batches=4", "optim.learning_rate=5e-5")
RUNS = {
    "dapo": (),
    "dapo, one update a step": ("grpo.mini_batches=1",),
    "dapo, eight updates a step": ("grpo.num_iterations=2",),
    "dapo, dynamic sampling": ("grpo.dynamic_sampling=3",),
    "dapo, top 20 % entropy": ("grpo.top_entropy_quantile=0.2",),
    "dapo, entropy bonus": ("grpo.entropy_coef=0.01",),
    "grpo": ("grpo.loss_type=grpo",),
    "dr_grpo": ("grpo.loss_type=dr_grpo", "grpo.scale_rewards=none"),
    "gspo": (
        "grpo.loss_type=grpo",
        "grpo.importance_sampling_level=sequence",
        "grpo.epsilon=3e-4",
        "grpo.epsilon_high=4e-4",
    ),
    "cispo": ("grpo.loss_type=cispo", "grpo.epsilon_high=5.0"),
    "sapo": ("grpo.loss_type=sapo",),
    "rloo": ("grpo.baseline=leave_one_out", "grpo.scale_rewards=none"),
    "reinforce++": ("grpo.baseline=batch", "grpo.scale_rewards=batch"),
    "reinforce++ with a baseline": ("grpo.scale_rewards=batch_centred",),
    "gdpo": ("grpo.multi_objective_aggregation=normalize_then_sum",),
}


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS), help="some of the rows")
    parser.add_argument("--short", action="store_true", help="two steps each, to see that it works")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    path, here = arguments.json or results_file("losses", arguments.short), machine()
    for seed in arguments.seeds:
        for name in arguments.only:
            run_of(name, seed, arguments.short)
            rows = finished_rows(arguments.short)
            save(path, {"machine": here, "rows": rows}, table(rows))


def folder_of(name: str, seed: int, short: bool) -> Path:
    """Where a run is kept."""
    return SHORT_RESULTS / f"losses_{name.replace(', ', '_').replace(' ', '_')}_{seed}{'_short' if short else ''}"


def run_of(name: str, seed: int, short: bool) -> None:
    """One training run through its real command; a finished one returns at once."""
    overrides = [*COMMON, *RUNS[name], f"seed={seed}", f"model={sft_start(seed, short)}"]
    overrides += [f"trainer.eval_every={EVAL_EVERY}", f"output_dir={folder_of(name, seed, short)}"]
    overrides += ["data.eval.rows=8"] if short else []
    launch("sail_rl/train_grpo.py", "recipes/quickstart.yaml", SHORT_STEPS if short else STEPS, *overrides)


def finished_rows(short: bool) -> list[dict[str, Any]]:
    """A row of every run that is finished, whenever that was."""
    found = []
    for name in RUNS:
        for seed in range(10):
            folder = folder_of(name, seed, short)
            if (folder / "summary.json").is_file():
                found.append({"run": name, "seed": seed, **row_of(folder)})
    return found


def row_of(folder: Path) -> dict[str, Any]:
    """Accuracy at equal numbers of rollouts, by the last evaluation until then."""
    ended = json.loads((folder / "summary.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rollouts, points = 0, [(0, ended["accuracy_before"])]
    for record in records:
        rollouts += 8 * record["groups/total"]
        last = record["step"] == records[-1]["step"]
        accuracy = ended["accuracy_after"] if last else record.get("eval/accuracy")
        points += [(rollouts, accuracy)] if accuracy is not None else []
    return {
        "rollouts_to_reach": next((made for made, accuracy in points if accuracy >= REACHED), None),
        "accuracy": {str(most): [a for made, a in points if made <= most][-1] for most in POINTS},
        "clipped": mean(record["clip_fraction"] for record in records),
        "dropped": mean(record["groups/dropped"] / record["groups/total"] for record in records),
        "seconds": ended["seconds_this_stage"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, and the spread of the last accuracy."""
    lines = []
    for name in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == name]
        line: dict[str, Any] = {"run": name, "seeds": len(mine)}
        for most in POINTS:
            accuracies = [row["accuracy"][str(most)] for row in mine]
            spread = f" ± {stdev(accuracies):.3f}" if len(mine) > 1 else ""
            line[f"accuracy after {most} rollouts"] = f"{mean(accuracies):.3f}{spread}"
        reached = [row["rollouts_to_reach"] for row in mine]
        line[f"rollouts to {REACHED:.0%}"] = None if None in reached else round(mean(reached))
        line |= {key: mean(row[key] for row in mine) for key in ("clipped", "dropped", "seconds")}
        lines.append(line)
    names = {name: name for name in lines[0]} | {"dropped": "groups left out", "seconds": "training, s"}
    return f"Greedy accuracy on 300 unseen questions.\n\n{markdown(lines, names)}"


if __name__ == "__main__":
    main()
