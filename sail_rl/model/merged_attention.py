"""Attention of completions to their prompt and to themselves, put together from two parts by their log-sum-exps.

One call for all completions of a prompt over it, without a mask, and a causal one for each over itself: the prompt's
keys and values are not copied for every completion, and no mask is read. The gradient is exact: the kernel's backward,
given the whole's output and log-sum-exp in the place of a part's own, yields that part's share of it. CPU only, since
torch makes the kernels that return log-sum-exps differ by device.
Tensors are [1, heads, tokens, width]; keys and values may have fewer heads, each read by a group of the queries'.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class MergedAttention(torch.autograd.Function):
    """Segments of the given lengths, side by side, that all read one prefix."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        lengths: Sequence[int],
        scale: float | None,
    ) -> Tensor:
        ctx.lengths, ctx.scale, ctx.heads = lengths, scale, key.shape[1]
        keys_values = [for_each_query(tensor, query) for tensor in (key, value, prefix_key, prefix_value)]
        key, value, prefix_key, prefix_value = keys_values
        over_prefix, sums = attend(query, prefix_key, prefix_value, scale=scale)
        parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
        own = [attend(*part, is_causal=True, scale=scale) for part in parts]
        over_itself, own_sums = (torch.cat(part, dim=2) for part in zip(*own, strict=True))
        share = (sums - own_sums).sigmoid()[..., None].to(query.dtype)  # of the prefix
        output = torch.lerp(over_itself, over_prefix, share)
        ctx.save_for_backward(query, *keys_values, output, torch.logaddexp(sums, own_sums))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        query, key, value, prefix_key, prefix_value, output, sums = ctx.saved_tensors
        d_query, *d_prefix = attend_backward(
            gradient, query, prefix_key, prefix_value, output, sums, 0.0, False, scale=ctx.scale
        )
        tensors = (gradient, query, key, value, output, sums)
        parts = zip(*(tensor.split(ctx.lengths, dim=2) for tensor in tensors), strict=True)
        own = [attend_backward(*part, 0.0, True, scale=ctx.scale) for part in parts]
        d_own, *d_keys_values = (torch.cat(part, dim=2) for part in zip(*own, strict=True))
        summed = (d.unflatten(1, (ctx.heads, -1)).sum(2) for d in (*d_keys_values, *d_prefix))
        return d_query + d_own, *summed, None, None


def for_each_query(tensor: Tensor, query: Tensor) -> Tensor:
    """A head of keys for every one of the queries'."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)
