"""Saving and going on. A checkpoint is an ordinary transformers folder with `trainer_state.pt` beside the weights; of a
LoRA run, whose other weights never change, it is a folder of peft's. How it comes to be whole on the disk, and is
checked, is in checkpoint_folder.py.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sail_rl import checkpoint_folder
from sail_rl.checkpoint_folder import begin_folder, complete_folder, flush, keep_newest, newest_whole, temporary_name
from sail_rl.command_line import BadInput
from sail_rl.config_data import ModelSection
from sail_rl.hub import HubCopy
from sail_rl.launch import Run
from sail_rl.model.file_layout import in_file_layout
from sail_rl.model.lora import base_name, has_adapters, load_adapters, merged, save_adapters
from sail_rl.sharding import Whole, load_optimizer, save_optimizer, whole_parameters, write_state

MOST_FAILED = 2  # saves in a row: the run stops before more work can be lost


@dataclass(frozen=True)
class Progress:
    """Where a run stands, beside weights and optimizer. Sampling, data order and schedules follow from these."""

    step: int = 0
    """Optimizer steps done."""
    data_position: int = 0
    """Rows of data.train read, bad ones included."""
    seconds: float = 0.0
    """Training time so far, without evaluation and saving."""
    completions_scored: int = 0
    reward_failures: dict[str, int] = field(default_factory=dict)
    """Completions that each reward failed on."""
    judge_failing: int = 0
    """Steps in a row in which too many of the judge's verdicts were missing."""
    pass_rates: dict[int, float] = field(default_factory=dict)
    """By row of data.train, where a curriculum measures them."""
    steps_skipped: int = 0
    """Steps in a row of which an update was left out: nothing is saved meanwhile, the weights may be the cause."""
    written_ahead: list[dict[str, Any]] = field(default_factory=list)
    """Completions of the next step, of all processes, where they are written ahead of it."""

    def after(self, **changes) -> "Progress":
        """The same with some numbers changed."""
        return replace(self, **changes)


def full_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight as `save_pretrained` would write it, a layer at a time; adapters merged.

    Weights that processes hold in parts are made whole one after another, so every process goes through all of them.
    """
    return in_file_layout(model, merged(model, whole_parameters(model)))


def weight_names(model: torch.nn.Module) -> set[str]:
    """The names of `full_parameters`, without making them."""
    named = (
        # By the shape of a mixture's experts they are told apart; an empty copy has it noted down.
        (base_name(name), tensor.new_empty(getattr(tensor, "whole_shape", tensor.shape), device="meta"))
        for name, tensor in model.named_parameters()
    )
    return {name for name, _ in in_file_layout(model, ((name, tensor) for name, tensor in named if name))}


class Saver:
    """Saves a run's checkpoints. One that cannot be written costs the run nothing else; two in a row stop it."""

    def __init__(self, run: Run, whole: Whole, processor, optimizer):
        self.run, self.whole, self.processor, self.optimizer = run, whole, processor, optimizer
        self.failed = 0
        """Saves that have failed since this launch."""
        self.in_a_row = 0
        self.hub = HubCopy(run)

    def save(self, progress: Progress, accuracy: float | None = None, leaving: bool = False) -> None:
        """Write `checkpoints/step_N`, with the accuracy on data.eval if it was measured, and drop the oldest beyond
        `trainer.save_total_limit`. A run that is leaving has no second try."""
        error = self.save_if_possible(progress, accuracy)
        if error and (leaving or self.in_a_row >= MOST_FAILED):
            raise BadInput(
                f"saves that failed in a row: {self.in_a_row}, the last one with {error}; make room in output_dir, or "
                "mend it: the same command then goes on from the newest checkpoint"
            )

    def save_after(self, end: BaseException, progress: Progress) -> None:
        """Keep every finished step of a run that ends early; after a signal, its exit code says that they are kept."""
        if isinstance(end, BadInput):
            self.save_if_possible(progress)  # the mistake is what is told
        else:
            self.save(progress, leaving=True)

    def save_if_possible(self, progress: Progress, accuracy: float | None = None) -> str | None:
        """The same, and what has kept any process from writing; then nothing is left of it."""
        run, target = self.run, self.run.folder / "checkpoints" / f"step_{progress.step}"
        # What is there is whole and the same: it was written after this step, by this launch or the one before.
        if not progress.step or progress.steps_skipped or run.shard.gather([target.is_dir()])[0]:
            return None
        error = self._write(target, progress, accuracy)
        self.in_a_row = self.in_a_row + 1 if error else 0
        self.failed += bool(error)
        if error and run.is_main:
            shutil.rmtree(temporary_name(target), ignore_errors=True)
            print(
                f"WARNING: {target} could not be saved: {error}\nWARNING: the run goes on", file=sys.stderr, flush=True
            )
        return error

    def _write(self, target: Path, progress: Progress, accuracy: float | None) -> str | None:
        """In three parts, since all processes must take part in the second, or none."""
        run, state, folder = self.run, dict[str, Any](), temporary_name(target)

        def write_model() -> None:
            if run.is_main:
                begin_folder(target)
                (save_adapters if has_adapters(self.whole.model) else save_whole)(folder, self.whole.model)
                self.processor.save_pretrained(folder)

        def write_optimizer() -> None:
            state.update(save_optimizer(run, self.optimizer, folder))

        def complete() -> None:
            if run.is_main:
                processes = run.shard.world_size
                write_state(state | {"processes": processes, "progress": asdict(progress)}, folder / "trainer_state.pt")
                flush(run.folder / "metrics.jsonl")  # not to be behind the checkpoint when the machine fails
                complete_folder(target, {"processes": processes, "accuracy": accuracy})
                self.hub.send(target)
                keep_newest(target.parent, run.recipe.trainer.save_total_limit)

        with self.whole.weights():
            error = first_error(run, write_model)
        return error or first_error(run, write_optimizer) or first_error(run, complete)


