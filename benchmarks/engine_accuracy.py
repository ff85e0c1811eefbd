"""Does the quickstart learn the same whoever writes its completions? Every engine from the same start, three seeds.

    python benchmarks/engine_accuracy.py [--short] [--engines NAME ...] [--seeds N ...] [--json PATH]

Greedy accuracy on 1,000 unseen questions before and after training; and, over all steps of a run, how far the engine's
and the trainer's log-probabilities of a token were ever apart. Half an hour on 2 cores; finished runs are kept in
runs/benchmarks, so it can be stopped and run again.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import SHORT_RESULTS, machine, markdown, results_file, save
from benchmarks.quickstart_runs import launch, sft_start

STEPS, SHORT_STEPS = 60, 3
QUESTIONS, SHORT_QUESTIONS = 1000, 40
ENGINES = {
    "hf": ("rollout.engine=hf",),
    "vllm_colocate": ("rollout.engine=vllm_colocate",),
    "vllm_server": ("rollout.engine=vllm_server",),
    "vllm_server, overlap 1": ("rollout.engine=vllm_server", "rollout.overlap=1"),
}
COLUMNS = {
    "engine": "engine",
    "seed": "seed",
    "before": "accuracy before",
    "after": "accuracy after",
    "error": "standard error",
    "largest_gap": "largest gap",
}


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="three steps, few questions")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [row_of(engine, seed, arguments.short) for seed in arguments.seeds for engine in arguments.engines]
    result = {"machine": machine(), "rows": rows}
    save(arguments.json or results_file("engine_accuracy", arguments.short), result, report(rows))


def row_of(engine: str, seed: int, short: bool) -> dict[str, Any]:
    """One run of the quickstart's GRPO."""
    steps, questions = (SHORT_STEPS, SHORT_QUESTIONS) if short else (STEPS, QUESTIONS)
    folder = SHORT_RESULTS / f"engine_{engine.replace(', ', '_').replace(' ', '')}_{steps}_seed{seed}"
    changes = (f"data.eval.rows={questions}", "trainer.eval_every=null", f"model={sft_start(seed, short)}")
    changes += (f"seed={seed}", f"output_dir={folder}", *ENGINES[engine])
    launch("sail_rl/train_grpo.py", "recipes/quickstart.yaml", steps, *changes)
    summary = json.loads((folder / "summary.json").read_text())
    after = summary["accuracy_after"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    gaps = [record["parity/max"] for record in records if record.get("parity/max") is not None]
    return {
        "engine": engine,
        "seed": seed,
        "before": summary["accuracy_before"],
        "after": after,
        "error": (after * (1 - after) / questions) ** 0.5,
        "largest_gap": f"{max(gaps):.1e}" if gaps else "",
    }


def report(rows: list[dict[str, Any]]) -> str:
    """The table, and means over the seeds."""
    engines = dict.fromkeys(row["engine"] for row in rows)
    means = {engine: mean(row["after"] for row in rows if row["engine"] == engine) for engine in engines}
    told = "; ".join(f"{engine} {value:.3f}" for engine, value in means.items())
    return f"{markdown(rows, COLUMNS)}\nMean accuracy after training: {told}.\n"


if __name__ == "__main__":
    main()
