"""Liger's Triton kernels for a model's RMS norms, gated feed-forward layers and rotary embedding, on a GPU.

Losses are not taken from it: the log-probabilities of policy.py are computed in parts already.
"""

import sys
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from sail_rl.command_line import BadInput

ROTARY = "apply_rotary_pos_emb"  # a function of transformers' modelling files


def require_liger() -> None:
    """Refuse where its kernels cannot run."""
    if find_spec("liger_kernel") is None:
        raise BadInput("model.use_liger_kernel: liger-kernel is not installed; install sail_rl with `--extra liger`")
    if not torch.cuda.is_available():
        raise BadInput("model.use_liger_kernel: its kernels run on a GPU alone; leave it out")


def use_liger(model: Any) -> None:
    """Let tower and language model compute with them. The rotary embedding is exchanged for every model of its kind in
    this process, since transformers has it as a function."""
    from liger_kernel.transformers.functional import liger_rope

    for module in model.base_model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(root_mean_square_norm, module)
        elif is_gated_silu(module):
            module.forward = MethodType(gated_silu, module)
        file: Any = sys.modules[type(module).__module__]
        if type(module).__name__.endswith("Attention") and hasattr(file, ROTARY):
            setattr(file, ROTARY, liger_rope)


def is_gated_silu(module: nn.Module) -> bool:
    """Whether this is a feed-forward layer with a gate; not experts, whose weights are one tensor."""
    parts = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    return all(isinstance(part, nn.Module) for part in parts) and isinstance(module.act_fn, type(ACT2FN["silu"]))


def root_mean_square_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """In place of the norm's forward; the gradient is not written over its input, which others may read."""
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False)


def gated_silu(self: Any, x: torch.Tensor) -> torch.Tensor:
    """In place of the feed-forward layer's forward."""
    from liger_kernel.transformers.functional import liger_swiglu

    return self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))
