"""A model that several processes hold in parts: FSDP2, or DeepSpeed's ZeRO-2 and ZeRO-3, as the launcher asks.

The launcher's configuration alone chooses (recipes/accelerate/). All that differs from plain data parallelism is here:
how model and optimizer are wrapped, when gradients are exchanged, clipped and used, and how weights and optimizer state
become whole again. Collectives are called by every process or by none: what one process skips, the others wait for.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from sail_rl.command_line import BadInput
from sail_rl.launch import Run
from sail_rl.policy import Policy
from sail_rl.processes import FSDP2, ZERO2, ZERO3, sharding_of


@dataclass(frozen=True)
class Whole:
    """The model as engines and files need it: an ordinary module, called outside of the wrapper."""

    model: Any
    """The trained module itself, or a copy without weights of one that is in parts."""
    weights: Callable[[], AbstractContextManager]
    """Within this, the model has all its weights. Every process enters it or none."""


# ---- the wrapper


def prepare(run: Run, policy: Policy, optimizer: torch.optim.Optimizer) -> tuple[Any, Any, Whole]:
    """The wrapped policy, its optimizer, and the model for calls outside of the wrapper."""
    accelerator, sharding, model = run.accelerator, sharding_of(run.accelerator), policy.model
    whole = Whole(model, nullcontext)
    if sharding in (FSDP2, ZERO3):
        empty = empty_copy(model).to(accelerator.device)
        whole = Whole(empty, partial(filled, empty, model))
    if sharding:
        policy.forward = autocast(run)(policy.forward)  # type: ignore[method-assign]
    if sharding == FSDP2:
        # What accelerate wraps: the blocks of the tower and of the language model, as transformers marks them.
        policy._no_split_modules = sorted(blocks(model))  # type: ignore[assignment]
    if sharding in (ZERO2, ZERO3):
        complete_deepspeed_config(run)
    wrapped, optimizer = accelerator.prepare(policy, optimizer)
    check_wrapper(wrapped, sharding)
    if sharding == ZERO2:
        wrapped.optimizer.check_grad_overflow = True  # or it would step by a gradient in bfloat16 that is not finite
    return wrapped, optimizer, whole


def blocks(model: nn.Module) -> set[str]:
    """Class names of the layers that a model repeats."""
    return {type(module).__name__ for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}


def complete_deepspeed_config(run: Run) -> None:
    """What DeepSpeed has to know of the recipe: it clips by itself, and is told which micro-batch is a step's last."""
    run.accelerator.state.deepspeed_plugin.deepspeed_config.update(
        gradient_clipping=run.recipe.optim.max_grad_norm,
        gradient_accumulation_steps=1,
        train_micro_batch_size_per_gpu=1,  # of no effect, but asked for
        train_batch_size=run.shard.world_size,
        zero_force_ds_cpu_optimizer=False,  # torch's AdamW in main memory, too: DeepSpeed compiles its own
    )


def autocast(run: Run) -> Any:
    """The recipe's precision for a forward pass: by accelerate, or by us where accelerate would cast the weights."""
    if not sharding_of(run.accelerator):
        return run.accelerator.autocast()
    enabled = run.recipe.trainer.mixed_precision == "bf16"
    return torch.autocast(run.accelerator.device.type, torch.bfloat16, enabled=enabled)


def check_wrapper(wrapped: nn.Module, sharding: str | None) -> None:
    """The wrapper must be the one that was asked for."""
    if sharding == FSDP2:
        assert isinstance(wrapped, FSDPModule)
        assert all(isinstance(parameter, DTensor) for parameter in wrapped.parameters())
    if sharding in (ZERO2, ZERO3):
        assert type(wrapped).__name__ == "DeepSpeedEngine"
        assert wrapped.zero_optimization_stage() == int(sharding[-1])  # type: ignore[operator]


# ---- gradients


def sync_gradients(run: Run, model: nn.Module, last: bool) -> AbstractContextManager:
    """Around a micro-batch: let processes exchange gradients in the last one alone, where that saves anything."""
    sharding = sharding_of(run.accelerator)
    if sharding in (ZERO2, ZERO3):
        run.accelerator.sync_gradients = last  # in the backward pass of the last, DeepSpeed clips and steps
    # Gradients that wait for the last micro-batch would be whole on every process: sharded ones are exchanged at once.
    return nullcontext() if last or sharding else run.accelerator.no_sync(model)


def backward(run: Run, loss: torch.Tensor) -> None:
    """The backward pass of a micro-batch. Wrappers average gradients over processes; the loss's normaliser already
    counts all of them.

    A loss that is not finite may have a gradient that is. It is spoilt here, so that every process will see it.
    """
    run.accelerator.backward(loss * (run.shard.world_size + 0 * loss.detach()))


