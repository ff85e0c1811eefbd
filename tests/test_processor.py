"""The processor: tiles by the published rule, on any picture, with and without torchvision."""

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available

from sail_rl.command_line import BadInput
from sail_rl.config_data import ModelSection
from sail_rl.data.images import BadRow, decode_image
from sail_rl.model import SailVL2ImageProcessor, SailVL2Processor
from sail_rl.model.load import set_tiles
from sail_rl.model.processing_sail_vl2 import tiling_image_processor
from sail_rl.model.tiny import tiny_tokenizer

TILE, TOKENS = 448, 256
MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
CORPUS = ["What is it? Think first. user assistant system Frame"] * 3
EXTREMES = [(1, 4000), (4000, 1), (1, 1), (3, 5), (2, 900), (800, 600), (3000, 2000)]


@pytest.fixture(scope="module")
def processor():
    return SailVL2Processor(tiling_image_processor(TILE, 12), tiny_tokenizer(CORPUS), TOKENS)


def picture(size, mode="RGB"):
    """Gradients with an edge, so that turned, shifted or swapped tiles differ."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([x, y, np.where(x > y, 255, 30)], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def grid_by_rule(width, height, fewest, most):
    """(columns, rows): the closest aspect ratio; among equals the larger while the picture fills half of it."""
    grids = [(c, r) for c, r in itertools.product(range(1, most + 1), repeat=2) if fewest <= c * r <= most]
    distance = min(abs(width / height - c / r) for c, r in grids)
    closest = sorted((c * r, c, r) for c, r in grids if abs(width / height - c / r) == distance)
    filled = [(area, c, r) for area, c, r in closest if 2 * width * height > area * TILE**2]
    return (filled or closest[:1])[-1][1:]


def tiles_by_rule(image, fewest, most):
    """Pixels 0..1 [tiles, height, width, 3]: row by row, and the whole picture last where there is more than one."""
    columns, rows = grid_by_rule(*image.size, fewest, most)
    canvas = image.resize((columns * TILE, rows * TILE), Image.Resampling.BICUBIC)
    corners = [(column * TILE, row * TILE) for row in range(rows) for column in range(columns)]
    tiles = [canvas.crop((x, y, x + TILE, y + TILE)) for x, y in corners]
    if len(tiles) > 1:
        tiles.append(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
    return np.stack([np.asarray(tile) for tile in tiles]) / 255


def encode(processor, image):
    """(tokens, pixels 0..1 [tiles, height, width, 3]) of a prompt with one picture."""
    encoded = processor(text=["<IMG_CONTEXT>\nWhat is it?"], images=[image], return_tensors="pt")
    return encoded["input_ids"][0].tolist(), encoded["pixel_values"].numpy().transpose(0, 2, 3, 1) * STD + MEAN


@pytest.mark.parametrize(("fewest", "most"), [(1, 12), (1, 1), (2, 6), (4, 4), (1, 24)])
def test_the_number_of_tiles_follows_the_rule(fewest, most):
    image_processor = tiling_image_processor(TILE, most, fewest)
    draw = random.Random(most)
    sizes = [tuple(int(2 ** draw.uniform(0, 13)) for _ in range(2)) for _ in range(500)]
    sizes += [(side * c, side * r) for side in (40, 448, 1344) for c in range(1, 7) for r in range(1, 7)]
    for width, height in [*sizes, *EXTREMES]:
        columns, rows = grid_by_rule(width, height, fewest, most)
        expected = columns * rows + (columns * rows > 1)
        assert image_processor.get_number_of_image_patches(height, width) == expected, (width, height)


@pytest.mark.parametrize("size", EXTREMES)
def test_tiles_tokens_and_pixels(processor, size):
    image = picture(size)
    token_ids, pixels = encode(processor, image)
    expected = tiles_by_rule(image, 1, 12)
    assert pixels.shape == expected.shape
    np.testing.assert_allclose(pixels, expected, atol=1e-5)
    convert = processor.tokenizer.convert_tokens_to_ids
    block = [convert("<img>"), *[convert("<IMG_CONTEXT>")] * TOKENS * len(expected), convert("</img>")]
    assert token_ids[: len(block)] == block
    assert convert("<IMG_CONTEXT>") not in token_ids[len(block) :]
    planned = processor._get_num_multimodal_tokens([(size[1], size[0])])
    assert (planned["num_image_tokens"], planned["num_image_patches"]) == ([len(block)], [len(expected)])
    again_ids, again = encode(processor, image)
    assert (again_ids, again.tobytes()) == (token_ids, pixels.tobytes())


def test_planning_with_other_limits_leaves_the_next_call_alone(processor):
    assert processor._get_num_multimodal_tokens([(600, 800)], max_patches=4)["num_image_patches"] == [2 * 2 + 1]
    assert processor._get_num_multimodal_tokens([(600, 800)])["num_image_patches"] == [4 * 3 + 1]
    assert processor._get_num_multimodal_tokens()["num_image_tokens"] is None


def test_a_huge_picture_is_cut_into_tiles(processor):
    _, pixels = encode(processor, Image.new("RGB", (12_000, 9_000), (255, 0, 0)))
    assert pixels.shape == (13, TILE, TILE, 3)
    np.testing.assert_allclose(pixels, np.broadcast_to((1.0, 0.0, 0.0), pixels.shape), atol=1e-5)


WITHOUT_TORCHVISION = """
import sys
sys.modules["torchvision"] = None  # importing it fails, and transformers finds it missing
from pathlib import Path
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available
import sail_rl.model
assert not is_torchvision_available()
folder = Path(sys.argv[1])
images = [Image.open(file) for file in sorted(folder.glob("*.png"))]
encoded = AutoProcessor.from_pretrained(folder)(text=["<IMG_CONTEXT>\\n" * 3], images=images, return_tensors="pt")
save_file(dict(encoded), folder / "encoded.safetensors")
"""


def test_the_same_with_and_without_torchvision(processor, tmp_path):
    assert is_torchvision_available()
    images = [picture(size) for size in ((1, 4000), (317, 211), (1000, 400))]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    processor.save_pretrained(tmp_path)
    command = [sys.executable, "-c", WITHOUT_TORCHVISION, tmp_path]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    without = load_file(tmp_path / "encoded.safetensors")
    having = AutoProcessor.from_pretrained(tmp_path)(text=["<IMG_CONTEXT>\n" * 3], images=images, return_tensors="pt")
    assert without.keys() == having.keys()
    assert all(torch.equal(without[name], having[name]) for name in without)


def test_a_saved_processor_loads_as_it_was(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    token_ids, pixels = encode(processor, picture((500, 300)))
    for loaded in (AutoProcessor.from_pretrained(tmp_path), SailVL2Processor.from_pretrained(tmp_path)):
        assert type(loaded.image_processor) is SailVL2ImageProcessor
        loaded_ids, loaded_pixels = encode(loaded, picture((500, 300)))
        assert (loaded_ids, loaded_pixels.tobytes()) == (token_ids, pixels.tobytes())


def test_torchvisions_tiles_are_ours(processor):
    """The class that transformers would choose: an independent resize, at most one step of 255 away without noise."""
    from transformers import GotOcr2ImageProcessor

    settings = {key: value for key, value in processor.image_processor.to_dict().items() if "type" not in key}
    theirs = SailVL2Processor(GotOcr2ImageProcessor(**settings), processor.tokenizer, TOKENS)
    for size in ((4000, 1), (800, 600), (317, 211)):
        (our_ids, our_pixels), (their_ids, their_pixels) = (encode(p, picture(size)) for p in (processor, theirs))
        assert our_ids == their_ids
        np.testing.assert_allclose(our_pixels, their_pixels, atol=1.01 / 255)


def two_halves(mode):
    """Left half opaque red, right half transparent: over black where the mode has colours there."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 4))
    if mode != "P":
        return image.convert(mode)
    indexed = Image.new("P", (8, 4), 1)
    indexed.putpalette([255, 0, 0, 10, 20, 30])
    indexed.paste(0, (0, 0, 4, 4))
    indexed.info["transparency"] = 1
    return indexed


