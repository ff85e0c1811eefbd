"""SAIL-VL2 for transformers: AIMv2 tower -> pixel shuffle -> LayerNorm-MLP adapter -> Qwen3.

InternVL's classes compute the same function; only the pixel shuffle and the configuration differ.
"""

import torch
from transformers.models.internvl.modeling_internvl import InternVLForConditionalGeneration, InternVLModel

from sail_rl.model.configuration_sail_vl2 import SailVL2Config


class SailVL2Model(InternVLModel):
    """Tower, adapter and language model, without the language-modelling head."""

    config: SailVL2Config

    def pixel_shuffle(self, vision_features: torch.Tensor, scale_factor: float = 0.5) -> torch.Tensor:
        """Fold each 2x2 block of patches into one token.

        InternVL's version needs contiguous input, which it gets by dropping a class token; AIMv2 has none.
        """
        return super().pixel_shuffle(vision_features.contiguous(), scale_factor)


class SailVL2ForConditionalGeneration(InternVLForConditionalGeneration):
    """SAIL-VL2 with its language-modelling head: what is trained, generated from and saved."""

    config: SailVL2Config

    def __init__(self, config: SailVL2Config):
        super().__init__(config)
        self.model = SailVL2Model(config)
        self.post_init()
