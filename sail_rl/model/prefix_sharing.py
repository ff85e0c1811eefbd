"""Attention within a row of segments: completions of one group read their prompt, which is computed once.

It is registered with transformers as an attention implementation, so the models' own code runs unchanged. A call
without segments is plain SDPA.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from sail_rl.model.merged_attention import MergedAttention

ATTENTION = "sail_rl_segments"
NO_MASK = torch.zeros(1, 1, 1, 1)  # a mask of four axes is taken for ready-made; segments need none


BEFORE = -1  # the number of the segment that was computed before the row


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that was computed before the rows which read it, for a group too large for one row.

    The rows leave their gradients at copies that are cut off from the prompt's graph, in float32 so that a sum over
    many rows is not rounded at each. From there `backward` takes them on.
    """

    last_1D: torch.Tensor
    """The hidden state that predicts the first tokens."""
    positions_A1: torch.Tensor
    """The highest position on each axis."""
    keys_values: list[tuple[torch.Tensor, torch.Tensor]]
    """Of each layer, [1, heads, P, width]."""
    computed: list[torch.Tensor]
    """What these are copies of."""

    def backward(self) -> None:
        """The prompt's own backward pass, when all rows have had theirs."""
        leaves = [self.last_1D, *(tensor for pair in self.keys_values for tensor in pair)]
        reached = [(own, leaf) for own, leaf in zip(self.computed, leaves, strict=True) if leaf.grad is not None]
        gradients = [leaf.grad.to(own.dtype) for own, leaf in reached if leaf.grad is not None]
        if reached:
            torch.autograd.backward([own for own, _ in reached], gradients)


def read_prompt(last_1D: torch.Tensor, positions_A1: torch.Tensor, layout: "Layout") -> ReadPrompt:
    """From the forward pass over a row with this layout, which is the prompt alone."""
    assert layout.recorded is not None
    layers = [layout.recorded[number] for number in sorted(layout.recorded)]
    computed = [last_1D, *(tensor for pair in layers for tensor in pair)]
    last, *rest = (tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in computed)
    return ReadPrompt(last, positions_A1, list(zip(rest[::2], rest[1::2], strict=True)), computed)


