"""The released layout of SAIL-VL2's weights, and its map to ours and back: names and tensors, nothing else.

The released models come with their own modelling code, whose names differ and whose tower fuses query, key and value.
Below the language model both layouts use Qwen3's names (of Qwen3-MoE, those of the saved files: a tensor per expert).
"""

import re
from collections.abc import Iterable, Iterator

import torch

# Released -> ours, for a whole name or its beginning up to a dot.
PREFIXES = {
    "vision_model.preprocessor.patchifier.proj": "model.vision_tower.embeddings.patch_embed",
    "vision_model.preprocessor.patchifier.norm": "model.vision_tower.embeddings.rms_norm",
    "vision_model.preprocessor.pos_embed": "model.vision_tower.embeddings.position_embedding.weight",
    "vision_model.trunk.blocks": "model.vision_tower.encoder.layers",
    "vision_model.trunk.post_trunk_norm": "model.vision_tower.rms_norm",
    "mlp1.0": "model.multi_modal_projector.layer_norm",
    "mlp1.1": "model.multi_modal_projector.linear_1",
    "mlp1.3": "model.multi_modal_projector.linear_2",  # mlp1.2 is the GELU
    "language_model.model": "model.language_model",
    "language_model.lm_head": "lm_head",
}
# Released -> ours, inside a block of the tower.
BLOCK_PARTS = {
    "attn.proj": "attention.out_proj",
    "mlp.fc1": "ffn.gate_proj",
    "mlp.fc3": "ffn.up_proj",
    "mlp.fc2": "ffn.down_proj",
    "norm_1": "rms_norm1",
    "norm_2": "rms_norm2",
}
FUSED, APART = "attn.qkv", ("attention.q_proj", "attention.k_proj", "attention.v_proj")
POSITIONS = "vision_model.preprocessor.pos_embed"

RELEASED_BLOCK, NATIVE_BLOCK = (
    r"(vision_model\.trunk\.blocks\.\d+)\.(.+)",
    r"(model\.vision_tower\.encoder\.layers\.\d+)\.(.+)",
)
NATIVE_PREFIXES = {ours: released for released, ours in PREFIXES.items()}
NATIVE_BLOCK_PARTS = {ours: released for released, ours in BLOCK_PARTS.items()} | dict.fromkeys(APART, FUSED)


def native_keys(released: str) -> list[str]:
    """Our name or, of a fused tensor, names for a released one; KeyError when the released models have no such name."""
    match = re.fullmatch(RELEASED_BLOCK, released)
    if not match:
        return [swap_prefix(released, PREFIXES)]
    block, inside = match.groups()
    tables = [{FUSED: part} for part in APART] if is_fused(released) else [BLOCK_PARTS]
    return [f"{swap_prefix(block, PREFIXES)}.{swap_prefix(inside, table)}" for table in tables]


def released_key(native: str) -> str:
    """The released name of the tensor that holds ours; KeyError when the released models have none."""
    match = re.fullmatch(NATIVE_BLOCK, native)
    if not match:
        return swap_prefix(native, NATIVE_PREFIXES)
    block, inside = match.groups()
    return f"{swap_prefix(block, NATIVE_PREFIXES)}.{swap_prefix(inside, NATIVE_BLOCK_PARTS)}"


def swap_prefix(name: str, table: dict[str, str]) -> str:
    """The name with its beginning replaced as the table says."""
    for old, new in table.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    raise KeyError(name)


def is_fused(released: str) -> bool:
    """Whether a released tensor holds query, key and value of a block of the tower."""
    return bool(re.fullmatch(RELEASED_BLOCK, released)) and f".{FUSED}." in released


def to_native(released: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Our tensors for a released one, in the order of `native_keys`."""
    if is_fused(released):
        return list(tensor.chunk(len(APART)))
    return [tensor.squeeze(0)] if released == POSITIONS else [tensor]


def to_released(released: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The released tensor for ours, given in the order of `native_keys`."""
    if is_fused(released):
        return torch.cat(tensors)
    return tensors[0].unsqueeze(0) if released == POSITIONS else tensors[0]


def with_native_names(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights under our names, whichever layout they come in."""
    released_roots = {released.split(".")[0] for released in PREFIXES}
    for name, tensor in weights:
        if name.split(".")[0] in released_roots:
            yield from zip(native_keys(name), to_native(name, tensor), strict=True)
        else:
            yield name, tensor
