"""SAIL-VL2's configuration: InternVL's, with an AIMv2 tower and a Qwen3 language model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.aimv2.configuration_aimv2 import Aimv2VisionConfig
from transformers.models.internvl.configuration_internvl import InternVLConfig


@strict
class SailVL2Config(InternVLConfig):
    """The same keys as InternVLConfig; `vision_config` stays an AIMv2 one when a checkpoint is loaded again."""

    model_type = "sail_vl2"
    sub_configs = {"text_config": AutoConfig, "vision_config": Aimv2VisionConfig}  # noqa: RUF012

    vision_config: Any = None
    text_config: Any = None
    vision_feature_select_strategy: str = "full"  # AIMv2 has no class token to drop
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = Aimv2VisionConfig(**{"use_head": False, **(self.vision_config or {})})
        if not isinstance(self.text_config, PreTrainedConfig):
            text_config = dict(self.text_config or {})
            self.text_config = AutoConfig.for_model(text_config.pop("model_type", "qwen3"), **text_config)
        # InternVLConfig.__post_init__ would build InternVL's own tower from these.
        PreTrainedConfig.__post_init__(self, **kwargs)
