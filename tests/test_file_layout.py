"""Weights pushed to an engine are those of a saved checkpoint, tensor for tensor."""

import pytest
import torch
from families import FAMILIES, make_world
from safetensors.torch import load_file
from tiny_models import mixture, processor_for_questions

from sail_rl.checkpoint import full_parameters, weight_names
from sail_rl.config_data import LoraSection
from sail_rl.model.load import PARTS
from sail_rl.model.lora import add_adapters


def model_of(family):
    return mixture(processor_for_questions()) if family == "mixture" else make_world(family).model


@pytest.mark.parametrize("family", [*FAMILIES, "mixture"])
def test_names_and_tensors_are_those_of_save_pretrained(family, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path)
    saved, pushed = load_file(tmp_path / "model.safetensors"), dict(full_parameters(model))
    assert pushed.keys() == saved.keys() == weight_names(model)
    assert all(torch.equal(pushed[name], saved[name]) for name in saved)


def test_adapters_change_no_name():
    model = mixture(processor_for_questions())
    names = weight_names(model)
    assert any("experts.3.up_proj" in name for name in names)
    add_adapters(model, LoraSection(r=4), PARTS, "", seed=0)
    assert weight_names(model) == names == dict(full_parameters(model)).keys()
