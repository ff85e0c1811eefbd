"""The sizes of a recipe's model: read off its configuration and a model without memory (torch's meta device)."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

import sail_rl.model  # noqa: F401  (registers SAIL-VL2 with the Auto classes)
from sail_rl.command_line import BadInput
from sail_rl.config_data import ModelSection
from sail_rl.flops import ModelCost, Shape, model_cost
from sail_rl.model.parts import PARTS, part_of
from sail_rl.model.sizes import sail_vl2_config

TILE_SIDE = 448  # of a picture in place of a tile, where a family cuts none
GATED_TOWERS = ("aimv2", "qwen2_5_vl")


@dataclass(frozen=True)
class Layers:
    """A stack of equal layers, as far as its memory goes."""

    count: int
    hidden: int
    queries: int
    keys: int
    """Width of the keys; the values have the same."""
    inner: int
    """Of the feed-forward part that a token goes through."""
    gated: bool
    rotated: bool
    """Queries and keys are normed and rotated: a few more copies of them."""
    weights: int
    """Of all layers."""


@dataclass(frozen=True)
class Sizes:
    """A model as the formulas need it."""

    origin: str
    parts: dict[str, int]
    """Weights of tower, adapter and llm."""
    trained: dict[str, int]
    """Those of them that are trained; adapters count with the part that they are in."""
    adapters: int
    """LoRA's, of all parts."""
    matrices: int
    """Weights that autocast makes a copy of."""
    tower: Layers
    llm: Layers
    vocabulary: int
    tile_patches: int
    tile_tokens: int
    cost: ModelCost

    @property
    def weights(self) -> int:
        return sum(self.parts.values()) + self.adapters

    @property
    def all_trained(self) -> int:
        return sum(self.trained.values())

    def shape(self, prompt: int, tiles: int, lengths: tuple[int, ...]) -> Shape:
        """A group whose prompt has so many tiles."""
        return Shape((self.tile_patches,) * tiles, self.tile_tokens * tiles, prompt, lengths)


def sizes_of(section: ModelSection) -> Sizes:
    """Of the model that a recipe names; nothing is downloaded."""
    return sizes_of_config(*find_config(section), section)


def sizes_of_config(config: Any, origin: str, section: ModelSection) -> Sizes:
    """The same of a configuration, with the parts frozen that the recipe freezes."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    before = dict.fromkeys(PARTS, 0)
    for name, weight in model.named_parameters():
        before[part_of(name)] += weight.numel()
    matrices = sum(
        weight.numel()
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
        if weight.ndim >= 2
    )
    freeze_parts(model, section)
    trained = dict.fromkeys(PARTS, 0)
    for name, weight in model.named_parameters():
        trained[part_of(name)] += weight.numel() * weight.requires_grad
    vision = config.vision_config
    side, patch = (value[0] if isinstance(value, list | tuple) else value for value in sides(vision))
    patches = (side // patch) ** 2
    return Sizes(
        origin=origin,
        parts=before,
        trained=trained,
        adapters=sum(trained.values()) if section.lora else 0,
        matrices=matrices,
        tower=tower_layers(vision, before["tower"]),
        llm=text_layers(config.get_text_config(), before["llm"]),
        vocabulary=config.get_text_config().vocab_size,
        tile_patches=patches,
        tile_tokens=getattr(config, "image_seq_length", None) or patches // vision.spatial_merge_size**2,
        cost=model_cost(model),
    )


def find_config(section: ModelSection) -> tuple[Any, str]:
    """The configuration, and where it is from."""
    if section.random_init:
        from sail_rl.model.load import TINY, picture_corpus

        make_processor, make_model = TINY[section.random_init]
        return make_model(make_processor(picture_corpus()), 0).config, f"random_init: {section.random_init}"
    path = str(section.path)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True), path
    except (OSError, ValueError, KeyError) as error:
        known = re.search(r"SAIL-VL2?-?(2B|8B|A3B)", path.split("/")[-1], re.IGNORECASE)
        if known:
            return sail_vl2_config(known[1].lower()), f"{path}, which is not here: the published sizes"
        gist = str(error).strip().splitlines()[0]
        raise BadInput(
            f"model.path = {path}: there is no configuration on this machine ({gist}); name a folder with its "
            f"config.json, or fetch that one file with: hf download {path} config.json"
        ) from error


def freeze_parts(model: Any, section: ModelSection) -> None:
    """As load_model does, without weights."""
    if section.lora:
        from sail_rl.model.lora import add_adapters

        add_adapters(model, section.lora, PARTS, "", seed=0)
    for name, weight in model.named_parameters():
        if part_of(name) in section.freeze:
            weight.requires_grad_(False)


def sides(vision: Any) -> tuple[Any, Any]:
    """Pixels of a tile and of a patch."""
    return getattr(vision, "image_size", None) or TILE_SIDE, vision.patch_size


def tower_layers(vision: Any, weights: int) -> Layers:
    """Of any family's tower."""
    count, hidden = getattr(vision, "depth", None) or vision.num_hidden_layers, vision.hidden_size
    gated = any(vision.model_type.startswith(kind) for kind in GATED_TOWERS)
    return Layers(count, hidden, hidden, hidden, vision.intermediate_size, gated, rotated=False, weights=weights)


def text_layers(text: Any, weights: int) -> Layers:
    """Of a Qwen's; of a mixture, the experts that a token goes through."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    inner = text.intermediate_size
    if "moe" in text.model_type:
        inner = text.moe_intermediate_size * text.num_experts_per_tok
    widths = text.num_attention_heads * head, text.num_key_value_heads * head
    weights -= 2 * text.hidden_size * text.vocab_size  # table and head
    return Layers(text.num_hidden_layers, text.hidden_size, *widths, inner, True, "qwen3" in text.model_type, weights)
