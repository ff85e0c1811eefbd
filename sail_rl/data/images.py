"""Pictures in any form that a row has them, decoded upright and as RGB; `BadRow` where they cannot be."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 178_956_970  # Pillow's own bound; larger pictures are refused before they are decoded
# What Pillow raises for files that are no pictures, torn ones, and bombs; the last three of its AVIF, DDS and SPIDER
# readers, which trust a header.
IMAGE_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error),
    *(RuntimeError, ArithmeticError, AttributeError),
    Image.DecompressionBombError,
)


class BadRow(Exception):
    """A row that cannot be used; the text says why and, where it can, what to change."""


def decode_image(image: Any, folder: Path) -> Image.Image:
    """A path, bytes, `{"bytes", "path"}` or a Pillow image as an upright RGB picture."""
    name = image if isinstance(image, str) else image_path(image) or "picture"
    try:
        picture = open_image(image, folder)
        if picture.width * picture.height > MAX_PIXELS:
            raise BadRow(f"image {name} has {picture.width}x{picture.height} pixels; the limit is {MAX_PIXELS}")
        return flat_rgb(ImageOps.exif_transpose(picture))
    except IMAGE_ERRORS as error:
        raise BadRow(f"image {name} cannot be read: {error or type(error).__name__}") from None


def open_image(image: Any, folder: Path) -> Image.Image:
    """The picture with its header read; pixels are read later."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if not isinstance(image, bytes | str):
        raise BadRow(f"an image is a path, bytes or a picture, not {type(image).__name__}")
    if isinstance(image, str) and (folder / image).exists() and not (folder / image).is_file():
        raise BadRow(f"image {image} is no file")  # a pipe would be waited for
    picture = Image.open(io.BytesIO(image) if isinstance(image, bytes) else folder / image)
    if picture.format == "EPS":
        raise BadRow("an EPS picture is a program, which would be run to draw it; save it as PNG")
    return picture


def image_path(image: Any) -> str | None:
    """The path that a picture came with, if any."""
    return image.get("path") if isinstance(image, dict) else getattr(image, "filename", None) or None


def flat_rgb(picture: Image.Image) -> Image.Image:
    """As a person sees it on a white page, in RGB; raises ValueError for pixels without a known range.

    Pillow's own conversion shows the colours hidden under transparent pixels, mostly black, and clips 16 bits to white.
    """
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        bits = np.asarray(picture).astype(np.int64).clip(0, 65535)
        return Image.fromarray((bits / 257).round().astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    page = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(page, picture.convert("RGBA")).convert("RGB")
