"""Thousands of small GRPO steps while things go wrong: what leaks, what is lost, and what is learnt all the same.

    python benchmarks/soak.py [--steps N] [--seed S] [--server-steps N] [--short]

Three runs of the quickstart's task with 16 completions a step, each in a folder of runs/benchmarks:

- calm: without faults;
- shaky: a reward of its own raises, returns NaN, sleeps, loops or kills its process on 1 completion in 100, chosen by
  seed, step and text. The last two fifths of the steps are interrupted as well: every minute or so (by seed) the
  trainer gets SIGTERM or SIGKILL, now and then in the middle of a save, and is started again by the same command;
- server: a few steps with `rollout.engine: vllm_server`, whose process is killed again and again.

Resident memory and open files of the trainer are read twice a second and compared, over the steps that no signal
interrupts, between the tenth after the first tenth and the last tenth. Started again, it goes on where it was.
"""

import argparse
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.common import SHORT_RESULTS, machine, markdown, results_file, save
from benchmarks.quickstart_runs import sft_start

STEPS, SHORT_STEPS = 2000, 60
SAVE_EVERY, SHORT_SAVE_EVERY = 20, 2
UNDISTURBED = 0.6  # share of the shaky run's steps that get no signal: one process lives as long as they last
MOST_GROWTH = 0.05
PASSING_FILES = 2  # are open for a moment, of half a dozen
ENDINGS = {signal.SIGTERM: 75, signal.SIGKILL: -signal.SIGKILL}  # the exit codes that they must have
BETWEEN, SHORT_BETWEEN = (20.0, 100.0), (3.0, 15.0)  # seconds of training from one signal to the next
SERVER_LIVES = 5.0  # seconds with steps, on average
POLL = 0.5  # seconds
REWARD = '''
import os, random, signal, time, zlib

SHARES = {"raise": 0.0045, "nan": 0.0045, "sleep": 0.0003, "spin": 0.0003, "kill": 0.0004}


def fault(step, text, seed):
    """What goes wrong with this completion in this step, if anything."""
    chance = random.Random(zlib.crc32(f"{seed} {step} {text}".encode()))
    return chance.choices([*SHARES, None], [*SHARES.values(), 1 - sum(SHARES.values())])[0]


def shaky(completions, trainer_state, seed, faults, **columns):
    if not faults:
        return [0.0] * len(completions)
    found = [fault(trainer_state.global_step, text, seed) for text in completions]
    if "raise" in found:
        raise RuntimeError("as planned")
    if "sleep" in found:
        time.sleep(600)
    while "spin" in found:
        pass
    if "kill" in found:
        os.kill(os.getpid(), signal.SIGKILL)
    return [float("nan") if one == "nan" else 0.0 for one in found]
'''
COLUMNS = {
    "run": "run",
    "steps": "steps",
    "failed": "completions without a reward",
    "timeouts": "timeouts",
    "signals": "signals, by exit code",
    "saving": "in a save",
    "lost": "steps lost",
    "doubled": "doubled",
    "rss": "resident MiB, early -> late",
    "files": "open files, early -> late",
    "before": "accuracy before",
    "after": "after",
    "minutes": "minutes",
}


