"""One policy update: ours in every mode against TRL 1.16's GRPOTrainer, on the same weights and rollouts.

    python benchmarks/update.py [--short] [--groups N] [--json PATH]      (a quarter of an hour on two quiet cores)

A scaled-down SAIL-VL2-2B in float32, eight completions per prompt. Timed are the log-probabilities, loss, backward,
clip and optimizer step; everything before, such as processing pictures, is not. Every cell first checks that all
variants get the same loss, entropy and gradient, and then times them in turn, each in a process of its own (turns.py).
Writes JSON and Markdown: `ratio_vs_trl` is TRL's seconds by ours (more is better), `memory_ratio` is our peak memory by
TRL's (less is better).
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import Timing, clocked, machine, markdown, medians, prepare_process, results_file, save
from benchmarks.turns import take_turns

CELLS = ((512, 64), (1024, 128), (1024, 512), (256, 256))  # prompt, longest completion
SHORT_CELLS = CELLS[:1]
ROUNDS, SHORT_ROUNDS = 5, 1
OURS = "shared"  # what `update.mode: auto` takes for this model
COLUMNS = {
    "prompt": "prompt",
    "completion": "completion up to",
    "ratio_vs_trl": "times faster than TRL",
    "theory_vs_trl": "FLOP theory",
    "cpu_ratio_vs_trl": "in CPU time",
    "ratio_vs_packed": "times faster than packed",
    "theory_vs_packed": "FLOP theory",
    "cpu_ratio_vs_packed": "in CPU time",
    "memory_ratio": "peak memory by TRL's",
}


def main() -> None:
    """Measure the cells and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one cell, one round")
    parser.add_argument("--groups", type=int, default=1, help="groups per optimizer step")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prepare_process()
    from benchmarks.scaled_model import Cell

    result: dict[str, Any] = {"machine": machine(), "model": describe_model(), "rows": []}
    started = time.perf_counter()
    for prompt, completion in SHORT_CELLS if arguments.short else CELLS:
        cell = Cell(prompt, completion, arguments.groups)
        row, settings = measure(cell, SHORT_ROUNDS if arguments.short else ROUNDS)
        result["settings"] = settings
        result["rows"].append(row | memory_figures(cell))
        result["minutes"] = (time.perf_counter() - started) / 60
        # After every cell: what has been measured is kept when it is stopped.
        save(arguments.json or results_file("update", arguments.short), result, report(result))


def describe_model() -> dict[str, Any]:
    """Sizes, and how the tower's share compares with the 2B's."""
    from benchmarks.flops import tower_share
    from benchmarks.scaled_model import TEXT, VISION, scaled_config, scaled_processor
    from sail_rl.model.sizes import sail_vl2_config

    shares = {"here": tower_share(scaled_config(scaled_processor())), "2b": tower_share(sail_vl2_config("2b"))}
    print(f"FLOPs of the tower by those of the language model, per picture token: {shares}", flush=True)
    return {"vision": VISION, "text": TEXT, "dtype": "float32", "tower_share": shares}


def measure(cell, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the row of one cell, everybody's settings)."""
    from benchmarks.contestants import VARIANTS, check_equal_work, make_contestant
    from benchmarks.scaled_model import make_world

    print(f"{cell}: {', '.join(VARIANTS)}, {rounds} rounds after one update for warming up", flush=True)
    world = make_world(cell)
    contestants = {name: make_contestant(name, world) for name in VARIANTS}
    outcomes = {name: contestant.step() for name, contestant in contestants.items()}
    differences = check_equal_work(contestants, outcomes)
    print(f"equal work, largest relative difference to TRL: {differences}", flush=True)
    settings = {name: contestant.settings for name, contestant in contestants.items()}
    contestants.clear()  # their memory is not to stand beside those that are timed
    turns = take_turns({name: (timed_step, name, cell) for name in VARIANTS}, rounds)
    timings = {name: [Timing(**turn) for turn in own] for name, own in turns.items()}
    row = {"prompt": cell.prompt, "completion": cell.completion, "groups": cell.groups, "rounds": rounds}
    row |= ratios(medians(timings, "wall"), "ratio") | ratios(medians(timings, "cpu"), "cpu_ratio") | theory(world)
    row |= {"seconds": medians(timings, "wall"), "cpu_seconds": medians(timings, "cpu"), "difference": differences}
    return row, settings


def timed_step(variant: str, cell) -> Callable[[], dict[str, float]]:
    """A contestant's update, which returns its seconds by both clocks."""
    from benchmarks.contestants import make_contestant
    from benchmarks.scaled_model import make_world

    contestant = make_contestant(variant, make_world(cell))
    return lambda: asdict(clocked(contestant.step))


def ratios(seconds: dict[str, float], name: str) -> dict[str, float | None]:
    """How many times faster than TRL, and than our own packed update where there is one."""
    packed = seconds.get("packed")
    return {f"{name}_vs_trl": seconds["trl"] / seconds[OURS], f"{name}_vs_packed": packed and packed / seconds[OURS]}


def theory(world) -> dict[str, float]:
    """The same ratios as FLOPs have them, when the prompt and its pictures are computed once per group."""
    from benchmarks.flops import costs_of, work_of

    costs, shape = costs_of(world.model.config), (world.cell.prompt, world.lengths[: world.cell.size], world.tiles)
    flops = {layout: work_of(layout, *shape).flops(costs) for layout in ("trl", "packed", "shared")}
    return {f"theory_vs_{other}": flops[other] / flops["shared"] for other in ("trl", "packed")}


def memory_figures(cell) -> dict[str, Any]:
    """Peak memory of a step with one group, in MB, and ours by TRL's."""
    from benchmarks.memory import peak_in_own_process

    peaks = {name: peak_in_own_process(name, cell.prompt, cell.completion) for name in ("trl", OURS)}
    return {"memory_mb": peaks, "memory_ratio": peaks[OURS] / peaks["trl"]}


def report(result: dict[str, Any]) -> str:
    """The tables as Markdown."""
    rows, variants = result["rows"], list(result["rows"][0]["seconds"])
    cells = [{"prompt": row["prompt"], "completion": row["completion"], **row["seconds"]} for row in rows]
    seconds = markdown(cells, {name: name for name in ("prompt", "completion", *variants)})
    settings = "\n".join(f"- {name}: {values}" for name, values in result["settings"].items())
    parts = [f"`update.mode: {OURS}` against TRL and against `packed`.", markdown(rows, COLUMNS)]
    parts += ["Median seconds of one update.", seconds, "Settings.", settings, f"Machine: {result['machine']}"]
    parts += [f"All of it took {result['minutes']:.1f} minutes."]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    main()