def clip_and_step(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Clip the gradient and step; its norm before, and no step where that is not finite. DeepSpeed has done both by the
    same rule, and only tells the norm."""
    if not sharding_of(run.accelerator):
        fill_gradients(model)
    norm = run.accelerator.clip_grad_norm_(model.parameters(), run.recipe.optim.max_grad_norm)
    norm = float(full(torch.as_tensor(norm)))
    if math.isfinite(norm):
        optimizer.step()
    return norm


def fill_gradients(model: nn.Module) -> None:
    """A gradient of zero for what no batch of the step has touched, such as the tower in a step of text alone.

    AdamW would pass it by on one process, and moves it on where several have shown it a blank picture.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


# ---- whole weights


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP2 holds in parts; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within it, weights of a module (not of the modules in it) that ZeRO-3 holds in parts are whole."""
    parameters = list(module.parameters(recurse=False))
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(parameters):
        yield


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of every weight, one module at a time; each process goes through all of them."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        with gathered(module):
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    whole = full(parameter.detach())
                    yield (
                        f"{prefix}.{name}" if prefix else name,
                        whole.clone() if hasattr(parameter, "ds_id") else whole,
                    )


def empty_copy(model: nn.Module) -> Any:
    """A copy whose weights have no memory, and remember their shapes."""
    empty = {id(p): nn.Parameter(p.new_empty(0), requires_grad=False) for p in model.parameters()}
    for parameter in model.parameters():
        empty[id(parameter)].whole_shape = parameter.shape  # type: ignore[attr-defined]
    return deepcopy(model, empty)


@contextmanager
def filled(empty: nn.Module, model: nn.Module) -> Iterator[None]:
    """Within it, the copy has the whole weights of the model that is in parts.

    Processes write different numbers of tokens: passes that gather weights layer by layer would wait for each other for
    ever. So the reference engine needs room for all weights at once for as long as it writes, and so does saving.
    """
    with torch.no_grad():
        for (name, own), (same_name, tensor) in zip(empty.named_parameters(), whole_parameters(model), strict=True):
            assert name == same_name
            own.data = tensor
    try:
        yield
    finally:
        for own in empty.parameters():
            own.data = own.new_empty(0)


# ---- optimizer state


def save_optimizer(run: Run, optimizer: Any, folder: Path) -> dict[str, Any]:
    """What a checkpoint holds of the optimizer: whole, for any number of processes; or DeepSpeed's files in `folder`,
    for as many as have written them."""
    sharding = sharding_of(run.accelerator)
    if sharding in (ZERO2, ZERO3):
        save_deepspeed(engine_of(run), folder / "deepspeed")
        return {"sharding": sharding}
    state = optimizer.state_dict()
    if sharding == FSDP2:
        whole = {number: {k: full(v).cpu() for k, v in one.items()} for number, one in state["state"].items()}
        state = {**state, "state": whole}
    return {"optimizer": state}


def load_optimizer(run: Run, optimizer: Any, folder: Path, saved: dict[str, Any]) -> None:
    """Put the optimizer's state back."""
    sharding, written_by = sharding_of(run.accelerator), saved.get("sharding")
    processes = run.shard.world_size
    if sharding in (ZERO2, ZERO3) or written_by:
        if (sharding, processes) != (written_by, saved["processes"]):
            writer = f"{saved['processes']} processes with {written_by}" if written_by else "FSDP2 or plain processes"
            raise BadInput(
                f"{folder} was written by {writer}; DeepSpeed's optimizer state cannot be carried over from or to "
                "anything else: launch the run as it was begun, or begin another one with another output_dir"
            )
        load_deepspeed(engine_of(run), folder / "deepspeed")
        return
    if processes != saved["processes"] and run.is_main:
        print(
            f"written by {saved['processes']} processes, going on with {processes}: the same steps, but sums are "
            "rounded otherwise",
            flush=True,
        )
    state = saved["optimizer"]
    if sharding == FSDP2:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state["state"] = {number: in_parts(one, parameters[number]) for number, one in state["state"].items()}
    optimizer.load_state_dict(state)


def in_parts(state: dict[str, torch.Tensor], parameter: DTensor) -> dict[str, torch.Tensor]:
    """A weight's optimizer state, held in parts as the weight is."""

    def part(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape != parameter.shape:
            return tensor  # the count of steps
        device = parameter.device_mesh.device_type
        return distribute_tensor(tensor.to(device), parameter.device_mesh, parameter.placements)

    return {name: part(tensor) for name, tensor in state.items()}


def save_deepspeed(engine: Any, folder: Path) -> None:
    """Each process's own files. One that cannot write goes along until the others have written: they wait for it."""
    failed: list[OSError] = []

    def save(state_dict: Any, path: str) -> None:
        try:
            write_state(state_dict, Path(path))
        except OSError as error:
            failed.append(error)

    engine.checkpoint_engine.save = save
    engine._copy_recovery_script = lambda folder: None  # programs have no place in a checkpoint
    engine.save_checkpoint(str(folder), tag="state", save_latest=False, exclude_frozen_parameters=True)
    if failed:
        raise failed[0]


def load_deepspeed(engine: Any, folder: Path) -> None:
    """The same files, read as tensors and plain values: DeepSpeed's own way would run what is pickled in them."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def load(path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)

    engine.checkpoint_engine.load = load
    # Not strict: frozen weights are not in these files.
    engine.load_checkpoint(str(folder), tag="state", load_module_strict=False)


def write_state(state: Any, path: Path) -> None:
    """torch.save, whose own errors hide why the disk has not taken it."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def engine_of(run: Run) -> Any:
    """DeepSpeed's engine."""
    return run.accelerator.deepspeed_engine_wrapped.engine