def first_error(run: Run, write: Callable[[], None]) -> str | None:
    """Why a process could not write, if one could not: all of them learn it."""
    error = None
    try:
        write()
    except Exception as failed:  # of a full disk, the tokenizers' library says nothing more precise
        error = f"{type(failed).__name__}: {failed}"
    return next((one for one in run.shard.gather([error]) if one), None)


def note_final_accuracy(run: Run, step: int, accuracy: float | None) -> None:
    """Let the checkpoint of the last step, which is evaluated after the run, be the best as well."""
    last = run.folder / "checkpoints" / f"step_{step}"
    if run.recipe.trainer.eval_every and accuracy is not None and last.is_dir():
        checkpoint_folder.note_accuracy(last, accuracy)
        keep_newest(last.parent, run.recipe.trainer.save_total_limit)


def save_whole(folder: Path, model) -> None:
    """The model as transformers loads it, adapters merged."""
    weights = None
    if has_adapters(model):
        # Merged weights are new tensors: in main memory, where there is room for a second model.
        weights = {name: tensor.cpu() for name, tensor in merged(model, model.state_dict().items())}
    model.save_pretrained(folder, state_dict=weights)


def save_model(folder: Path, model, processor) -> None:
    """The final model and its processor as transformers loads them, and its adapters on their own."""
    save_whole(folder, model)
    processor.save_pretrained(folder)
    if has_adapters(model):
        save_adapters(folder / "adapter", model)


def newest_checkpoint(run: Run) -> Path | None:
    """Where a run goes on from, if it has begun. One that has checkpoints never begins anew by itself."""
    found = newest_whole(run.folder / "checkpoints") if run.is_main else (None, {})
    checkpoint, faults = run.shard.gather([found])[0]
    if faults and not checkpoint:
        told = "".join(f"\n  {name}: its {fault}" for name, fault in faults.items())
        raise BadInput(
            f"{run.folder}/checkpoints has no checkpoint that is whole; restore one, or begin another run with another "
            f"output_dir:{told}"
        )
    return checkpoint


def resume_from(section: ModelSection, checkpoint: Path | None) -> ModelSection:
    """The recipe's model section, with the checkpoint's weights when there is one; adapters come with the progress."""
    if checkpoint is None:
        return section
    print(f"going on from {checkpoint}", flush=True)
    if section.lora:
        return section
    return section.model_copy(update={"path": str(checkpoint), "random_init": None})


def load_adapters_of(checkpoint: Path | None, model) -> None:
    """Put a LoRA run's adapters back, before the model is wrapped; other weights are loaded with the model."""
    if checkpoint is not None and has_adapters(model):
        load_adapters(checkpoint, model)


def load_progress(run: Run, checkpoint: Path | None, optimizer) -> Progress:
    """Put the optimizer back and say where the run stands."""
    if checkpoint is None:
        return Progress()
    state = torch.load(checkpoint / "trainer_state.pt", map_location="cpu", weights_only=True)
    load_optimizer(run, optimizer, checkpoint, state)
    return Progress(**state["progress"])