@dataclass(frozen=True)
class Part:
    """One of the runs."""

    name: str
    folder: Path
    overrides: tuple[str, ...]
    steps: int
    undisturbed: int
    """Steps before the first signal."""
    seed: int
    save_every: int
    between: tuple[float, float]
    server_dies: bool = False


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-steps", type=int, default=40, help="0 leaves the third run out")
    parser.add_argument("--questions", type=int, default=1000, help="unseen ones, for the accuracies")
    parser.add_argument("--short", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or (SHORT_STEPS if arguments.short else STEPS)
    arguments.questions = 50 if arguments.short else arguments.questions
    found = machine()
    rows = [measure(part) for part in parts(arguments)]
    faults = problems(rows, arguments.questions)
    text = f"# {arguments.steps} steps of GRPO with faults\n\n{markdown(rows, COLUMNS)}\n" + "\n".join(faults or [FINE])
    output = arguments.output or results_file("soak", arguments.short)
    save(output, {"machine": found, "settings": vars(arguments) | {"output": None}, "rows": rows}, text + "\n")
    sys.exit(bool(faults))


FINE = (
    "No step is lost or doubled, memory and open files of the trainer stay within 5 %, the accuracies are equal within "
    "two standard errors of their difference."
)


def parts(arguments: argparse.Namespace) -> Iterator[Part]:
    """The runs, one after another."""
    home = SHORT_RESULTS / f"soak{arguments.steps}_seed{arguments.seed}"
    home.mkdir(parents=True, exist_ok=True)
    (home / "shaky.py").write_text(REWARD)
    start, steps, seed = sft_start(arguments.seed, arguments.short), arguments.steps, arguments.seed

    rhythm = (SHORT_SAVE_EVERY, SHORT_BETWEEN) if arguments.short else (SAVE_EVERY, BETWEEN)

    def part(name: str, steps: int, undisturbed: int, *more: str, faults: bool = True, server: bool = False) -> Part:
        entry = f"{{function: '{home}/shaky.py:shaky', weight: 0.1, timeout: 0.3, seed: {seed}, faults: {faults}}}"
        rewards = f"rewards=[{{function: accuracy, weight: 0.9}}, {{function: format, weight: 0.1}}, {entry}]"
        overrides = (f"model={start}", f"seed={seed}", rewards, f"data.eval.rows={arguments.questions}", *SMALL, *more)
        return Part(name, home / name, overrides, steps, undisturbed, seed, *rhythm, server)

    yield part("calm", steps, steps, faults=False)
    yield part("shaky", steps, int(UNDISTURBED * steps))
    if arguments.server_steps:
        engine = ("rollout.engine=vllm_server", "rollout.server.start_limit=600", "rollout.server.restarts=6")
        yield part("server", arguments.server_steps, arguments.server_steps, *engine, server=True)


SMALL = (
    *("rollout.prompts_per_step=4", "rollout.num_generations=4", "rollout.max_completion_length=40"),
    *("optim.learning_rate=5e-5", "trainer.eval_every=null", "trainer.transcript_every=200"),
)


# ---- a run and what is done to it


def measure(part: Part) -> dict[str, Any]:
    """Run a part to its end, however often it is interrupted, and read off what came of it."""
    part.folder.mkdir(parents=True, exist_ok=True)
    journal = part.folder / "soak.jsonl"
    with journal.open("a") as file:
        while not (part.folder / "run/summary.json").is_file():
            launch = sum(one["what"] == "end" for one in read(journal))
            for told in disturbed(part, launch):
                file.write(json.dumps(told | {"launch": launch}) + "\n")
                file.flush()
    return row_of(part, read(journal))


def disturbed(part: Part, launch: int) -> Iterator[dict[str, Any]]:
    """One launch of the trainer: samples of it as it runs, and how it ended, by itself or by a signal of ours."""
    chance = random.Random(f"{part.seed} {part.name} {launch}")
    ending, when_saving, wait = chance.choice(list(ENDINGS)), chance.random() < 0.5, chance.uniform(*part.between)
    began = time.monotonic()
    with (part.folder / f"launch_{launch}.log").open("w") as log:
        trainer = psutil.Popen(command(part), stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        try:
            due, found, killed_at = math.inf, steps_done(part), 0
            while trainer.poll() is None:
                step = steps_done(part)
                if due == math.inf and step != found and part.undisturbed <= step < part.steps:  # it is training
                    due = time.monotonic() + wait
                if time.monotonic() > due:
                    saving = when_saving and wait_for_save(part, trainer)
                    if trainer.poll() is None:  # it may have come to its end while a save was waited for
                        trainer.send_signal(ending)
                        code = trainer.wait()
                        yield {"what": "signal", "name": ending.name, "code": code, "step": step, "saving": saving}
                    break
                if part.server_dies and step > killed_at and chance.random() < POLL / SERVER_LIVES:
                    killed_at = step
                    yield from kill_server(trainer, step)
                yield sample(trainer, step)
                time.sleep(POLL)
        finally:
            if trainer.poll() is None:
                trainer.kill()
    if trainer.returncode not in (0, *ENDINGS.values()):
        sys.exit(f"the trainer has ended with code {trainer.returncode}; see {log.name}")
    yield {"what": "end", "code": trainer.returncode, "seconds": time.monotonic() - began}


def command(part: Part) -> list[str]:
    """The same at every launch."""
    limits = (
        f"trainer.max_steps={part.steps}",
        f"trainer.save_every={part.save_every}",
        f"output_dir={part.folder}/run",
    )
    return [sys.executable, "sail_rl/train_grpo.py", "recipes/quickstart.yaml", *part.overrides, *limits]


def steps_done(part: Part) -> int:
    """By the lines of metrics.jsonl."""
    file = part.folder / "run/metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def sample(trainer: psutil.Popen, step: int) -> dict[str, Any]:
    """Memory and open files of the trainer's process; none when it is just ending."""
    try:
        with trainer.oneshot():
            return {"what": "sample", "step": step, "rss": trainer.memory_info().rss, "files": trainer.num_fds()}
    except psutil.Error:
        return {"what": "gone"}


def wait_for_save(part: Part, trainer: psutil.Popen) -> bool:
    """Until a checkpoint is being written, for as long as the steps between two may take."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and trainer.poll() is None:
        if any(folder.name.startswith(".") for folder in (part.folder / "run/checkpoints").iterdir()):
            return True
        time.sleep(0.002)
    return False


def kill_server(trainer: psutil.Popen, step: int) -> Iterator[dict[str, Any]]:
    """SIGKILL to the rollout server of a trainer."""
    for child in trainer.children():
        if "rollouts.vllm_serving" in child.cmdline():
            child.kill()
            yield {"what": "signal", "name": "server", "code": -9, "step": step, "saving": False}


# ---- what came of it


def row_of(part: Part, journal: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A run in the table."""
    records = read(part.folder / "run/metrics.jsonl")
    summary = json.loads((part.folder / "run/summary.json").read_text())
    steps = Counter(record["step"] for record in records)
    signals = Counter(f"{one['name']} {one['code']}" for one in journal if one["what"] == "signal")
    figures: dict[str, Any] = {
        "run": part.name,
        "steps": part.steps,
        "failed": sum(record["completion/masked"] for record in records),
        "timeouts": sum(record.get("rewards/shaky/count/timeout", 0) for record in records),
        "signals": ", ".join(f"{count} x {name}" for name, count in sorted(signals.items())) or None,
        "saving": sum(one["saving"] for one in journal if one["what"] == "signal"),
        "lost": len(set(range(1, part.steps + 1)) - set(steps)),
        "doubled": sum(steps.values()) - len(steps),
        "before": summary["accuracy_before"],
        "after": summary["accuracy_after"],
        "minutes": sum(one["seconds"] for one in journal if one["what"] == "end") / 60,
    }
    for name, unit in (("rss", 2**20), ("files", 1)):
        early, late = early_and_late(part, [one for one in journal if one["what"] == "sample"], name)
        figures |= {f"{name}_early": early / unit, f"{name}_late": late / unit}
        figures[name] = f"{early / unit:.0f} -> {late / unit:.0f}"
    return figures


def early_and_late(part: Part, samples: Sequence[dict[str, Any]], name: str) -> tuple[float, float]:
    """Medians over two stretches of the first launch's steps: behind its first tenth, and its last tenth."""
    last = part.undisturbed
    first_launch = [one for one in samples if one["launch"] == 0]

    def middle(start: float, end: float) -> float:
        chosen = [one[name] for one in first_launch if start * last <= one["step"] <= end * last]
        return median(chosen) if chosen else math.nan

    return middle(0.1, 0.2), middle(0.9, 1.0)


def problems(rows: Sequence[dict[str, Any]], questions: int) -> list[str]:
    """What is not as it must be."""
    found = []
    for row in rows:
        if row["lost"] or row["doubled"]:
            found.append(f"{row['run']}: {row['lost']} steps are lost, {row['doubled']} doubled")
        for name, passing in (("rss", 0), ("files", PASSING_FILES)):
            early, late = row[f"{name}_early"], row[f"{name}_late"]
            if late - passing > (1 + MOST_GROWTH) * early:
                found.append(f"{row['run']}: {name} has grown by {late / early - 1:.0%}")
    calm, shaky = rows[0]["after"], rows[1]["after"]
    share = (calm + shaky) / 2
    if abs(calm - shaky) > 2 * math.sqrt(2 * share * (1 - share) / questions):
        found.append(f"the accuracies differ by more than two standard errors: {calm:.3f} and {shaky:.3f}")
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines; the last one may have been cut off by an end in the middle."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


if __name__ == "__main__":
    main()
