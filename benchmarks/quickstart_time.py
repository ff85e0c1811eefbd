"""How long the quickstart trains: this code against an earlier commit of it, in turn.

    python benchmarks/quickstart_time.py COMMIT [--short] [--json PATH]

Both of the quickstart's commands, three times with each code and this environment. Training is the seconds of the
steps, from metrics.jsonl; a command also imports, loads, evaluates, saves and writes its report.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import machine, markdown, results_file, save

ROUNDS, SHORT_ROUNDS = 3, 1
SHORT_STEPS = 2
STAGES = {
    "sft": ("sail_rl/train_sft.py", "recipes/quickstart_sft.yaml"),
    "grpo": ("sail_rl/train_grpo.py", "recipes/quickstart.yaml"),
}


def main() -> None:
    """Rounds, each code once in each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the earlier code")
    parser.add_argument("--short", action="store_true", help=f"one round of {SHORT_STEPS} steps")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "before": arguments.commit, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder, "before")
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", before, arguments.commit], check=True)
        try:
            for turn in range(SHORT_ROUNDS if arguments.short else ROUNDS):
                for side, code in (("before", before), ("now", Path.cwd())):
                    row = {"code": side, **quickstart(code, Path(folder, f"{side}{turn}"), arguments.short)}
                    print(row, flush=True)
                    result["rows"].append(row)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], check=True)
    save(arguments.json or results_file("quickstart_time", arguments.short), result, table(result))


def quickstart(code: Path, folder: Path, short: bool) -> dict[str, float]:
    """Seconds of training and of the whole command, by stage."""
    figures: dict[str, float] = {}
    limits = [f"trainer.max_steps={SHORT_STEPS}"] if short else []
    for stage, (script, recipe) in STAGES.items():
        model = [f"model={folder / 'sft' / 'final'}"] if stage == "grpo" else []
        command = [sys.executable, script, recipe, f"output_dir={folder / stage}", *model, *limits]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(code)}
        started = time.perf_counter()
        subprocess.run(command, cwd=code, env=environment, check=True, stdout=subprocess.DEVNULL)
        figures[f"{stage} command"] = time.perf_counter() - started
        figures[f"{stage} training"] = seconds_of_steps(folder / stage / "metrics.jsonl")
    return figures


def seconds_of_steps(metrics: Path) -> float:
    """All phases of all steps."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return sum(value for record in records for name, value in record.items() if name.startswith("seconds/"))


def table(result: dict[str, Any]) -> str:
    """Every run, and medians."""
    rows = result["rows"]
    columns = list(rows[0])
    for side in ("before", "now"):
        mine = [row for row in rows if row["code"] == side]
        medians = {name: median(row[name] for row in mine) for name in columns[1:]}
        rows = [*rows, {"code": f"{side}, median", **medians}]
    ratios = {name: rows[-2][name] / rows[-1][name] for name in columns[1:]}
    title = f"Seconds of the quickstart; before: {result['before']}."
    return f"{title}\n\n{markdown([*rows, {'code': 'before / now', **ratios}], {name: name for name in columns})}"


if __name__ == "__main__":
    main()
