"""Wall time of a step with rollout.overlap 0 and 1, before a server as fast as it is and one that answers late.

python benchmarks/overlap.py MODEL [--steps N] [--late SECONDS] [--updates N]
    MODEL: such as runs/quickstart-sft/final

One `sail-rl serve-rollouts` for all runs, each process with the same threads; a proxy in front of it adds the latency.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.common import THREADS, machine, markdown, results_file, save

COLUMNS = {
    "late": "answers late by, s",
    "updates": "updates a batch",
    "overlap": "overlap",
    "step": "step, s",
    "rollout": "waited for completions, s",
    "update": "update and rewards, s",
    "longer": "the longer phase, s",
    "ratio": "step / longer phase",
    "accuracy": "greedy accuracy after",
}
PHASES = ("data", "rollout", "reward", "update")
UNCOUNTED = 2  # first steps: warm-up, and nothing is written ahead of the first


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--late", type=float, default=2.0)
    parser.add_argument("--updates", type=int, default=5, help="a batch, in the last pair of runs: a longer update")
    parser.add_argument("--output", type=Path, default=results_file("overlap", short=False))
    arguments = parser.parse_args()
    found = machine() | {"threads of each of two processes": THREADS}
    server, front = free_port(), free_port()
    pairs = []
    with running("-m", "sail_rl.cli", "serve-rollouts", "--port", server):
        for late, updates in ((0.0, 1), (arguments.late, 1), (arguments.late, arguments.updates)):
            with running("tests/rollout_proxy.py", f"http://127.0.0.1:{server}", front, late):
                pairs.append([measure(arguments, front, late, updates, overlap) for overlap in (0, 1)])
    found["load_after"] = os.getloadavg()[0]
    rows = [row | against(apart, row) for apart, together in pairs for row in (apart, together)]
    save(
        arguments.output, {"machine": found, "steps": arguments.steps, "rows": rows}, told(rows, found, arguments.steps)
    )


def against(apart: dict, row: dict) -> dict:
    """What a step is compared with: the longer phase of the run without overlap."""
    longer = max(apart["rollout"], apart["update"])
    return {"longer": longer, "ratio": row["step"] / longer}


def told(rows: list[dict], found: dict, steps: int) -> str:
    """The table, and under what conditions it was made."""
    return (
        f"# Overlap of writing and training, {steps} steps of the quickstart\n\n{markdown(rows, COLUMNS)}\n"
        f"Medians without the first {UNCOUNTED} steps. Trainer and server have {found['threads']} threads each on "
        f"{found['cores']} cores: without latency both phases\nwant the same cores. The machine's load was "
        f"{found['load_before']:.1f} before the runs and {found['load_after']:.1f} after them, their own included.\n"
    )


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def running(*arguments: object) -> Iterator[None]:
    """A program beside this one, ended at last."""
    program = start(*arguments)
    try:
        yield
    finally:
        program.terminate()
        program.wait()


def start(*arguments: object) -> subprocess.Popen:
    """A program beside this one."""
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment)


def measure(arguments: argparse.Namespace, port: int, late: float, updates: int, overlap: int) -> dict:
    """Medians over a run's steps."""
    with tempfile.TemporaryDirectory() as folder:
        changes = [f"model={arguments.model}", f"output_dir={folder}", "trainer.eval_every=null"]
        changes += ["rollout.engine=vllm_server", f"rollout.overlap={overlap}", f"trainer.max_steps={arguments.steps}"]
        changes += [f"grpo.num_iterations={updates}", f"optim.learning_rate={2e-4 / updates}"]
        changes += [f"rollout.server.urls=[http://127.0.0.1:{port}]", "data.eval.rows=200"]
        assert start("sail_rl/train_grpo.py", "recipes/quickstart.yaml", *changes).wait() == 0
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        accuracy = json.loads((Path(folder) / "summary.json").read_text())["accuracy_after"]
    seconds = {name: [record[f"seconds/{name}"] for record in records[UNCOUNTED:]] for name in PHASES}
    return {
        "late": late,
        "updates": updates,
        "overlap": overlap,
        "step": median(map(sum, zip(*seconds.values(), strict=True))),
        "rollout": median(seconds["rollout"]),
        "update": median(map(sum, zip(seconds["update"], seconds["reward"], seconds["data"], strict=True))),
        "accuracy": accuracy,
    }


if __name__ == "__main__":
    main()
