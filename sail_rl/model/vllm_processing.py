"""How vLLM reads pictures for SAIL-VL2: our processor's tiles, and the image tokens that stand for them."""

from collections.abc import Mapping, Sequence

import torch
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageSize, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)

from sail_rl.model.processing_sail_vl2 import SailVL2Processor


class SailVL2ProcessingInfo(BaseProcessingInfo):
    """What vLLM asks before it has seen a picture."""

    def get_hf_processor(self, **kwargs: object) -> SailVL2Processor:
        return self.ctx.get_hf_processor(SailVL2Processor, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_image_size_with_most_features(self) -> ImageSize:
        """A row of as many tiles as there may be, or a square of the largest native size."""
        image_processor = self.get_hf_processor().image_processor
        if image_processor.any_resolution:
            return ImageSize(width=image_processor.largest_side, height=image_processor.largest_side)
        side = image_processor.size["height"]
        return ImageSize(width=side * image_processor.max_patches, height=side)


class SailVL2DummyInputs(BaseDummyInputsBuilder[SailVL2ProcessingInfo]):
    """The largest request, by which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        size, count = self.info.get_image_size_with_most_features(), mm_counts.get("image", 0)
        overrides = mm_options.get("image")
        images = self._get_dummy_images(width=size.width, height=size.height, num_images=count, overrides=overrides)
        return {"image": images}


class SailVL2MultiModalProcessor(BaseMultiModalProcessor[SailVL2ProcessingInfo]):
    """Pictures to tiles, and each placeholder to as many image tokens as its picture has features."""

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        # The image processor alone: unlike the whole processor it says how many tiles each picture got.
        image_processor = self.info.get_hf_processor(**hf_kwargs).image_processor
        return self.info.ctx.call_hf_processor(image_processor, hf_data, hf_kwargs)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        num_patches = hf_inputs.get("num_patches", torch.empty(0))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", num_patches),
            "num_patches": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "image_grids": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        processor = self.info.get_hf_processor(**hf_processor_mm_kwargs)
        image_token_id = processor.image_token_id

        def image_tokens(picture: int) -> PromptUpdateDetails:
            num_patches = int(out_mm_kwargs["image"][picture]["num_patches"].data)
            features = [image_token_id] * processor.image_tokens(num_patches)
            token_ids = [processor.start_image_token_id, *features, processor.end_image_token_id]
            return PromptUpdateDetails.select_token_id(token_ids, image_token_id)

        return [PromptReplacement(modality="image", target=[image_token_id], replacement=image_tokens)]
