"""Peak memory of one policy update: ours in every mode, and TRL's GRPOTrainer, on the same model and batch.

    python benchmarks/memory.py [--short] [--json PATH]

Every variant runs in a process of its own. The figure is how far one step lifts the process's memory above what it
holds before (weights, optimizer, gradients, the batch), after a first step has filled all caches.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.common import machine, markdown, prepare_process, results_file, save
from benchmarks.update import CELLS, SHORT_CELLS

MEGABYTE = 2**20


def main() -> None:
    """All cells and variants, or with `--one` a single one for the parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one cell")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("VARIANT", "PROMPT", "COMPLETION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prepare_process()
    if arguments.one:
        variant, prompt, completion = arguments.one
        print(json.dumps({"peak": measure(variant, int(prompt), int(completion))}))
        return
    from benchmarks.contestants import VARIANTS

    result = {"machine": machine(), "unit": "MB above what the process holds before the step", "rows": []}
    for prompt, completion in SHORT_CELLS if arguments.short else CELLS:
        peaks = {variant: peak_in_own_process(variant, prompt, completion) for variant in VARIANTS}
        ratios = {f"{variant}_by_trl": peaks[variant] / peaks["trl"] for variant in VARIANTS if variant != "trl"}
        result["rows"].append({"prompt": prompt, "completion": completion, **peaks, **ratios})
    columns = {name: name.replace("_", " ") for name in result["rows"][0]}
    text = f"Peak memory of one update, in MB, and ratios to TRL's.\n\n{markdown(result['rows'], columns)}"
    save(arguments.json or results_file("memory", arguments.short), result, text)


def peak_in_own_process(variant: str, prompt: int, completion: int) -> float:
    """Megabytes that one step needs."""
    print(f"memory of {variant} at ({prompt}, {completion})", flush=True)
    command = [sys.executable, __file__, "--one", variant, str(prompt), str(completion)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(answer.splitlines()[-1])["peak"] / MEGABYTE


def measure(variant: str, prompt: int, completion: int) -> int:
    """Bytes between what this process holds before a step and its highest point during the step."""
    from benchmarks.contestants import make_contestant
    from benchmarks.scaled_model import Cell, make_world

    step = make_contestant(variant, make_world(Cell(prompt, completion))).step
    step()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the first step has freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # the highest point is from now on
    before = status_bytes("VmRSS")
    step()
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    """One of Linux's figures of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


if __name__ == "__main__":
    main()
