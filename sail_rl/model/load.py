"""A model and its processor, as `model:` in the recipe asks for them."""

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig

import sail_rl.model  # noqa: F401  (registers SAIL-VL2 with the Auto classes)
from sail_rl.command_line import BadInput
from sail_rl.config import ModelSection
from sail_rl.data.pictures import picture_row
from sail_rl.model.released_config import is_released, released_processor
from sail_rl.model.tiny import tiny_model, tiny_processor

# Parts by their names in transformers' vision-language models (InternVL's, Qwen-VL's).
PARTS = {
    "tower": ("vision_tower", "visual.blocks", "visual.patch_embed"),
    "adapter": ("multi_modal_projector", "visual.merger"),
    "llm": ("language_model", "lm_head"),
}


def load_model(section: ModelSection, seed: int):
    """(model, processor), frozen parts frozen; a checkpoint that cannot be read is the user's mistake."""
    if section.random_init:
        processor = tiny_processor(picture_corpus(), section.max_tiles or 1)
        model = tiny_model(processor, seed).to(getattr(torch, section.dtype))
    else:
        assert section.path is not None
        model, processor = load_checkpoint(section.path, section.dtype)
        if section.max_tiles:
            processor.image_processor.max_patches = section.max_tiles
    for part in section.freeze:
        freeze(model, part)
    return model, processor


def load_checkpoint(path: str, dtype: str):
    """A transformers folder or Hub id, SAIL-VL2's released layout among them; never with remote code."""
    try:
        processor = load_processor(path)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        gist = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"model.path = {path}: the checkpoint cannot be loaded: {gist}") from error
    model, told = loaded
    missing = sorted(told["missing_keys"])  # transformers would go on with random weights
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise BadInput(f"model.path = {path}: the checkpoint lacks {', '.join(missing[:5])}{more}")
    return model, processor


def load_processor(path: str):
    """The checkpoint's processor; a released SAIL-VL2 has one in remote code only, so ours takes its place."""
    values, _ = PreTrainedConfig.get_config_dict(path)
    if is_released(values):
        return released_processor(path, values)
    return AutoProcessor.from_pretrained(path, padding_side="left")


def freeze(model, part: str) -> None:
    """Take a part out of training; a part that the model lacks is the user's mistake."""
    found = [p for name, p in model.named_parameters() if any(f"{key}." in name for key in PARTS[part])]
    if not found:
        raise BadInput(f"model.freeze = [{part}]: {type(model).__name__} has no such part")
    for parameter in found:
        parameter.requires_grad_(False)


def picture_corpus() -> list[str]:
    """Text that the tiny tokenizer is made for: questions and reasoning of the picture task."""
    rows = [picture_row("train", index, seed=12345, size=56) for index in range(1500)]
    kinds = ("question", "reasoning", "reasoning_wordy", "reasoning_hasty")
    texts = ["\n".join([*(row[kind] for kind in kinds), f"\\boxed{{{row['answer']}}}"]) for row in rows]
    return [*texts, "system\nuser\nassistant\n Think first.</think>\n\\boxed{"]


def image_token_ids(model, processor) -> list[int]:
    """Tokens that stand for pictures: a model must never write them, so engine and trainer both rule them out."""
    ids = set(getattr(processor, "image_token_ids", None) or [])
    ids |= {getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")}
    return sorted(token for token in ids if token is not None)


def prepare_for_training(model, gradient_checkpointing: bool) -> None:
    """Training mode; memory is traded for time where the recipe says so."""
    model.train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
