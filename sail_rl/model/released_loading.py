"""Loading a released SAIL-VL2 folder with `from_pretrained`: the map of `released.py` as transformers' conversions.

The conversions go one way. A model saves under our names whatever it was loaded from, so that config.json and weights
of a trained checkpoint agree; `sail-rl convert` is the way back.
"""

import re
from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter, WeightRenaming

from sail_rl.model.configuration_sail_vl2 import SailVL2Config
from sail_rl.model.released import APART, BLOCK_PARTS, FUSED, POSITIONS, PREFIXES

NOTHING = WeightRenaming(r"(?!)", "")  # matches no name


class OneWayRenaming(WeightRenaming):
    """A renaming that saving does not undo."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        return NOTHING


class OneWayConverter(WeightConverter):
    """A conversion that saving does not undo."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        return NOTHING


class DropBatchAxis(ConversionOps):
    """[1, patches, width] -> [patches, width]."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs
    ) -> dict[str, Any]:
        (tensors,) = input_dict.values()
        tensor: torch.Tensor = tensors[0] if isinstance(tensors, list) else tensors
        return {target_patterns[0]: tensor.squeeze(0)}


def conversions() -> list[WeightRenaming | WeightConverter]:
    """Renamings first, each on what the one before left; then the two tensors that change their form."""
    whole = {released: ours for released, ours in PREFIXES.items() if released != POSITIONS}
    renamings = {rf"^{re.escape(released)}\.": f"{ours}." for released, ours in whole.items()}
    renamings |= {rf"\.{re.escape(released)}\.": f".{ours}." for released, ours in BLOCK_PARTS.items()}
    fused = OneWayConverter(
        rf"\.{re.escape(FUSED)}\.weight$", [f".{part}.weight" for part in APART], operations=[Chunk(dim=0)]
    )
    positions = OneWayConverter(rf"^{re.escape(POSITIONS)}$", PREFIXES[POSITIONS], operations=[DropBatchAxis()])
    return [*(OneWayRenaming(old, new) for old, new in renamings.items()), fused, positions]


def register() -> None:
    """Let `from_pretrained` read released names; ours pass through untouched."""
    register_checkpoint_conversion_mapping(SailVL2Config.model_type, conversions(), overwrite=True)
