"""What a saved SAIL-VL2 checkpoint holds, asked of the model class itself on the meta device."""

import torch
from transformers.core_model_loading import revert_weight_conversion

from sail_rl.model.configuration_sail_vl2 import SailVL2Config
from sail_rl.model.modeling_sail_vl2 import SailVL2ForConditionalGeneration


def native_weights(config: SailVL2Config) -> dict[str, torch.Tensor]:
    """Every tensor that `save_pretrained` writes, without data: a tied head left out, experts one by one."""
    with torch.device("meta"):
        model = SailVL2ForConditionalGeneration(config)
    weights = model.state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return revert_weight_conversion(model, weights)
