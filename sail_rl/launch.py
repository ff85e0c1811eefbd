"""What both trainers do around their loops: mistakes, processes and threads, and the end of a run."""

import atexit
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sail_rl import stopping, watchdog
from sail_rl.command_line import BadInput, fail, recipe_text
from sail_rl.config import CommonRecipe, SftRecipe
from sail_rl.data.stream import Shard
from sail_rl.data.workers import Workers
from sail_rl.heap import keep_freed_memory
from sail_rl.run_folder import check_run, environment, finished, has_begun, write_json
from sail_rl.run_lock import hold
from sail_rl.threads import wait_briefly

RecipeType = TypeVar("RecipeType", bound=CommonRecipe)
NEEDED_BY_WORKERS = ("sail_rl.model.load",)  # torch and the processors: loaded while the trainer loads its model
LAST_WORDS = 0.5  # seconds
MOST_WORKERS = 4  # unless data.workers asks for more: enough for 16 pictures of 13 tiles in half a second


@dataclass(frozen=True)
class Run(Generic[RecipeType]):
    """One run: its recipe, its folder, and this process's place in it."""

    recipe: RecipeType
    folder: Path
    accelerator: Any
    shard: Shard
    workers: Workers | None = None
    """Who prepares rows ahead; None where this process does it itself."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the folder's files."""
        return self.shard.rank == 0

    def highest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return max(self.shard.gather([number]))

    def sum(self, sums: dict[str, float]) -> dict[str, float]:
        """Named numbers, added up over all processes."""
        everyone = self.shard.gather([sums])
        return {name: sum(one[name] for one in everyone) for name in sums}


def run_recipe(train: Callable[[Any], None], recipe: CommonRecipe) -> None:
    """Run a trainer; a finished run shows its result again, and a user's mistake ends without a traceback."""
    wait_briefly()
    keep_freed_memory()
    stopping.listen()
    try:
        check_run(recipe)
        recipe = counted_in_steps(recipe)
        summary = finished(recipe)
        if summary:
            print(f"{recipe.output_dir} is finished; its result:\n{result_lines(recipe.output_dir, summary)}")
            return
        train(recipe)
    except BadInput as mistake:
        sys.stdout.flush()
        fail(mistake)
    except stopping.Preempted:
        if os.environ.get("RANK", "0") == "0":
            saved = any(Path(recipe.output_dir).glob("checkpoints/step_*"))
            where = f"goes on from the newest checkpoint in {recipe.output_dir}" if saved else "begins anew"
            print(f"\nended by a signal; the same command {where}", flush=True)
        sys.exit(stopping.PREEMPTED)


def counted_in_steps(recipe: CommonRecipe) -> CommonRecipe:
    """The recipe with `trainer.num_train_epochs` turned into the steps that these take."""
    if not isinstance(recipe, SftRecipe) or recipe.trainer.num_train_epochs is None:
        return recipe
    from sail_rl.data.mixture import open_sources
    from sail_rl.data.streamed import ENDLESS

    rows = len(open_sources(recipe.data.train_sources, recipe.data.columns, "train", "data.train"))
    if rows >= ENDLESS:
        raise BadInput("trainer.num_train_epochs: data.train has no end; set trainer.max_steps in its place")
    steps = math.ceil(rows * recipe.trainer.num_train_epochs / recipe.sft.samples_per_step)
    trainer = recipe.trainer.model_copy(update={"max_steps": steps, "num_train_epochs": None})
    return recipe.model_copy(update={"trainer": trainer})


