"""The tiny pipeline on several seeds: what each stage gives to both answer modes.

    .venv/bin/python benchmarks/pipeline.py [--seeds 0 1 2]      (about 20 minutes a seed, on one core as well)

Runs `sail-rl pipeline recipes/pipeline_tiny.yaml` for each seed; finished stages are skipped, so it can be stopped and
run again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import SHORT_RESULTS, machine, markdown, results_file, save

RECIPE = "recipes/pipeline_tiny.yaml"
MODES = ("thinking", "direct")
COLUMNS = {
    "stage": "after",
    "thinking": "right when thinking, %",
    "thinking_tokens": "tokens",
    "direct": "right at once, %",
    "direct_tokens": "tokens",
}


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        rows += run_seed(seed)
        result = {"machine": machine(), "rows": rows, "means": means(rows)}
        save(arguments.json or results_file("pipeline", short=False), result, report(rows))


def run_seed(seed: int) -> list[dict[str, Any]]:
    """A row for each stage."""
    folder = SHORT_RESULTS / f"pipeline_seed{seed}"
    changes = (f"seed={seed}", f"output_dir={folder}")
    subprocess.run([sys.executable, "-m", "sail_rl.cli", "pipeline", RECIPE, *changes], check=True)
    stages = json.loads((folder / "stages.json").read_text())["stages"]
    return [{"seed": seed, "stage": one["stage"], "minutes": one["minutes"]} | figures(one) for one in stages]


def figures(stage: dict[str, Any]) -> dict[str, Any]:
    """Of both modes; none where the stage's model was not asked."""
    asked = {mode: stage[mode] for mode in MODES if mode in stage}
    right = {mode: 100 * found["pass@1"]["mean"] for mode, found in asked.items()}
    return right | {f"{mode}_tokens": found["length"]["mean"] for mode, found in asked.items()}


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of stages whose models were asked, over the seeds."""
    names = dict.fromkeys(row["stage"] for row in rows if "thinking" in row)
    keys = [key for key in COLUMNS if key != "stage"]
    return [
        {"stage": name} | {key: fmean(row[key] for row in rows if row["stage"] == name) for key in keys}
        for name in names
    ]


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The tables as Markdown."""
    seeds = dict.fromkeys(row["seed"] for row in rows)
    minutes = {seed: sum(row["minutes"] for row in rows if row["seed"] == seed) for seed in seeds}
    asked = [row for row in rows if "thinking" in row]
    times = ", ".join(f"seed {seed} {taken:.0f}" for seed, taken in minutes.items())
    text = f"`sail-rl pipeline {RECIPE}`, means of {len(seeds)} seeds. Minutes of the stages' commands: {times}."
    return f"{text}\n\n{markdown(means(rows), COLUMNS)}\nEach seed.\n\n{markdown(asked, {'seed': 'seed'} | COLUMNS)}"


if __name__ == "__main__":
    main()
