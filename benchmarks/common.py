"""What the benchmarks share: where they run, fair timing, and how results are kept."""

import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

# A benchmark is started by its path, which puts this folder first: its rewards.py would hide the package `rewards`.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

THREADS = 2
RESULTS = Path("benchmarks/results")
SHORT_RESULTS = Path("runs/benchmarks")  # of short forms: not measurements to keep
PACKAGES = ("torch", "transformers", "trl", "accelerate")


@dataclass(frozen=True)
class Timing:
    """One run of one variant."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds of all threads together: less disturbed than `wall` by other programs."""


def prepare_process() -> None:
    """The same threads for everybody; call it before torch is imported."""
    from sail_rl.heap import ask_for_large_pages, keep_freed_memory
    from sail_rl.threads import wait_briefly

    # As a run does, which begins again for the pages: here they are those of the sides' own processes.
    wait_briefly()
    keep_freed_memory()
    ask_for_large_pages()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import torch

    torch.set_num_threads(THREADS)


def interleave(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Timing]]:
    """Each variant once per round, so that a slow minute of the machine hits all of them alike."""
    timings: dict[str, list[Timing]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            timings[name].append(timed(step))
    return timings


def timed(step: Callable[[], object]) -> Timing:
    """How long one call takes."""
    gc.collect()
    return clocked(step)


def clocked(step: Callable[[], object]) -> Timing:
    """The same, when somebody else has cleared the garbage."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def medians(timings: Mapping[str, Sequence[Timing]], clock: str) -> dict[str, float]:
    """Median seconds of every variant on one of the clocks, `wall` or `cpu`."""
    return {name: median(getattr(timing, clock) for timing in runs) for name, runs in timings.items()}


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "processor": next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown"
        ),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def device_name() -> str:
    """Of the GPU, or `cpu`."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A table of some of the rows' values: key -> heading."""
    lines = [list(columns.values()), ["---"] * len(columns), *([shown(row[key]) for key in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def shown(value: Any) -> str:
    """A value in a table's cell."""
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def results_file(name: str, short: bool) -> Path:
    """Where results go unless the command line says otherwise."""
    return (SHORT_RESULTS if short else RESULTS) / f"{name}.json"


def save(path: Path, result: Mapping[str, Any], text: str) -> None:
    """The result as JSON, and its tables as Markdown beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    path.with_suffix(".md").write_text(text)
    print(f"\n{text}\nwritten: {path} and {path.with_suffix('.md')}")