def start_run(recipe: RecipeType) -> Run[RecipeType]:
    """Processes, threads, seeds, trackers and the run's folder."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers
    from accelerate.utils import gather_object, set_seed

    from sail_rl.processes import make_accelerator

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    accelerator = make_accelerator(recipe)
    share_threads(accelerator)
    set_seed(recipe.seed)
    if accelerator.num_processes > 1:
        atexit.register(let_communication_end)
    single = accelerator.num_processes == 1
    shard = Shard() if single else Shard(accelerator.process_index, accelerator.num_processes, gather_object)
    count = number_of_workers(recipe, accelerator)
    run = Run(recipe, Path(recipe.output_dir), accelerator, shard, Workers(count, NEEDED_BY_WORKERS) if count else None)
    make_folder(run)
    if recipe.trainer.log_with:
        accelerator.init_trackers("sail_rl", config=flat(recipe.model_dump(mode="json")))
    return run


def let_communication_end() -> None:
    """Wait a moment between the last exchange with other processes and the end of their group.

    gloo's threads need the interpreter to let go of the tensors that they sent last. When the interpreter ends their
    group, it waits for them without giving way: a process has been seen to hang there for ever.
    """
    time.sleep(LAST_WORDS)


def number_of_workers(recipe: CommonRecipe, accelerator) -> int:
    """The recipe's `data.workers`, or what suits the machine."""
    if recipe.data.workers is not None:
        return recipe.data.workers
    return 0 if accelerator.device.type == "cpu" else min(MOST_WORKERS, cores_per_process(accelerator) // 2)


def cores_per_process(accelerator) -> int:
    """This machine's cores, shared out among the processes on it."""
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return max(1, len(os.sched_getaffinity(0)) // processes_here)


def share_threads(accelerator) -> None:
    """On a CPU, share the cores out among the processes: launchers set one thread or all, and neither suits."""
    import torch

    if accelerator.device.type == "cpu":
        torch.set_num_threads(cores_per_process(accelerator))


def make_folder(run: Run) -> None:
    """The run's folder with the resolved recipe, cleared of what a run that never began has left."""
    run.folder.mkdir(parents=True, exist_ok=True)
    if refused := run.shard.gather([hold(run.folder) if run.is_main else None])[0]:
        raise BadInput(refused)
    if run.is_main:
        if not has_begun(run.folder):
            for name in ("predictions_before.jsonl", "quarantine.jsonl"):
                (run.folder / name).unlink(missing_ok=True)
        for part in ("transcripts", "pictures", "checkpoints"):
            (run.folder / part).mkdir(parents=True, exist_ok=True)
        (run.folder / "config.yaml").write_text(recipe_text(run.recipe))
    run.accelerator.wait_for_everyone()


def record_environment(run: Run, model) -> None:
    """Versions, devices, processes, threads and the wrapper around the model, as environment.json."""
    from sail_rl.processes import sharding_of

    if run.is_main:
        wrapper = {"wrapper": type(model).__name__, "sharding": sharding_of(run.accelerator)}
        workers = {"data_workers": run.workers.count if run.workers else 0}
        write_json(run.folder / "environment.json", environment(run.accelerator) | wrapper | workers)


def flat(values: dict, prefix: str = "") -> dict:
    """Nested keys as dotted ones, which trackers can show."""
    pairs: dict = {}
    for key, value in values.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return pairs


def seed_step(run: Run, step: int) -> None:
    """Give dropout its random numbers by step and process alone: a resumed run draws what an uninterrupted one does."""
    import torch

    watchdog.Pulse.step = step
    torch.manual_seed((run.recipe.seed << 32) + step * run.shard.world_size + run.shard.rank)


def check_divisible(run: Run, key: str, value: int) -> None:
    """Every process gets the same number of rows."""
    if value % run.shard.world_size:
        raise BadInput(f"{key} = {value} cannot be shared by {run.shard.world_size} processes; make it a multiple")


def result_lines(output_dir: str, summary: dict) -> str:
    """The last lines that a run prints."""
    lines = []
    before, after, questions = (summary.get(k) for k in ("accuracy_before", "accuracy_after", "eval_questions"))
    if after is not None:
        change = f"{before:.3f} -> {after:.3f}" if before is not None else f"{after:.3f}"
        lines.append(f"greedy validation accuracy on {questions} unseen questions: {change}")
    lines.append(f"{summary['steps']} steps, {summary['seconds']:.0f} s of training (earlier stages included)")
    lines.append(f"model: {output_dir}/final   report: {Path(output_dir).resolve() / 'report.html'}")
    return "\n".join(lines)
