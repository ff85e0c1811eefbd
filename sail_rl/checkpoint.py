"""Saving and going on. A checkpoint is an ordinary transformers folder with `trainer_state.pt` beside the weights; of a
LoRA run, whose other weights never change, it is a folder of peft's.

A folder is written under a temporary name and renamed when complete, so any `step_N` that exists is whole.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sail_rl.config_data import ModelSection
from sail_rl.launch import Run
from sail_rl.model.file_layout import in_file_layout
from sail_rl.model.lora import base_name, has_adapters, load_adapters, merged, save_adapters
from sail_rl.sharding import Whole, load_optimizer, save_optimizer, whole_parameters


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


def save_checkpoint(run: Run, whole: Whole, processor, optimizer, progress: Progress) -> None:
    """Write `checkpoints/step_N` and drop the oldest beyond `trainer.save_total_limit`."""
    if not progress.step:
        return
    target = run.folder / "checkpoints" / f"step_{progress.step}"
    temporary = target.with_name(f".{target.name}.tmp")
    with whole.weights():
        if run.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            (save_adapters if has_adapters(whole.model) else save_whole)(temporary, whole.model)
            processor.save_pretrained(temporary)
    state = save_optimizer(run, optimizer, temporary) | {"progress": asdict(progress)}
    if run.is_main:
        torch.save(state, temporary / "trainer_state.pt")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        for old in list_checkpoints(run.folder)[: -run.recipe.trainer.save_total_limit]:
            shutil.rmtree(old)
    run.accelerator.wait_for_everyone()


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


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [folder for folder in (run_folder / "checkpoints").glob("step_*") if folder.name[5:].isdigit()]
    return sorted(found, key=lambda folder: int(folder.name[5:]))


def latest_checkpoint(run_folder: Path) -> Path | None:
    """Where a run goes on from, if it has begun."""
    checkpoints = list_checkpoints(run_folder)
    return checkpoints[-1] if checkpoints else None


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
