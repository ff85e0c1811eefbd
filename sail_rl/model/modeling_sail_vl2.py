"""SAIL-VL2 for transformers: AIMv2 tower -> pixel shuffle -> LayerNorm-MLP adapter -> Qwen3.

InternVL's classes compute the same function from the adapter on; the way of the pictures up to there is in `vision.py`.
"""

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.internvl.modeling_internvl import InternVLForConditionalGeneration, InternVLModel

from sail_rl.model.configuration_sail_vl2 import SailVL2Config
from sail_rl.model.vision import any_size_embeddings, native_features, picture_features


class SailVL2Model(InternVLModel):
    """Tower, adapter and language model, without the language-modelling head."""

    config: SailVL2Config

    def __init__(self, config: SailVL2Config):
        super().__init__(config)
        any_size_embeddings(self.vision_tower, config.vision_config)
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grids: torch.Tensor | None = None, **_: object
    ) -> BaseModelOutputWithPooling:
        """Embeddings of tiles [N, T, D] or, with `image_grids`, of pictures at their native size, joined [T, D]."""
        vision = self.vision_tower, self.multi_modal_projector
        ratio = self.config.downsample_ratio
        if image_grids is None:
            return BaseModelOutputWithPooling(pooler_output=picture_features(*vision, pixel_values, ratio))
        features = native_features(*vision, pixel_values, image_grids.tolist(), ratio)
        return BaseModelOutputWithPooling(pooler_output=torch.cat(features))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        **kwargs,
    ):
        """InternVL's forward; pictures are put in place here, as they may come with `image_grids`."""
        if pixel_values is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            features = self.get_image_features(pixel_values, image_grids).pooler_output.to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=features)
            inputs_embeds, input_ids = inputs_embeds.masked_scatter(mask, features), None
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)


class SailVL2ForConditionalGeneration(InternVLForConditionalGeneration):
    """SAIL-VL2 with its language-modelling head: what is trained, generated from and saved."""

    config: SailVL2Config

    def __init__(self, config: SailVL2Config):
        super().__init__(config)
        self.model = SailVL2Model(config)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids, image_grids: torch.Tensor | None = None, **kwargs):
        """`generate` passes the grids on together with the pictures."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return inputs | ({"image_grids": image_grids} if inputs.get("pixel_values") is not None else {})