@dataclass(frozen=True)
class Layout:
    """The segments of a row: their lengths, and the number of the segment that each reads first, BEFORE or None."""

    lengths: tuple[int, ...]
    prefixes: tuple[int | None, ...]
    prompt: ReadPrompt | None = None
    """What segments read whose prefix is BEFORE."""
    recorded: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    """Keys and values by layer are noted here, if somebody wants them."""
    masks: dict[tuple, Any] = field(default_factory=dict, compare=False)
    """Made once for all layers, as the kernel that computes them needs it."""

    @cached_property
    def families(self) -> list[tuple[int | None, list[int]]]:
        """(prefix, numbers) of segments side by side that read the same one first; those that read none, one by one."""
        found: list[tuple[int | None, list[int]]] = []
        for number, prefix in enumerate(self.prefixes):
            if prefix is not None and found and found[-1][0] == prefix:
                found[-1][1].append(number)
            else:
                found.append((prefix, [number]))
        return found

    def mask(self, length: int, prefix_length: int, like: torch.Tensor) -> torch.Tensor:
        """[length, prefix + length]: all of the prefix, and causally the segment itself."""
        key = (length, prefix_length, like.dtype, like.device)
        if key not in self.masks:
            hidden = torch.ones(length, prefix_length + length, dtype=torch.bool, device=like.device)
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
            self.masks[key] = mask.masked_fill(hidden.triu(prefix_length + 1), -torch.inf)
        return self.masks[key]


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: [1, heads, T, width] to [1, T, heads, width]."""
    if layout is None:
        mask = attention_mask
        if query.shape[2] == 1 < query.shape[1] // key.shape[1] and "position_bias" not in kwargs:
            return one_token_attention(query, key, value, mask, scaling, dropout), None
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    query, key, value = in_one_dtype(query, key, value)
    layer: Any = getattr(module, "layer_idx", None)
    if layout.recorded is not None:
        layout.recorded[layer] = (key, value)
    # One split each: its backward is one concatenation, where slices would each fill a row of zeros.
    sizes = [sum(layout.lengths[number] for number in numbers) for _, numbers in layout.families]
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    place = {numbers[0]: place for place, (_, numbers) in enumerate(layout.families)}
    grouped: Any = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    outputs = []
    for q, k, v, (prefix, numbers) in zip(queries, keys, values, layout.families, strict=True):
        if prefix is None:
            outputs.append(scaled_dot_product_attention(q, k, v, is_causal=True, **grouped))
            continue
        if prefix == BEFORE and layout.prompt is not None:
            read = [tensor.to(k.dtype) for tensor in layout.prompt.keys_values[layer]]
        else:
            read = [keys[place[prefix]], values[place[prefix]]]
        lengths = [layout.lengths[number] for number in numbers if layout.lengths[number]]
        if q.device.type == "cpu" and lengths and q.shape[-1] == v.shape[-1]:
            outputs.append(MergedAttention.apply(q, k, v, *read, lengths, scaling))
        else:
            outputs += one_by_one(q, k, v, read, lengths, layout, grouped)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def one_by_one(q, k, v, read: list[torch.Tensor], lengths: list[int], layout: Layout, grouped: Any) -> list:
    """The attention of each completion to its prompt and itself, in a call of its own."""
    outputs = []
    for own_q, own_k, own_v in zip(*(tensor.split(lengths, dim=2) for tensor in (q, k, v)), strict=True):
        both_k, both_v = torch.cat([read[0], own_k], dim=2), torch.cat([read[1], own_v], dim=2)
        length, both = own_q.shape[2], both_k.shape[2]
        # CUDA has a kernel for causality from the lower right corner; elsewhere the mask is spelled out.
        mask = causal_lower_right(length, both) if q.is_cuda else layout.mask(length, both - length, own_q)
        outputs.append(scaled_dot_product_attention(own_q, both_k, both_v, attn_mask=mask, **grouped))
    return outputs


def one_token_attention(query, key, value, mask, scaling: float | None, dropout: float) -> torch.Tensor:
    """[R, heads, 1, width] to [R, 1, heads, width] when a token is written: the queries that share a head of keys are
    rows of one call, so that the cache is not copied for each of them."""
    rows, heads, _, width = query.shape
    query = query.reshape(rows, key.shape[1], -1, width)
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout)
    return output.reshape(rows, 1, heads, width)


def in_one_dtype(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    """What autocast does for SDPA, for the kernels that it does not know and for SDPA with a causal bias.

    The norms of Qwen3 give queries and keys in float32, while values are in bfloat16.
    """
    kind = tensors[0].device.type
    return [t.to(torch.get_autocast_dtype(kind)) for t in tensors] if torch.is_autocast_enabled(kind) else tensors


AttentionInterface.register(ATTENTION, segment_attention)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def use_segments(model, implementation: str = ATTENTION) -> None:
    """Let the language model read rows of segments; its other calls stay what they were."""
    model.set_attn_implementation({"text_config": implementation})


def obstacle(model) -> str | None:
    """Why rows of segments would not be computed exactly with this model; None if they are."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        return f"its layers are of the kind {', '.join(sorted(kinds))}"
    if getattr(config, "attention_dropout", 0):
        return f"its attention_dropout is {config.attention_dropout}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"its sliding_window is {config.sliding_window}"
    if any("sinks" in name for name, _ in model.named_parameters()):
        return "its attention has sinks"
    if getattr(config, "use_bidirectional_attention", None):
        return "its pictures attend in both directions"
    return None


def layout_of(segments: Sequence[Any], prompt: ReadPrompt | None = None, record: bool = False) -> Layout:
    """What attention needs of a row's segments."""
    lengths, prefixes = (tuple(getattr(segment, name) for segment in segments) for name in ("length", "prefix"))
    return Layout(lengths, prefixes, prompt, {} if record else None)


def segment_positions(starts: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Positions of a row [axes, T]: given for the segments that read nothing first, joined; counted on for the others.

    On every axis a completion goes on one after the highest of its prompt, as text after pictures does (M-RoPE).
    """
    heads = iter(starts.split([n for n, p in zip(layout.lengths, layout.prefixes, strict=True) if p is None], dim=1))
    parts: list[torch.Tensor] = []
    for length, prefix in zip(layout.lengths, layout.prefixes, strict=True):
        if prefix is None:
            parts.append(next(heads))
        else:
            before = layout.prompt.positions_A1 if prefix == BEFORE and layout.prompt else parts[prefix]
            count = torch.arange(1, length + 1, device=starts.device) + before.max()
            parts.append(count.expand(starts.shape[0], -1))
    return torch.cat(parts, dim=1)
