"""`sail-rl pipeline`: from a basic model to its Thinking variant, stage by stage, each an ordinary command.

What is finished is skipped, what was interrupted goes on: every stage goes on by itself when its command is given
again, and `pipeline.json` in the folder tells which are done, and by which command.
"""

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sail_rl.command_line import BadInput, load_recipe, read_yaml
from sail_rl.config import GrpoRecipe
from sail_rl.config_pipeline import PipelineRecipe, Stage, check_stages, trainer_of
from sail_rl.pipeline_result import publish, stage_rows, table, write_pages
from sail_rl.run_folder import write_json

INTERRUPTED = 130  # as shells say it
STATE = "pipeline.json"
PACKAGE = Path(__file__).parent
TOOL = [sys.executable, "-m", "sail_rl.cli"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]


def run_pipeline(path: str, overrides: list[str], dry_run: bool = False) -> None:
    """The whole command."""
    pipeline = load_recipe(PipelineRecipe, path, overrides)
    check_stages(pipeline)
    if dry_run:
        for stage in pipeline.stages:
            for name, command in commands_of(pipeline, stage).items():
                print(f"{name}: {shlex.join(command.words)}")
        return
    folder = Path(pipeline.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    done = read_state(folder)
    refuse_changes(pipeline, done)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) != signal.SIG_IGN:  # as under nohup
            signal.signal(ending, signal.default_int_handler)
    for number, stage in enumerate(pipeline.stages, 1):
        print(f"\n[{number}/{len(pipeline.stages)}] {stage.name}: {what(stage)}", flush=True)
        for name, command in commands_of(pipeline, stage).items():
            if name in done:
                print(f"{name} is finished", flush=True)
                continue
            # A merge is whole or absent, and refuses a folder that is there.
            whole = name in pipeline.merges and pipeline.output_of(name).is_dir()
            seconds = (
                0.0 if whole else run_command(name, command, shlex.join(["sail-rl", "pipeline", path, *overrides]))
            )
            done[name] = command.record | {"seconds": round(seconds, 1), "command": shlex.join(command.words)}
            write_json(folder / STATE, done)
        write_pages(pipeline, done)
    publish(pipeline, done)
    print("\n" + table(pipeline, stage_rows(pipeline, done)), flush=True)
    print(f"model: {folder / 'model'}   report: {(folder / 'report.html').resolve()}", flush=True)


def what(stage: Stage) -> str:
    """A stage in a few words."""
    if stage.train:
        return f"training by {stage.train}"
    return f"the mean of {', '.join(stage.merge)}" if stage.merge else f"sail-rl data {stage.data}"


@dataclass(frozen=True)
class Command:
    """One command of a stage."""

    starter: list[str]
    """Program and launcher, which may differ when a pipeline goes on."""
    arguments: list[str]
    recipe: str | None = None
    """The recipe among the arguments."""

    @property
    def words(self) -> list[str]:
        """As it is run."""
        return [*self.starter, *self.arguments]

    @property
    def record(self) -> dict[str, Any]:
        """What its result depends on."""
        return {"arguments": self.arguments, "recipe": read_yaml(Path(self.recipe)) if self.recipe else {}}


def commands_of(pipeline: PipelineRecipe, stage: Stage) -> dict[str, Command]:
    """Name -> command of a stage and of what its model is asked."""
    output, changes = pipeline.output_of(stage.name), [f"seed={pipeline.seed}", *pipeline.resolved(stage.set)]
    if stage.train:
        script = "train_grpo.py" if trainer_of(stage.train) is GrpoRecipe else "train_sft.py"
        starter = [*LAUNCH, *pipeline.launch_options, str(PACKAGE / script)]
        command = Command(starter, [stage.train, *changes, f"output_dir={output.parent}"], stage.train)
    elif stage.merge:
        sources = [str(pipeline.output_of(name)) for name in stage.merge]
        command = Command(TOOL, ["merge", str(output), *sources])
    else:
        options = ["--samples", str(stage.samples), *(["--limit", str(stage.limit)] if stage.limit else [])]
        words = ["data", str(stage.data), str(stage.recipe), *changes, "--output", str(output), *options]
        command = Command(TOOL, words, stage.recipe)
    return {stage.name: command} | evaluations_of(pipeline, stage)


def evaluations_of(pipeline: PipelineRecipe, stage: Stage) -> dict[str, Command]:
    """Name -> command of each mode in which the stage's model is asked."""
    asked = pipeline.evaluation
    if asked is None or not stage.makes_model or not stage.evaluate:
        return {}
    folder, model = Path(pipeline.output_dir) / stage.name, f"model.path={pipeline.output_of(stage.name)}"
    limit = ["--limit", str(asked.limit)] if asked.limit else []
    found = {}
    for mode, changes in asked.modes.items():
        words = ["eval", asked.recipe, model, f"seed={pipeline.seed}", *pipeline.resolved(changes)]
        command = Command(TOOL, [*words, "--output", str(folder / f"eval_{mode}"), *limit], asked.recipe)
        found[f"{stage.name}, {mode}"] = command
    return found


def read_state(folder: Path) -> dict[str, Any]:
    """What is done, by name."""
    file = folder / STATE
    return json.loads(file.read_text()) if file.is_file() else {}


def refuse_changes(pipeline: PipelineRecipe, done: Mapping[str, Any]) -> None:
    """What is done must be what is asked for now."""
    for stage in pipeline.stages:
        for name, command in commands_of(pipeline, stage).items():
            was, now = done.get(name), command.record
            if was is None or all(was[key] == value for key, value in now.items()):
                continue
            old, new = was["arguments"], now["arguments"]
            changed = [f"it had {word}" for word in old if word not in new]
            changed += [f"now {word}" for word in new if word not in old]
            raise BadInput(
                f"{pipeline.output_dir} has run {name} in another way "
                f"({'; '.join(changed) or f'{command.recipe} is another'}): name another output_dir, or "
                f"delete {Path(pipeline.output_dir) / STATE} and the folders of what changes"
            )


def run_command(name: str, command: Command, again: str) -> float:
    """Run to the end; seconds. An interruption is passed on, and ends the pipeline once the stage has ended."""
    print(f"$ {shlex.join(command.words)}", flush=True)
    started = time.perf_counter()
    # In a session of its own: what the terminal sends is passed on once, and to those alone that can answer.
    process = subprocess.Popen(command.words, start_new_session=True)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        end(process, command.starter[: len(LAUNCH)] == LAUNCH)
        print(f"\ninterrupted in {name}; `{again}` goes on from there", flush=True)
        sys.exit(INTERRUPTED)
    if code:
        raise BadInput(f"{name} has ended with code {code}, for the reason above; mend it, and `{again}` goes on")
    return time.perf_counter() - started


def end(process: subprocess.Popen, is_launcher: bool) -> None:
    """Have a stage end itself, and wait for all that belongs to it; a second interruption kills it."""
    family = psutil.Process(process.pid).children(recursive=True)
    # A launcher would end at once, or kill its trainers before they have saved; it ends by itself when they have.
    trainers = psutil.Process(process.pid).children() if is_launcher else []
    try:
        send(trainers or [process], signal.SIGINT)
        process.wait()
        psutil.wait_procs(family)
    except KeyboardInterrupt:
        send([*family, process], signal.SIGKILL)


def send(processes: Iterable[psutil.Process | subprocess.Popen], number: signal.Signals) -> None:
    """To those that are still there."""
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(number)
