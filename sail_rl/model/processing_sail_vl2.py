"""SAIL-VL2's processor: dynamic tiling of pictures, image tokens found by name, ChatML with the thinking switch."""

import re
from pathlib import Path

from transformers import ProcessorMixin
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor

START_IMAGE, IMAGE_CONTEXT, END_IMAGE = "<img>", "<IMG_CONTEXT>", "</img>"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def default_chat_template() -> str:
    """The chat template of the Thinking models, as jinja text."""
    return (Path(__file__).parent / "chat_template.jinja").read_text()


def tiling_image_processor(image_size: int, max_tiles: int, min_tiles: int = 1) -> GotOcr2ImageProcessorPil:
    """Cuts a picture into square tiles of `image_size` pixels, with a thumbnail when there is more than one."""
    return GotOcr2ImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        crop_to_patches=True,
        min_patches=min_tiles,
        max_patches=max_tiles,
    )


class SailVL2Processor(InternVLProcessor):
    """InternVL's processor for a tokenizer without InternVL's extra attributes, and without video."""

    def __init__(self, image_processor=None, tokenizer=None, image_seq_length: int = 256, chat_template=None, **kwargs):
        # InternVLProcessor.__init__ reads ids from tokenizer attributes that SAIL-VL2's tokenizer lacks. Ids differ
        # between releases, so tokens are looked up by name.
        ProcessorMixin.__init__(
            self, image_processor, tokenizer, chat_template=chat_template or default_chat_template(), **kwargs
        )
        self.image_seq_length = image_seq_length
        self.start_image_token, self.image_token, self.end_image_token = START_IMAGE, IMAGE_CONTEXT, END_IMAGE
        self.start_image_token_id = tokenizer.convert_tokens_to_ids(START_IMAGE)
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
        self.end_image_token_id = tokenizer.convert_tokens_to_ids(END_IMAGE)
        self.multimodal_pattern = re.compile(f"(?P<image>{re.escape(IMAGE_CONTEXT)})")
