"""Matrix products of linear layers by oneDNN, on processors where it is faster than the MKL that torch calls.

MKL keeps its widest instructions (AVX-512) for Intel's processors; oneDNN, which torch has too, uses them on AMD's as
well. Since Zen 5 these have units as wide, and compute the same float32 products in half of the time; before it nothing
is gained. torch offers no setting for it. Suffixes: _R rows, _I inputs, _O outputs.
"""

from pathlib import Path

import torch
from torch import nn

ZEN_5 = 26  # as Linux numbers AMD's families of processors
SMALLEST = 128 * 128  # weights: below it the call costs more than the product gains


class OneDnnLinear(nn.Linear):
    """A linear layer that is changed in nothing but who multiplies."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As nn.Linear; a GPU, autocast, no rows and other types of number go the usual way."""
        usual = input.device.type != "cpu" or not input.numel() or torch.is_autocast_enabled("cpu")
        if usual or not input.dtype == self.weight.dtype == torch.float32:
            return super().forward(input)
        if not torch.is_grad_enabled():  # a token that is written is hundreds of small products: no call too many
            return product(input, self.weight, self.bias)
        output_RO = Product.apply(input.flatten(0, -2), self.weight, self.bias)
        return output_RO.unflatten(0, input.shape[:-1])


class Product(torch.autograd.Function):
    """inputs @ weight.T + bias."""

    @staticmethod
    def forward(ctx, input_RI, weight_OI, bias_O):
        """The operator has no gradient of its own."""
        ctx.save_for_backward(input_RI, weight_OI)
        return product(input_RI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx, *gradients):
        """Both products of the chain rule; those that nobody asks for are left out."""
        (gradient_RO,) = gradients
        input_RI, weight_OI = ctx.saved_tensors
        for_input, for_weight, for_bias = ctx.needs_input_grad
        return (
            product(gradient_RO, weight_OI.t()) if for_input else None,
            product(gradient_RO.t(), input_RI.t()) if for_weight else None,
            gradient_RO.sum(0) if for_bias else None,
        )


def product(left_RI: torch.Tensor, right_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """left @ right.T + bias, by the operator that torch's own compiler uses on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(left_RI, right_OI, bias_O, "none", [], "")


def is_faster_here() -> bool:
    """Told by the processor, not by timing: a run that goes on must compute as it did before."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512" and has_zen_5()


def has_zen_5(description: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this is a processor of AMD's, from that family on."""
    try:
        lines = (line.partition(":") for line in description.read_text().splitlines())
    except OSError:  # no Linux
        return False
    about = {name.strip(): value.strip() for name, _, value in lines}
    return about.get("vendor_id") == "AuthenticAMD" and int(about.get("cpu family", 0)) >= ZEN_5


def use_onednn(model: nn.Module) -> None:
    """In every plain linear layer of the model that is large enough; parameters and their names stay."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= SMALLEST:
            module.__class__ = OneDnnLinear


def use_torch(model: nn.Module) -> None:
    """Undo `use_onednn`."""
    for module in model.modules():
        if isinstance(module, OneDnnLinear):
            object.__setattr__(module, "__class__", nn.Linear)
