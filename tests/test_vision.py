"""The way of a picture through tower and adapter: tiles, and pictures at their native size."""

import numpy as np
import pytest
import torch
from conftest import SMALL, SMALL_GRPO, command
from PIL import Image
from transformers import AutoProcessor
from transformers.models.internvl.modeling_internvl import InternVLModel

from sail_rl.model.load import picture_corpus
from sail_rl.model.processing_sail_vl2 import IMAGE_CONTEXT, IMAGENET_MEAN, IMAGENET_STD
from sail_rl.model.tiny import IMAGE_SIZE, tiny_model, tiny_processor
from sail_rl.model.vision import fold_patches, native_features, picture_features

pytestmark = pytest.mark.usefixtures("one_thread")
CELL = 28


@pytest.fixture(scope="module")
def model():
    model = tiny_model(tiny_processor(picture_corpus()), seed=3).model
    torch.manual_seed(0)
    model.vision_tower.embeddings.position_embedding.weight.data.normal_()
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def processor():
    processor = tiny_processor(picture_corpus())
    processor.image_processor.any_resolution = True
    return processor


def cells_of(picture_CHW):
    """The squares of a picture, row by row, cut out one at a time."""
    _, height, width = picture_CHW.shape
    corners = [(y, x) for y in range(0, height, CELL) for x in range(0, width, CELL)]
    return torch.stack([picture_CHW[:, y : y + CELL, x : x + CELL] for y, x in corners])


