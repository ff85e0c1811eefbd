"""A model and its processor, as `model:` in the recipe asks for them."""

from collections.abc import Callable
from functools import cache
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import sail_rl.model  # noqa: F401  (registers SAIL-VL2 with the Auto classes)
from sail_rl.command_line import BadInput
from sail_rl.config_data import ModelSection
from sail_rl.data.pictures import picture_row
from sail_rl.model.cpu_linear import is_faster_here, use_onednn
from sail_rl.model.cpu_passes import use_fewer_passes
from sail_rl.model.liger import require_liger, use_liger
from sail_rl.model.lora import add_adapters
from sail_rl.model.parts import PARTS
from sail_rl.model.processing_sail_vl2 import SailVL2Processor
from sail_rl.model.released_config import released_values
from sail_rl.model.router import find_routers
from sail_rl.model.segment_kernels import Attention
from sail_rl.model.tiny import tiny_model, tiny_processor
from sail_rl.model.tiny_internvl import tiny_internvl_model, tiny_internvl_processor
from sail_rl.model.tiny_qwen3_vl import tiny_qwen3_vl_model, tiny_qwen3_vl_processor
from sail_rl.policy import Policy

# Said aloud, since transformers would else ask at the terminal whether to run the Python files of a checkpoint.
NO_CODE = {"trust_remote_code": False}
# What model.random_init makes: a processor for a corpus, and a model for a processor.
TINY: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "tiny": (tiny_processor, tiny_model),
    "tiny_qwen3_vl": (tiny_qwen3_vl_processor, tiny_qwen3_vl_model),
    "tiny_internvl": (tiny_internvl_processor, tiny_internvl_model),
}


def load_model(section: ModelSection, seed: int):
    """(model, processor), frozen parts frozen; a checkpoint that cannot be read is the user's mistake."""
    if section.random_init:
        make_processor, make_model = TINY[section.random_init]
        processor = make_processor(picture_corpus())
        model = make_model(processor, seed).to(getattr(torch, section.dtype))
    else:
        assert section.path is not None
        model, processor = load_checkpoint(section.path, section.dtype)
    set_tiles(processor.image_processor, section)
    set_resolution(processor.image_processor, section)
    for part in section.freeze:
        freeze(model, part)
    if section.router_aux_loss_coef and not find_routers(model):
        raise BadInput(f"model.router_aux_loss_coef: {type(model).__name__} has no mixture of experts; leave it out")
    if section.use_liger_kernel:
        require_liger()
        use_liger(model)
    else:
        use_fewer_passes(model)
    if section.lora:
        add_adapters(model, section.lora, PARTS, str(section.path), seed)
    if is_faster_here():
        use_onednn(model)
    return model, processor


def set_tiles(image_processor, section: ModelSection) -> None:
    """The recipe's range of tiles, where it names one."""
    if not (section.min_tiles or section.max_tiles):
        return
    if not hasattr(image_processor, "max_patches"):
        raise BadInput("model.min_tiles, model.max_tiles: this model's processor cuts no tiles; leave them out")
    low = image_processor.min_patches = section.min_tiles or image_processor.min_patches
    high = image_processor.max_patches = section.max_tiles or image_processor.max_patches
    if low > high:
        raise BadInput(f"model.min_tiles = {low} is more than max_tiles = {high}, which the checkpoint has: set both")


def set_resolution(image_processor, section: ModelSection) -> None:
    """Native size or tiles, where the recipe says which."""
    if section.any_resolution is None:
        return
    if not hasattr(image_processor, "any_resolution"):
        raise BadInput("model.any_resolution: only SAIL-VL2 has this choice; leave it out")
    image_processor.any_resolution = section.any_resolution


def load_checkpoint(path: str, dtype: str):
    """A transformers folder or Hub id, SAIL-VL2's released layout among them; never with remote code."""
    try:
        processor = load_processor(path)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path, dtype=getattr(torch, dtype), output_loading_info=True, **NO_CODE
        )
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
        gist = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"model.path = {path}: the checkpoint cannot be loaded: {gist}") from error
    model, told = loaded
    missing = sorted(told["missing_keys"])  # transformers would go on with random weights
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise BadInput(f"model.path = {path}: the checkpoint lacks {', '.join(missing[:5])}{more}")
    return model, processor


def load_processor(path: str):
    """The checkpoint's processor; AutoProcessor would look for a released one's remote code."""
    kind = SailVL2Processor if released_values(path) else AutoProcessor
    processor = kind.from_pretrained(path, padding_side="left", **NO_CODE)
    for told in ("is_local", "local_files_only"):
        # Where it came from is not of the model: servers take a resumed run's for another one.
        processor.tokenizer.init_kwargs.pop(told, None)
    return processor


def freeze(model, part: str) -> None:
    """Take a part out of training; a part that the model lacks is the user's mistake."""
    found = [p for name, p in model.named_parameters() if any(f"{key}." in name for key in PARTS[part])]
    if not found:
        raise BadInput(f"model.freeze = [{part}]: {type(model).__name__} has no such part")
    for parameter in found:
        parameter.requires_grad_(False)


def starting_policy(section: ModelSection, seed: int, policy: nn.Module, attention: Attention = "sdpa") -> nn.Module:
    """What the policy was before training, on its device: loaded once more, or the policy itself, whose adapters are to
    be switched off."""
    if section.lora:
        return policy
    return Policy(load_model(section, seed)[0].eval().to(next(policy.parameters()).device), attention)


@cache
def picture_corpus() -> list[str]:
    """Text that the tiny tokenizer is made for: questions and reasoning of the picture task."""
    rows = [picture_row("train", index, seed=12345, size=56) for index in range(1500)]
    kinds = ("question", "reasoning", "reasoning_wordy", "reasoning_hasty")
    texts = ["\n".join([*(row[kind] for kind in kinds), f"\\boxed{{{row['answer']}}}"]) for row in rows]
    return [*texts, "system\nuser\nassistant\n Think first.</think>\n\\boxed{"]


def image_token_ids(model, processor) -> list[int]:
    """Tokens that stand for pictures: a model must never write them, so engine and trainer both rule them out."""
    ids = set(getattr(processor, "image_token_ids", None) or [])
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    # InternVL's video token is known to its tokenizer alone.
    ids |= {getattr(owner, name, None) for owner in (model.config, processor.tokenizer) for name in names}
    return sorted(token for token in ids if token is not None)


def prepare_for_training(model, gradient_checkpointing: bool) -> None:
    """Training mode; memory is traded for time where the recipe says so."""
    model.train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