@pytest.mark.parametrize(("mode", "left"), [("RGBA", (255, 0, 0)), ("P", (255, 0, 0)), ("LA", (76, 76, 76))])
def test_transparent_pictures_are_on_white(processor, tmp_path, mode, left):
    two_halves(mode).save(tmp_path / "a.png")
    for source in ("a.png", two_halves(mode)):
        decoded = decode_image(source, tmp_path)
        assert (decoded.mode, decoded.size) == ("RGB", (8, 4))
        assert (decoded.getpixel((1, 1)), decoded.getpixel((6, 1))) == (left, (255, 255, 255))
    _, raw = encode(processor, two_halves(mode))
    _, flat = encode(processor, decoded)
    assert raw.tobytes() == flat.tobytes()


def sixteen_bits(mode):
    return Image.fromarray(np.array([[0, 65535, 32896]], dtype={"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
@pytest.mark.fault(
    fault="image: 16 bits",
    injected="I;16 and I",
    expected="scaled to 8 bits",
)
def test_sixteen_bits_are_scaled_and_not_clipped(processor, mode):
    image = sixteen_bits(mode)
    assert image.mode == mode
    assert [decode_image(image, None).getpixel((x, 0))[0] for x in range(3)] == [0, 255, 128]
    assert encode(processor, image)[1].tobytes() == encode(processor, decode_image(image, None))[1].tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_seen_as_they_look(processor, mode):
    image = Image.new("RGB", (6, 6), "white")
    image.paste("black", (0, 0, 6, 3))
    decoded = decode_image(image.convert(mode), None)
    assert (decoded.mode, decoded.tobytes()) == ("RGB", image.tobytes())
    assert encode(processor, image.convert(mode))[1].tobytes() == encode(processor, image)[1].tobytes()


@pytest.mark.fault(
    fault="image: floating-point pixels",
    injected="mode F",
    expected="refused with the reason",
)
def test_floating_point_pixels_are_refused():
    with pytest.raises(BadRow, match="floating-point numbers of unknown range; save it with 8 or 16 bits"):
        decode_image(Image.new("F", (4, 4)), None)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.fault(
    fault="image: EXIF orientation",
    injected="orientations 1 to 8",
    expected="turned",
)
def test_every_orientation_of_a_camera_becomes_upright(tmp_path, orientation):
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("red", (0, 0, 16, 8))  # a red corner at the top left
    turned = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if turned is None else upright.transpose(turned)
    stored.save(tmp_path / "a.png", exif=exif)
    assert decode_image("a.png", tmp_path).tobytes() == upright.tobytes()


@pytest.mark.parametrize(("low", "high", "expected"), [(None, 4, (1, 4)), (2, None, (2, 12)), (3, 3, (3, 3))])
def test_the_recipe_sets_the_range_of_tiles(low, high, expected):
    image_processor = tiling_image_processor(TILE, 12)
    set_tiles(image_processor, ModelSection(path="x", min_tiles=low, max_tiles=high))
    assert (image_processor.min_patches, image_processor.max_patches) == expected


def test_a_range_of_tiles_that_cannot_be():
    with pytest.raises(ValueError, match="`min_tiles` = 5 is more than `max_tiles` = 4"):
        ModelSection(path="x", min_tiles=5, max_tiles=4)
    with pytest.raises(BadInput, match="min_tiles = 13 is more than max_tiles = 12, which the checkpoint has"):
        set_tiles(tiling_image_processor(TILE, 12), ModelSection(path="x", min_tiles=13))
    with pytest.raises(BadInput, match="cuts no tiles"):
        set_tiles(object(), ModelSection(path="x", max_tiles=4))