def features_of(model, pictures):
    cells = torch.cat([cells_of(picture) for picture in pictures])
    grids = [[picture.shape[1] // CELL, picture.shape[2] // CELL] for picture in pictures]
    return native_features(model.vision_tower, model.multi_modal_projector, cells, grids, ratio=0.5)


@pytest.mark.parametrize("size", [(4, 4), (4, 6), (8, 2)])
def test_fold_is_internvls_pixel_shuffle(size):
    patches_NHWD = torch.randn(3, *size, 5)
    theirs = InternVLModel.pixel_shuffle(None, patches_NHWD, 0.5)
    assert torch.equal(fold_patches(patches_NHWD, 2), theirs.flatten(1, 2))


def test_native_size_equals_a_tile_at_the_size_of_a_tile(model):
    picture = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE)
    vision = model.vision_tower, model.multi_modal_projector
    assert torch.equal(features_of(model, [picture])[0], picture_features(*vision, picture[None], ratio=0.5)[0])
    tile, cells = picture[None], cells_of(picture)
    grids = torch.tensor([[2, 2]])
    tiled, native = model.get_image_features(tile).pooler_output, model.get_image_features(cells, grids).pooler_output
    assert torch.equal(tiled.flatten(0, 1), native)


def test_each_picture_is_seen_as_if_alone(model):
    pictures = [torch.randn(3, *size) for size in [(28, 28), (84, 56), (28, 140), (84, 56), (112, 112)]]
    together = features_of(model, pictures)
    for picture, features in zip(pictures, together, strict=True):
        assert features.shape == (picture.shape[1] * picture.shape[2] // CELL**2, 128)
        torch.testing.assert_close(features, features_of(model, [picture])[0], rtol=1e-5, atol=1e-5)


def test_places_are_told_apart_and_tokens_are_in_reading_order(model):
    """A mark in one cell moves the features of that cell most, wherever it is."""
    plain = torch.zeros(3, 84, 140)
    for row, column in [(0, 0), (0, 4), (1, 2), (2, 0), (2, 4)]:
        marked = plain.clone()
        marked[:, row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = 2.0
        ours, theirs = features_of(model, [marked, plain])
        assert (ours - theirs).norm(dim=1).argmax() == row * 5 + column


def test_positions_are_stretched_over_the_grid(model):
    """A table that grows evenly from left to right stays so; at its own size it is used as it is."""
    embeddings = model.vision_tower.embeddings
    kept = embeddings.position_embedding.weight.data.clone()
    assert embeddings.positions(4, 4) is embeddings.position_embedding.weight
    ramp_TD = torch.arange(4.0).repeat(4)[:, None].expand(16, kept.shape[1])
    embeddings.position_embedding.weight.data.copy_(ramp_TD)
    stretched = embeddings.positions(6, 8)[:, 0].reshape(6, 8)
    embeddings.position_embedding.weight.data.copy_(kept)
    torch.testing.assert_close(stretched, stretched[:1].expand(6, 8))
    assert (stretched[0].diff() > 0).all()
    # Half-pixel centres: column 3 of 8 lies at (3 + 0.5) * 4 / 8 - 0.5 = 1.25 of the table.
    assert stretched[0, 3] == pytest.approx(1.25, abs=0.05)


def test_positions_learn_at_native_size(model):
    weight = model.vision_tower.embeddings.position_embedding.weight.requires_grad_(True)
    features_of(model, [torch.randn(3, 84, 56)])[0].sum().backward()
    assert weight.grad is not None
    assert (weight.grad.abs().sum(1) > 0).all()
    weight.grad = None
    weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("size", "grid"),  # width and height of the picture, rows and columns of cells
    [
        ((56, 56), (2, 2)),
        ((100, 60), (2, 4)),
        ((1, 1), (1, 1)),
        ((4000, 1), (1, 64)),
        ((1, 4000), (64, 1)),
        ((1792, 1792), (64, 64)),
        ((5000, 2500), (32, 64)),
        ((42, 69), (2, 2)),
    ],
)
def test_native_sizes(processor, size, grid):
    """Each side is rounded to whole cells, the longer one to 1792 pixels at most; there is a token for each cell."""
    rows, columns = grid
    picture = Image.effect_noise(size, 60).convert("RGB")
    encoded = processor(text=[IMAGE_CONTEXT], images=[picture], return_tensors="pt")
    assert encoded["image_grids"].tolist() == [[rows, columns]]
    assert encoded["pixel_values"].shape == (rows * columns, 3, CELL, CELL)
    assert (encoded["input_ids"] == processor.image_token_id).sum() == rows * columns
    (planned,) = processor._get_num_multimodal_tokens([size[::-1]]).num_image_tokens
    assert planned == encoded["input_ids"].shape[1]


def test_cells_are_the_picture(processor):
    """Nothing is scaled where each side is whole; cell by cell, in reading order."""
    picture = Image.effect_noise((84, 56), 60).convert("RGB")
    encoded = processor(text=[IMAGE_CONTEXT], images=[picture], return_tensors="pt")
    pixels_CHW = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(encoded["pixel_values"], cells_of((pixels_CHW - mean) / std), rtol=0, atol=1e-5)


def test_native_size_is_saved_with_the_processor(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    picture = Image.effect_noise((100, 60), 60).convert("RGB")
    ours, theirs = (p(text=[IMAGE_CONTEXT], images=[picture], return_tensors="pt") for p in (processor, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_generate_with_pictures_of_several_sizes(processor):
    """`generate` equals greedy steps of the whole forward pass."""
    model = tiny_model(processor, seed=3)
    pictures = [Image.effect_noise(size, 60).convert("RGB") for size in [(100, 60), (28, 28), (56, 112)]]
    encoded = processor(text=[f"{IMAGE_CONTEXT}a{IMAGE_CONTEXT}{IMAGE_CONTEXT}b"], images=pictures, return_tensors="pt")
    made = model.generate(**encoded, max_new_tokens=4, do_sample=False, eos_token_id=None)
    tokens = encoded.pop("input_ids")
    encoded.pop("attention_mask")
    for _ in range(4):
        logits = model(input_ids=tokens, **encoded).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, tokens)


def test_both_trainers_at_native_size(tmp_path):
    """Two steps each; the checkpoint keeps its way of looking."""
    sft = ("recipes/quickstart_sft.yaml", *SMALL, "model.any_resolution=true", f"output_dir={tmp_path / 'sft'}")
    grpo = (
        "recipes/quickstart.yaml",
        *SMALL_GRPO,
        f"model={tmp_path / 'sft/final'}",
        f"output_dir={tmp_path / 'grpo'}",
    )
    for script, arguments in (("sail_rl/train_sft.py", sft), ("sail_rl/train_grpo.py", grpo)):
        result = command(script, *arguments)
        assert result.returncode == 0, result.stderr
    assert AutoProcessor.from_pretrained(tmp_path / "grpo/final").image_processor.any_resolution
