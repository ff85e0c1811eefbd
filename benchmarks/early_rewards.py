"""Wall time of rollouts and a slow reward: scored after all completions are written, and group by group meanwhile.

    python benchmarks/early_rewards.py [--steps N] [--seconds S] [--engine ENGINE]

The reward sleeps for S seconds a completion. It is the same function in both runs: `in_process` it is called once a
step, after the last completion; in a process of its own on the groups that are whole. Completions end at a letter, so
that their lengths differ widely, and the engine writes one group at a time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import machine, markdown, results_file, save

REWARD = """
import time


def slow(completions, seconds, **columns):
    time.sleep(seconds * len(completions))
    return [float(len(text) % 7) for text in completions]
"""
COLUMNS = {
    "scored": "scored",
    "rollout": "waited for completions, s",
    "reward": "waited for rewards, s",
    "both": "both, s",
    "scoring": "scoring took, s",
    "length": "mean length",
    "longest": "longest",
}
FIGURES = {
    "rollout": "seconds/rollout",
    "reward": "seconds/reward",
    "scoring": "scoring/seconds",
    "length": "completion/length",
    "longest": "completion/longest",
}
UNCOUNTED = 1  # first steps


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--engine", default="vllm_colocate")
    parser.add_argument("--output", type=Path, default=results_file("early_rewards", short=False))
    arguments = parser.parse_args()
    found = machine()
    rows = [measure(arguments, in_process) for in_process in (True, False)]
    title = f"# A reward of {arguments.seconds:g} s a completion, `{arguments.engine}`, 4 groups of 4"
    text = f"{title}\n\nMedians of {arguments.steps - UNCOUNTED} steps.\n\n{markdown(rows, COLUMNS)}"
    save(arguments.output, {"machine": found, "rows": rows}, text)


def measure(arguments: argparse.Namespace, in_process: bool) -> dict[str, Any]:
    """Medians over a run's steps."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mine.py"
        file.write_text(REWARD)
        reward = f"{{function: '{file}:slow', seconds: {arguments.seconds}, in_process: {str(in_process).lower()}}}"
        changes = [f"rewards=[{reward}]", f"rollout.engine={arguments.engine}", f"trainer.max_steps={arguments.steps}"]
        changes += ["model={random_init: tiny}", f"output_dir={folder}/run", "data.eval=null"]
        changes += ["trainer.eval_every=null"]
        changes += ["rollout.prompts_per_step=4", "rollout.num_generations=4", "rollout.batch_size=4"]
        changes += ["rollout.max_completion_length=400", "rollout.stop=[q]"]
        command = [sys.executable, "sail_rl/train_grpo.py", "recipes/quickstart.yaml", *changes]
        subprocess.run(command, check=True)
        lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines][UNCOUNTED:]
    figures = {name: median(record[key] for record in records) for name, key in FIGURES.items()}
    both = median(record["seconds/rollout"] + record["seconds/reward"] for record in records)
    return {"scored": "after all" if in_process else "group by group"} | figures | {"both": both}


if __name__ == "__main__":
    main()
