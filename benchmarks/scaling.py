"""How the cost of one policy update grows with its shape, beside what the FLOPs say.

    python benchmarks/scaling.py [--short] [--json PATH]      (under eight minutes on two quiet cores)

Around one point, one axis at a time: tokens of the prompt, tokens of the longest completion, completions of a prompt,
tiles of the picture at the same number of tokens, and layers of the model. The model is that of update.py, the form
`shared`. All points are measured in turn, round after round; the table has each point's median by that of the middle.
Last the axis of processes: one or two of them, with one thread each, share four groups; their growth is that of time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import Timing, interleave, machine, markdown, medians, prepare_process, results_file, save

MIDDLE = {"prompt": 512, "completion": 128, "size": 8, "tiles": 6, "depth": 1}
AXES = {
    "prompt": (256, 512, 1024),
    "completion": (32, 128, 512),
    "size": (2, 4, 8, 16),
    "tiles": (2, 4, 6),
    "depth": (1, 2, 4),
}
ROUNDS, SHORT_ROUNDS = 5, 1
PROCESSES = (1, 2)
FORM = "shared"
PASSES = 3  # the backward pass costs twice the forward
COLUMNS = {
    "axis": "axis",
    "value": "value",
    "seconds": "seconds",
    "cpu_seconds": "CPU seconds",
    "gflop": "GFLOP",
    "growth": "times the middle",
    "theory": "FLOP theory",
}


def main() -> None:
    """Measure all points and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prepare_process()
    result: dict[str, Any] = {"machine": machine()}
    started = time.perf_counter()
    rounds = SHORT_ROUNDS if arguments.short else ROUNDS
    result["rows"] = measure(rounds) + measure_processes(rounds)
    result["minutes"] = (time.perf_counter() - started) / 60
    save(arguments.json or results_file("scaling", arguments.short), result, report(result))


def points() -> dict[tuple[str, int], dict[str, int]]:
    """The shape at every value of every axis. A longer prompt has as many tiles as it has room for."""
    shapes = {(axis, value): MIDDLE | {axis: value} for axis, values in AXES.items() for value in values}
    return {
        (axis, value): {name: size for name, size in shape.items() if (axis, name) != ("prompt", "tiles")}
        for (axis, value), shape in shapes.items()
    }


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each point."""
    from benchmarks.contestants import make_contestant
    from benchmarks.scaled_model import Cell, make_world

    worlds = {point: make_world(Cell(**shape)) for point, shape in points().items()}
    steps = {str(point): make_contestant(FORM, world).step for point, world in worlds.items()}
    print(f"{len(steps)} points, {rounds} rounds after one for warming up", flush=True)
    interleave(steps, 1)
    timings = interleave(steps, rounds)
    flops = {point: PASSES * forward_flops(world) / 1e9 for point, world in worlds.items()}
    return [row(point, timings, flops) for point in worlds]


def measure_processes(rounds: int) -> list[dict[str, Any]]:
    """A row for each number of processes; in theory they have the work of one, each a part of it."""
    seconds: dict[int, list[float]] = {count: [] for count in PROCESSES}
    for _ in range(min(rounds, 2)):  # in turn
        for count in PROCESSES:
            seconds[count] += seconds_of_processes(count, rounds)
    middles = {count: median(runs) for count, runs in seconds.items()}
    return [
        {"axis": "processes", "value": count, "seconds": middles[count], "cpu_seconds": None, "gflop": None}
        | {"growth": middles[count] / middles[PROCESSES[0]], "theory": PROCESSES[0] / count}
        for count in PROCESSES
    ]


def seconds_of_processes(count: int, rounds: int) -> list[float]:
    """Of one update by so many processes, round by round."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seconds.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        script = Path(__file__).with_name("processes.py")
        subprocess.run([*launcher, str(script), str(file), str(rounds)], check=True)
        return json.loads(file.read_text())


def forward_flops(world) -> float:
    """Of the update's forward pass, in theory."""
    from benchmarks.flops import costs_of, work_of

    work = work_of(FORM, world.cell.prompt, world.lengths, world.tiles)
    return work.flops(costs_of(world.model.config))


def row(point: tuple[str, int], timings: Mapping[str, list[Timing]], flops: Mapping) -> dict[str, Any]:
    """A point's figures, and how they grow from the middle of its axis."""
    axis, value = point
    middle = (axis, MIDDLE[axis])
    wall, cpu = medians(timings, "wall"), medians(timings, "cpu")
    return {
        "axis": axis,
        "value": value,
        "seconds": wall[str(point)],
        "cpu_seconds": cpu[str(point)],
        "gflop": flops[point],
        "growth": cpu[str(point)] / cpu[str(middle)],
        "theory": flops[point] / flops[middle],
    }


def report(result: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    text = f"One policy update, `update.mode: {FORM}`. The middle is {MIDDLE}; growth is that of CPU time."
    took = f"Machine: {result['machine']}\n\nAll of it took {result['minutes']:.1f} minutes."
    return f"{text}\n\n{markdown(result['rows'], COLUMNS)}\n{took}\n"


if __name__ == "__main__":
    main()
