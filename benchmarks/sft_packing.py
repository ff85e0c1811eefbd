"""Packed SFT against TRL 1.16's SFTTrainer, which refuses to pack pictures, on the same ragged samples and weights.

    python benchmarks/sft_packing.py [--short] [--json PATH]      (about five minutes on two quiet cores)

A scaled-down SAIL-VL2-2B in float32; samples of text alone up to twelve tiles, short and long answers. Timed are
forward, loss on the answers' tokens, backward, clip and optimizer step; processing pictures is not. All variants first
show that they get the same loss, entropy and gradient, and are then timed in turn. TRL pads a batch of eight (its
default) in the order of the data; for comparison a batch sorted by length; and single samples, which need no padding
but leave most of a GPU idle. The second table plans, for several processes, who trains which samples: the work of the
most loaded one by the mean, before and after samples change hands.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import interleave, machine, markdown, medians, prepare_process, results_file, save

SAMPLES, SHORT_SAMPLES = 24, 8  # of a step
ROUNDS, SHORT_ROUNDS = 3, 1
TRL_BATCH = 8
BASE, OURS = f"TRL, padded, {TRL_BATCH} a batch", "ours, packed"
PROCESSES, SAMPLES_EACH, STEPS = (2, 4, 8), 32, 20
COLUMNS = {
    "variant": "variant",
    "seconds": "seconds of a step",
    "samples_per_second": "samples a second",
    "times_faster": "times faster than TRL",
    "times_faster_cpu": "in CPU time",
    "padding": "padding, share of tokens",
}
SPREAD_COLUMNS = {
    "processes": "processes",
    "tiles_before": "tiles, most by mean",
    "tiles_after": "balanced",
    "tokens_before": "tokens, most by mean",
    "tokens_after": "balanced",
}


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few samples, one round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prepare_process()
    started = time.perf_counter()
    here = machine()
    samples, rounds = (SHORT_SAMPLES, SHORT_ROUNDS) if arguments.short else (SAMPLES, ROUNDS)
    result = {"machine": here} | measure(samples, rounds) | {"spread": [spread(count) for count in PROCESSES]}
    result["minutes"] = (time.perf_counter() - started) / 60
    save(arguments.json or results_file("sft_packing", arguments.short), result, report(result))


def measure(samples: int, rounds: int) -> dict[str, Any]:
    """A row for each variant, and everybody's settings."""
    from benchmarks.sft_sides import draw_shapes, make_sft_world, our_side, relative_difference, trl_side

    world = make_sft_world(draw_shapes(samples, seed=0))
    contestants = {
        BASE: trl_side(world, TRL_BATCH),
        f"TRL, padded, {TRL_BATCH} a batch, sorted by length": trl_side(world, TRL_BATCH, by_length=True),
        "TRL, single samples": trl_side(world, 1),
        "ours, padded": our_side(world, "padded"),
        OURS: our_side(world, "packed"),
    }
    print(f"{samples} samples; {', '.join(contestants)}; {rounds} rounds after one for warming up", flush=True)
    outcomes = {name: contestant.step() for name, contestant in contestants.items()}
    base = (contestants[BASE], outcomes[BASE])
    differences = {name: relative_difference(one, outcomes[name], *base) for name, one in contestants.items()}
    print(f"equal work, largest relative difference to TRL: {differences}", flush=True)
    timings = interleave({name: contestant.step for name, contestant in contestants.items()}, rounds)
    seconds, cpu = medians(timings, "wall"), medians(timings, "cpu")
    rows = [
        {
            "variant": name,
            "seconds": seconds[name],
            "samples_per_second": samples / seconds[name],
            "times_faster": seconds[BASE] / seconds[name],
            "times_faster_cpu": cpu[BASE] / cpu[name],
            "padding": contestant.settings["padding"],
            "difference": differences[name],
            "settings": contestant.settings,
        }
        for name, contestant in contestants.items()
    ]
    return {"samples": samples, "rounds": rounds, "rows": rows}


def spread(processes: int) -> dict[str, Any]:
    """Work of the most loaded process by the mean, over steps of as many samples for each, before and after."""
    from benchmarks.sft_sides import draw_shapes
    from sail_rl.balance import plan_moves

    before, after = [], []
    for step in range(STEPS):
        shapes = draw_shapes(processes * SAMPLES_EACH, seed=step)
        costs = [work_of_shapes(shapes[n::processes]) for n in range(processes)]
        loads_PA = np.array([np.sum(own, axis=0) for own in costs])
        before.append(loads_PA.max(0) / loads_PA.mean(0))
        for move in plan_moves(costs):
            loads_PA[move.source] -= costs[move.source][move.number]
            loads_PA[move.target] += costs[move.source][move.number]
        after.append(loads_PA.max(0) / loads_PA.mean(0))
    means = {"before": np.mean(before, axis=0), "after": np.mean(after, axis=0)}
    return {"processes": processes, "samples_each": SAMPLES_EACH, "steps": STEPS} | {
        f"{amount}_{moment}": float(values[place])
        for moment, values in means.items()
        for place, amount in enumerate(("tokens", "tiles"))
    }


def work_of_shapes(shapes: Sequence) -> list[tuple[int, int]]:
    """Tokens and tiles of samples; a picture's thumbnail is one more tile."""
    from benchmarks.scaled_model import TOKENS_PER_TILE

    tiles = [shape.tiles + 1 if shape.tiles else 0 for shape in shapes]
    return [
        (TOKENS_PER_TILE * count + shape.question + shape.target, count)
        for shape, count in zip(shapes, tiles, strict=True)
    ]


def report(result: dict[str, Any]) -> str:
    """The tables as Markdown."""
    parts = [
        f"One step of {result['samples']} samples, medians of {result['rounds']}.",
        markdown(result["rows"], COLUMNS),
    ]
    parts += [f"Work of the most loaded process by the mean, {STEPS} steps of {SAMPLES_EACH} samples for each process."]
    parts += [markdown(result["spread"], SPREAD_COLUMNS), "Settings."]
    parts += ["\n".join(f"- {row['variant']}: {row['settings']}" for row in result["rows"])]
    parts += [f"Machine: {result['machine']}", f"All of it took {result['minutes']:.1f} minutes."]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    main()
