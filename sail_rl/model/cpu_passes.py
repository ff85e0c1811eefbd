"""A model's RMS norms and gated feed-forward layers on a CPU, in fewer passes over memory.

torch computes both one operation at a time. Here are their values and gradients written out by hand, in place where
nobody reads what was there; less is kept for the gradient, too. On a GPU `liger.py` has kernels for this.
Suffixes: _R rows, _D width.
"""

from types import MethodType
from typing import Any

import torch
from torch.nn.functional import silu

from sail_rl.model.liger import is_gated_silu


def use_fewer_passes(model: Any) -> None:
    """In every RMS norm and gated layer of tower and language model; on other devices they do what they did."""
    for module in model.base_model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(root_mean_square_norm, module)
        elif is_gated_silu(module):
            module.forward = MethodType(gated_silu, module)


def use_all_passes(model: Any) -> None:
    """Undo `use_fewer_passes`."""
    for module in model.base_model.modules():
        if getattr(module.__dict__.get("forward"), "__func__", None) in (root_mean_square_norm, gated_silu):
            del module.forward


def root_mean_square_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """In place of the norm's forward. The inputs are taken as rows: the tower's come from a convolution as columns,
    which all of its layers would go through."""
    if not is_plain(hidden_states) or self.weight.dtype != torch.float32:
        return type(self).forward(self, hidden_states)
    hidden_states = hidden_states.contiguous()
    if not torch.is_grad_enabled():  # a token that is written is hundreds of small operations: no call too many
        return scaled(hidden_states, self.weight, self.variance_epsilon)[0]
    return Norm.apply(hidden_states, self.weight, self.variance_epsilon)


def gated_silu(self: Any, x: torch.Tensor) -> torch.Tensor:
    """In place of the feed-forward layer's forward."""
    if not is_plain(x):
        return type(self).forward(self, x)
    return self.down_proj(GatedSilu.apply(self.gate_proj(x), self.up_proj(x)))


def is_plain(inputs: torch.Tensor) -> bool:
    """Whether they are computed as they are: not on a GPU, in another type of number, or by torch.compile, which saves
    passes of its own, and which in torch 2.11 takes a wrong gradient from functions such as these."""
    as_they_are = inputs.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return inputs.device.type == "cpu" and as_they_are and not torch.compiler.is_compiling()


class Norm(torch.autograd.Function):
    """inputs / root of the mean of their squares * weight."""

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        """The inputs and what they were multiplied by are kept."""
        outputs, scale = scaled(inputs, weight_D, epsilon)
        ctx.save_for_backward(inputs, weight_D, scale)
        return outputs

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of the inputs: the scaled gradient without its part along the inputs, which the norm takes out."""
        inputs, weight_D, scale = ctx.saved_tensors
        for_inputs, for_weight, _ = ctx.needs_input_grad
        products_RD = (gradients[0] * inputs).flatten(0, -2)
        own_D = torch.mv(products_RD.t(), scale.flatten()) if for_weight else None
        if not for_inputs:
            return None, own_D, None
        along = torch.mv(products_RD, weight_D).view(scale.shape) * scale.square()
        own = (gradients[0] * weight_D).addcmul_(inputs, along, value=-1 / inputs.shape[-1]).mul_(scale)
        return own, own_D, None


def scaled(inputs: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm's outputs, and what it multiplied each row by."""
    squares = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True).square_()
    scale = squares.div_(inputs.shape[-1]).add_(epsilon).rsqrt_()
    return (inputs * scale).mul_(weight_D), scale


class GatedSilu(torch.autograd.Function):
    """silu(gate) * up, of which silu(gate) is computed again for the gradient rather than kept."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Both are outputs of linear layers."""
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of silu in place of what it is multiplied by."""
        gate, up = ctx.saved_tensors
        for_up = silu(gate).mul_(gradients[0])
        for_gate = gradients[0] * up
        torch.ops.aten.silu_backward.grad_input(for_gate, gate, grad_input=for_gate)
        return for_gate, for_up
