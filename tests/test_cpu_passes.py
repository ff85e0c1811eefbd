"""Norms and gated layers in fewer passes compute what transformers' do."""

import copy

import pytest
import torch
from families import make_world
from torch.utils.checkpoint import checkpoint
from transformers.models.aimv2.modeling_aimv2 import Aimv2RMSNorm
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from sail_rl.model.cpu_passes import use_all_passes, use_fewer_passes

WIDTH = 48


class Layers(torch.nn.Module):
    """A norm and a gated layer, as a model that has them."""

    def __init__(self, norm: type = Qwen3RMSNorm):
        super().__init__()
        torch.manual_seed(0)
        self.norm = norm(WIDTH)
        self.norm.weight.data.uniform_(-2, 2)
        self.gated = Qwen3MLP(Qwen3Config(hidden_size=WIDTH, intermediate_size=80))

    @property
    def base_model(self) -> torch.nn.Module:
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gated(self.norm(x))


def both(norm: type = Qwen3RMSNorm) -> tuple[Layers, Layers]:
    """transformers' in float64, and ours."""
    ours = Layers(norm)
    theirs = copy.deepcopy(ours).double()
    use_fewer_passes(ours)
    assert {"forward"} <= set(vars(ours.norm)) & set(vars(ours.gated))
    return theirs, ours


def results(model: Layers, x: torch.Tensor) -> list[torch.Tensor]:
    """Its outputs and all gradients."""
    x.requires_grad_()
    output = model(x)
    (output * torch.arange(output.numel(), dtype=x.dtype).reshape(output.shape).sin()).sum().backward()
    return [output, x.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("norm", [Qwen3RMSNorm, Aimv2RMSNorm])
@pytest.mark.parametrize("shape", [(7, WIDTH), (3, 5, WIDTH), (1, 2, 4, WIDTH), (0, WIDTH)])
def test_values_and_gradients_are_those_of_transformers(norm, shape):
    theirs, ours = both(norm)
    x = 3 * torch.randn(shape)
    for expected, got in zip(results(theirs, x.double()), results(ours, x.clone()), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


def test_columns_of_a_larger_tensor_are_read_as_they_stand():
    theirs, ours = both()
    x = torch.randn(2, WIDTH, 6)
    expected, got = results(theirs, x.double().transpose(1, 2)), results(ours, x.clone().transpose(1, 2))
    for theirs_part, our_part in zip(expected, got, strict=True):
        torch.testing.assert_close(our_part.double(), theirs_part, rtol=2e-5, atol=2e-5)


def test_rows_of_zeros_and_of_large_numbers_have_a_finite_gradient():
    for value in (0.0, 1e-12, 1e12):
        theirs, ours = both()
        x = torch.full((2, WIDTH), value)
        for expected, got in zip(results(theirs, x.double()), results(ours, x.clone()), strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_what_is_frozen_gets_no_gradient_and_passes_one_on():
    theirs, ours = both()
    x = torch.randn(4, WIDTH)
    for model in (theirs, ours):
        model.requires_grad_(False)
    inputs = x.double().requires_grad_(), x.clone().requires_grad_()
    for model, own in zip((theirs, ours), inputs, strict=True):
        model(own).square().sum().backward()
    torch.testing.assert_close(inputs[1].grad.double(), inputs[0].grad, rtol=2e-5, atol=2e-5)
    assert all(parameter.grad is None for parameter in ours.parameters())
    ours.norm.weight.requires_grad_(True)
    ours(x).square().sum().backward()
    assert ours.norm.weight.grad is not None


def test_without_gradient_the_values_are_the_same_to_the_bit():
    ours = both()[1]
    for x in (torch.randn(5, WIDTH), torch.randn(2, WIDTH, 6).transpose(1, 2)):
        expected = ours(x)
        with torch.no_grad():
            assert torch.equal(ours(x), expected)


def test_recomputed_layers_have_the_same_gradient():
    ours = both()[1]
    x = torch.randn(5, WIDTH, requires_grad=True)
    ours(x).sum().backward()
    plain, x.grad = x.grad, None
    checkpoint(ours, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, plain)


def test_other_types_of_number_go_the_usual_way():
    ours = both()[1]
    plain = copy.deepcopy(ours)
    use_all_passes(plain)
    assert not {"forward"} & (set(vars(plain.norm)) | set(vars(plain.gated)))
    x = torch.randn(4, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours.bfloat16()(x.bfloat16()), plain.bfloat16()(x.bfloat16()))


def test_a_compiled_layer_has_the_same_gradient():
    """torch.compile traces transformers' own: torch 2.11 took wrong gradients from ours."""
    theirs, ours = both()
    ours.compile(backend="eager", dynamic=True)
    x = torch.randn(3, 5, WIDTH)
    for expected, got in zip(results(theirs, x.double()), results(ours, x.clone()), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["tiny", "tiny_qwen3_vl", "tiny_internvl", "qwen2_5_vl"])
def test_a_model_keeps_its_log_probs_and_names(family):
    """In tower and language model, of every family; a copy computes with its own weights."""
    world = make_world(family)
    model = copy.deepcopy(world.model)
    use_all_passes(model)
    names, inputs = list(model.state_dict()), world.prompts[0].model_inputs
    tokens = {"input_ids": torch.tensor([world.prompts[0].token_ids])}
    fewer = copy.deepcopy(model)
    use_fewer_passes(fewer)
    fewer = copy.deepcopy(fewer)
    norms = [module for module in fewer.modules() if type(module).__name__.endswith("RMSNorm")]
    assert norms
    assert all(module.forward.__self__ is module for module in norms)
    assert list(fewer.state_dict()) == names
    with torch.no_grad():
        expected, found = (one.eval()(**tokens, **inputs).logits for one in (model, fewer))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
