"""SAIL-VL2 for vLLM: transformers' tower and adapter, vLLM's own Qwen3 or Qwen3-MoE.

The tower and the adapter are the trainer's very classes, so engine and trainer see the same picture; they are a small
part of the work, and every tensor-parallel process computes them whole.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionModel
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from sail_rl.model.processing_sail_vl2 import IMAGE_CONTEXT
from sail_rl.model.released import with_native_names
from sail_rl.model.released_config import LANGUAGE_MODELS
from sail_rl.model.vision import any_size_embeddings, native_features, picture_features
from sail_rl.model.vllm_processing import SailVL2DummyInputs, SailVL2MultiModalProcessor, SailVL2ProcessingInfo


@MULTIMODAL_REGISTRY.register_processor(
    SailVL2MultiModalProcessor, info=SailVL2ProcessingInfo, dummy_inputs=SailVL2DummyInputs
)
class SailVL2ForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """What vLLM runs for a checkpoint in our layout or in the released one."""

    # Tensors that vLLM's Qwen3 keeps as one; LoRA adapters are packed likewise.
    packed_modules_mapping = {  # noqa: RUF012
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.vision_tower.": "vision_tower.",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for a picture in a chat whose template does not place pictures."""
        if modality == "image":
            return IMAGE_CONTEXT
        raise ValueError(f"SAIL-VL2 reads pictures, not {modality}; send a video as its frames")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        text_config = config.text_config
        text_config.tie_word_embeddings = config.tie_word_embeddings
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            tower = Aimv2VisionModel._from_config(config.vision_config)
            self.vision_tower = any_size_embeddings(tower, config.vision_config)
            self.multi_modal_projector = InternVLMultiModalProjector(config)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text_config,
                architectures=[LANGUAGE_MODELS[text_config.model_type]],
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(
        self,
        pixel_values: torch.Tensor | None = None,
        num_patches: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        **_: object,
    ) -> MultiModalEmbeddings:
        """One [tokens, width] tensor per picture, from the tiles (or cells) of all pictures."""
        if pixel_values is None or num_patches is None:
            return []
        vision, ratio = (self.vision_tower, self.multi_modal_projector), self.config.downsample_ratio
        if image_grids is not None:
            return native_features(*vision, pixel_values, image_grids.tolist(), ratio)
        features = picture_features(*vision, pixel_values, ratio)
        return [picture.flatten(0, 1) for picture in features.split(num_patches.tolist())]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor | IntermediateTensors:
        """Hidden states of the language model."""
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits of the next token."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take weights under our names or the released ones."""
        return AutoWeightsLoader(self).load_weights(with_native_names(weights), mapper=self.hf_to_vllm_mapper)

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which part is which, for LoRA."""
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="multi_modal_projector", tower_model="vision_tower"
        )
