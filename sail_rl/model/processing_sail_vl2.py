"""SAIL-VL2's processor: dynamic tiling of pictures, image tokens found by name, ChatML with the thinking switch."""

import re
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import SizeDict
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorKwargs,
    GotOcr2ImageProcessorPil,
)
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.processing_utils import MultiModalData

from sail_rl.data.images import flat_rgb
from sail_rl.model.any_resolution import CELL, cut_cells, native_grid

START_IMAGE, IMAGE_CONTEXT, END_IMAGE = "<img>", "<IMG_CONTEXT>", "</img>"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def default_chat_template() -> str:
    """The chat template of the Thinking models, as jinja text."""
    return (Path(__file__).parent / "chat_template.jinja").read_text()


class SailVL2ImageProcessorKwargs(GotOcr2ImageProcessorKwargs, total=False):  # type: ignore[call-arg]
    """Settings of the image processor, saved with it."""

    any_resolution: bool
    largest_side: int


class SailVL2ImageProcessor(GotOcr2ImageProcessorPil):
    """Cuts tiles or, with `any_resolution`, takes pictures at their native size up to `largest_side`.

    With Pillow, also where torchvision is installed: a run gives the same pixels everywhere.
    """

    valid_kwargs = SailVL2ImageProcessorKwargs
    any_resolution = False
    largest_side = 1792

    def _preprocess(self, images: list[np.ndarray], any_resolution: bool, largest_side: int, **kwargs) -> BatchFeature:
        if not any_resolution:
            return super()._preprocess(images, **kwargs)
        grids = [native_grid(image.shape[-2], image.shape[-1], largest_side) for image in images]
        parts = []
        for image, (rows, columns) in zip(images, grids, strict=True):
            size = SizeDict(height=rows * CELL, width=columns * CELL)
            whole = super()._preprocess([image], **kwargs | {"size": size, "crop_to_patches": False})
            parts.append(cut_cells(np.asarray(whole["pixel_values"][0])))
        data = {"pixel_values": np.concatenate(parts), "num_patches": list(map(len, parts)), "image_grids": grids}
        return BatchFeature(data, tensor_type=kwargs["return_tensors"])

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Tiles (or cells) of a picture of this size."""
        if not self.any_resolution:
            return super().get_number_of_image_patches(height, width, images_kwargs)
        rows, columns = native_grid(height, width, self.largest_side)
        return rows * columns

    def convert_to_rgb(self, image):
        """Transparent pictures on white; engines hand over pictures as they come."""
        return flat_rgb(image) if isinstance(image, Image.Image) else image


def tiling_image_processor(image_size: int, max_tiles: int, min_tiles: int = 1) -> SailVL2ImageProcessor:
    """Cuts a picture into square tiles of `image_size` pixels, with a thumbnail when there is more than one."""
    return SailVL2ImageProcessor(
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

    def image_tokens(self, num_patches: int) -> int:
        """Tokens of a picture of so many tiles; of a picture at its native size, each cell is one."""
        return num_patches * (1 if self.image_processor.any_resolution else self.image_seq_length)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **_) -> str:
        """What stands in the text for a picture."""
        tokens = self.image_tokens(image_inputs["num_patches"][image_idx])
        return f"{START_IMAGE}{IMAGE_CONTEXT * tokens}{END_IMAGE}"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """A saved processor; a released SAIL-VL2 has one in remote code only, so ours is made for its tokenizer."""
        from sail_rl.model.released_config import released_processor, released_values

        released = released_values(pretrained_model_name_or_path)
        if released:
            return released_processor(pretrained_model_name_or_path, released)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Tokens and tiles of pictures of these (height, width), for engines that plan ahead.

        InternVL's own would keep the keyword arguments of one call for all later calls, of every model.
        """
        if image_sizes is None:
            return MultiModalData()
        tiles = [self.image_processor.get_number_of_image_patches(*size, kwargs) for size in image_sizes]
        tokens = [len((START_IMAGE, END_IMAGE)) + self.image_tokens(count) for count in tiles]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=tiles)
