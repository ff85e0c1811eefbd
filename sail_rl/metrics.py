"""What a run says while it runs: metrics.jsonl, the trackers that the recipe names, a progress line with an ETA."""

import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.profiler import record_function

from sail_rl.launch import Run
from sail_rl.run_folder import replace_text
from sail_rl.watchdog import mark

PLAIN_LINE_EVERY = 10  # steps, where the output is not a terminal


class Stopwatch:
    """Seconds per phase of a step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str):
        """Add the time of a `with` block to a phase, and name it in a profiler's trace."""
        start = time.perf_counter()
        mark(f"the phase {name!r} began")
        with record_function(name):
            yield
        mark(f"the phase {name!r} ended")
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The phases since the last call, as metrics."""
        taken, self.seconds = self.seconds, {}
        return {f"seconds/{name}": seconds for name, seconds in taken.items()}


class MetricsLog:
    """Writes one record per step; does nothing on processes other than the first."""

    def __init__(self, run: Run, shown: list[str], first_step: int):
        self.accelerator, self.shown, self.max_steps = run.accelerator, shown, run.recipe.trainer.max_steps
        self.active = run.is_main
        self.file = run.folder / "metrics.jsonl"
        if self.active:
            keep_steps_until(self.file, first_step)
            keep_steps_until(run.folder / "verdicts.jsonl", first_step)
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        ]
        self.progress = Progress(*columns, disable=not (self.active and sys.stdout.isatty()))
        self.task = self.progress.add_task("training", total=self.max_steps, completed=first_step, figures="")
        self.started, self.first_step = time.perf_counter(), first_step

    def __enter__(self) -> "MetricsLog":
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Log one step."""
        record = {"step": step} | {key: plain_number(value) for key, value in record.items()}
        if self.active:
            with self.file.open("a") as file:
                file.write(json.dumps(record) + "\n")
            self._show(step, record)
        tracked = {key: value for key, value in record.items() if value is not None and key != "step"}
        self.accelerator.log(tracked, step=step)

    def _show(self, step: int, record: dict[str, Any]) -> None:
        known = [name for name in self.shown if record.get(name) is not None]
        figures = "  ".join(f"{name.removesuffix('/mean').split('/')[-1]} {record[name]:.3g}" for name in known)
        self.progress.update(self.task, completed=step, figures=figures)
        if self.progress.disable and (step % PLAIN_LINE_EVERY == 0 or step in (1, self.max_steps)):
            per_step = (time.perf_counter() - self.started) / (step - self.first_step)
            left = per_step * (self.max_steps - step)
            print(f"step {step}/{self.max_steps}  {figures}  {per_step:.2f} s/step  ETA {left:.0f} s", flush=True)


def plain_number(value: Any) -> float | int | None:
    """What JSON can hold: None for NaN and infinities."""
    if isinstance(value, bool | int) or value is None:
        return value
    return float(value) if math.isfinite(float(value)) else None


def keep_steps_until(file: Path, step: int) -> None:
    """Drop records after `step`, which a resumed run writes again."""
    if file.is_file():
        lines = [line for line in file.read_text().splitlines() if 0 < step_of(line) <= step]
        replace_text(file, "".join(f"{line}\n" for line in lines))


def step_of(line: str) -> int:
    """The record's step; 0 for a line that a killed run left unfinished."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return 0


def mean(values: Sequence[float | None]) -> float | None:
    """Of the values that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def deviation(values: Sequence[float | None]) -> float | None:
    """Standard deviation of the values that are known."""
    known = [value for value in values if value is not None]
    centre = mean(known)
    if centre is None:
        return None
    return math.sqrt(sum((value - centre) ** 2 for value in known) / len(known))
