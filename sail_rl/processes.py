"""The processes of a run, as the launcher has made them: which sharding its file asks for, and whether it is there.

Launchers have trained as one process, or with another wrapper than was asked for, without a word.
"""

import importlib
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sail_rl.command_line import BadInput
from sail_rl.config import CommonRecipe

FSDP2, ZERO2, ZERO3 = "FSDP2", "ZeRO-2", "ZeRO-3"
ZERO = {2: ZERO2, 3: ZERO3}
CONFIGURATION = "the launcher's configuration"  # accelerate's file, in which mistakes are mended


def asked_for() -> str | None:
    """FSDP or DEEPSPEED, if `accelerate launch` was told so."""
    told = [name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"]
    return told[0] if told else None


def sharding_of(accelerator: Accelerator) -> str | None:
    """FSDP2, ZeRO-2 or ZeRO-3; None where every process holds the whole model and optimizer."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return FSDP2
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return ZERO[accelerator.state.deepspeed_plugin.zero_stage]
    return None


def make_accelerator(recipe: CommonRecipe) -> Accelerator:
    """accelerate as the launcher has set it up, with the recipe's precision; what would not be exact is refused."""
    asked, on_cpu = asked_for(), not torch.accelerator.is_available()
    if asked == "FSDP" and os.environ.get("FSDP_VERSION") != "2":
        raise BadInput(f"{CONFIGURATION} asks for the first FSDP; these trainers need fsdp_version: 2")
    if asked == "DEEPSPEED" and on_cpu:
        exchange_by_gloo()
    accelerator = Accelerator(
        # Unless told, accelerate takes each of several processes on a CPU for a run of its own; if told, it forgets
        # DeepSpeed, and has to be given the backend instead.
        cpu=on_cpu and asked != "DEEPSPEED",
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and asked == "DEEPSPEED" else None,
        # Their own bfloat16 would cast the weights themselves; `prepare` gives them the autocast that all others have.
        mixed_precision="no" if asked else recipe.trainer.mixed_precision,
        log_with=list(recipe.trainer.log_with) or None,
        project_dir=recipe.output_dir,
    )
    if asked == "FSDP" and on_cpu:
        shard_on_cpu(accelerator)
    # Every process loads whole models. transformers would load them in parts for ZeRO-3, the reference model too.
    unset_hf_deepspeed_config()
    check_launch(accelerator, asked)
    return accelerator


def exchange_by_gloo() -> None:
    """DeepSpeed would first compile an exchange over shared memory, for a minute; gloo has one."""
    # Not by `from deepspeed.comm import torch`, which is torch itself.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


def shard_on_cpu(accelerator: Accelerator) -> None:
    """accelerate turns to FSDP on accelerators alone; on a CPU it would train as DDP, without a word."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def check_launch(accelerator: Accelerator, asked: str | None) -> None:
    """What was asked for must be there, with settings that leave the recipe its meaning."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != processes:
        raise BadInput(
            f"WORLD_SIZE = {processes}, but the number of processes that train is {accelerator.num_processes}: start "
            "them with accelerate launch or torchrun"
        )
    if asked and accelerator.distributed_type != getattr(DistributedType, asked):
        raise BadInput(f"{CONFIGURATION} asks for {asked}, but accelerate has made {accelerator.distributed_type}")
    mistakes = []
    if asked == "FSDP":
        mistakes = fsdp_mistakes(accelerator.state.fsdp_plugin)
    if asked == "DEEPSPEED":
        mistakes = deepspeed_mistakes(accelerator.state.deepspeed_plugin)
    if mistakes:
        raise BadInput("\n  ".join([f"{CONFIGURATION} does not fit these trainers:", *mistakes]))


def fsdp_mistakes(plugin: Any) -> list[str]:
    """Settings with which a run would not be what the recipe says, each with what to do."""
    told = {
        "fsdp_cpu_ram_efficient_loading: set it to false": plugin.cpu_ram_efficient_loading,
        "fsdp_activation_checkpointing: leave it out, and set trainer.gradient_checkpointing": (
            plugin.activation_checkpointing
        ),
        "fsdp_offload_params: set it to false": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
    }
    return [mistake for mistake, made in told.items() if made]


def deepspeed_mistakes(plugin: Any) -> list[str]:
    """The same of DeepSpeed."""
    config = plugin.deepspeed_config
    told = {
        "zero_stage: 2 or 3 is needed": plugin.zero_stage not in ZERO,
        "offload_param_device: set it to none": plugin.offload_param_device != "none",
    }
    for section in ("bf16", "fp16"):
        told[f"{section}: leave it out, and set trainer.mixed_precision"] = config[section]["enabled"] is True
    for section in ("optimizer", "scheduler"):
        told[f"{section}: leave it out, and set it in the recipe's optim"] = section in config
    return [mistake for mistake, made in told.items() if made]
