"""Linear layers by oneDNN compute what torch's compute."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sail_rl.model.cpu_linear import SMALLEST, OneDnnLinear, has_zen_5, use_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def layers(bias: bool = True) -> tuple[nn.Sequential, nn.Sequential]:
    """The same two layers, by torch in float64 and by oneDNN."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(160, 192, bias), nn.GELU(), nn.Linear(192, 128, bias))
    theirs = copy.deepcopy(ours).double()
    use_onednn(ours)
    return theirs, ours


@pytest.mark.parametrize("shape", [(7, 160), (3, 5, 160), (1, 1, 160), (0, 160)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_torch(shape, bias):
    theirs, ours = layers(bias)
    inputs = torch.randn(shape)
    results = {}
    for name, model, x in (("theirs", theirs, inputs.double()), ("ours", ours, inputs.clone())):
        x.requires_grad_()
        output = model(x)
        (output * torch.arange(output.numel()).reshape(output.shape).sin()).sum().backward()
        results[name] = [output, x.grad, *(parameter.grad for parameter in model.parameters())]
    assert type(ours[0]) is OneDnnLinear
    for expected, got in zip(results["theirs"], results["ours"], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_gets_no_gradient_and_passes_one_on():
    theirs, ours = layers()
    for model in (theirs, ours):
        model[2].weight.requires_grad_(False)
    inputs = torch.randn(4, 160)
    theirs(inputs.double()).sum().backward()
    ours(inputs).sum().backward()
    assert ours[2].weight.grad is None
    torch.testing.assert_close(ours[0].weight.grad.double(), theirs[0].weight.grad, rtol=1e-5, atol=1e-5)


def test_a_column_of_a_larger_tensor_is_read_as_it_stands():
    theirs, ours = layers()
    wide = torch.randn(6, 2, 160).transpose(0, 1)
    torch.testing.assert_close(ours(wide[0]).double(), theirs(wide[0].double()), rtol=1e-5, atol=1e-5)


def test_recomputed_layers_have_the_same_gradient():
    ours = layers()[1]
    inputs = torch.randn(5, 160, requires_grad=True)
    ours(inputs).sum().backward()
    plain, inputs.grad = inputs.grad, None
    checkpoint(ours, inputs, use_reentrant=False).sum().backward()
    assert torch.equal(inputs.grad, plain)


def test_autocast_goes_the_usual_way():
    ours = layers()[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.randn(4, 160)).dtype == torch.bfloat16
    assert ours.bfloat16()(torch.randn(4, 160).bfloat16()).dtype == torch.bfloat16


def test_names_stay_and_small_layers_are_left_alone():
    model = nn.ModuleDict({"large": nn.Linear(SMALLEST, 1), "small": nn.Linear(8, 8)})
    names = list(model.state_dict())
    use_onednn(model)
    assert (type(model["large"]), type(model["small"])) == (OneDnnLinear, nn.Linear)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("vendor", "family", "expected"),
    [("AuthenticAMD", 26, True), ("AuthenticAMD", 25, False), ("GenuineIntel", 26, False)],
)
def test_only_processors_with_units_as_wide_are_meant(tmp_path, vendor, family, expected):
    description = tmp_path / "cpuinfo"
    description.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: fpu vme\n\n" * 2)
    assert has_zen_5(description) is expected


def test_a_machine_that_does_not_say_is_not_meant(tmp_path):
    assert not has_zen_5(tmp_path / "absent")
    (tmp_path / "arm").write_text("CPU implementer : 0x41\n")
    assert not has_zen_5(tmp_path / "arm")
