"""Attention within a row of segments by one kernel instead of one call per segment: `update.attention`.

`varlen`: torch's flash attention for sequences of different lengths, over keys gathered so that those of a completion
are its prompt's and then its own. `flex`: FlexAttention, whose mask of blocks skips what is not read. Like the calls in
prefix_sharing.py they are registered with transformers, so the models' own code runs unchanged.

The varlen kernel aligns causality to the lower right corner, as FlashAttention 2.1 and later do: a query reads all keys
but as many of the last as there are queries after it. Its gradient ignores that of the log-sum-exp it can return (torch
2.11 to 2.13), so completions are not put together from two calls, over the prompt and over themselves.
Suffixes: _T tokens of the row, _K gathered keys, _THD tokens, heads, their width.
"""

import inspect
from collections.abc import Callable
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from sail_rl.model.prefix_sharing import ATTENTION, Layout, in_one_dtype, segment_attention

Attention = Literal["sdpa", "varlen", "flex"]
IMPLEMENTATIONS = {"sdpa": ATTENTION, "varlen": f"{ATTENTION}_varlen", "flex": f"{ATTENTION}_flex"}
MEANING = {
    "sdpa": "one call per completion",
    "varlen": "one flash attention call per layer",
    "flex": "one FlexAttention call per layer, compiled in the first step",
}
BLOCK = 128  # of FlexAttention: its rows are padded to a multiple, so that one compiled kernel serves all lengths
CAUSAL = (-1, 0)  # the varlen kernel's window: everything before, nothing after
WIDEST, WIDTH_STEP = 256, 8  # heads that flash attention takes
OLDEST_GPU = (8, 0)  # Ampere
# torch 2.11 lacks the argument and takes fewer heads of keys than of queries unasked; later versions want to be asked.
ASKS_FOR_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


class Reading(NamedTuple):
    """What the varlen kernel is told of a row: where each segment's queries and keys begin, and which keys they are."""

    keys_K: torch.Tensor
    query_bounds: torch.Tensor
    key_bounds: torch.Tensor
    longest_query: int
    longest_keys: int


class Gather(torch.autograd.Function):
    """Rows by number. A prompt's gradient is the sum of as many as read it, which bfloat16 would round at each."""

    @staticmethod
    def forward(ctx, rows_T: torch.Tensor, numbers_K: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(numbers_K)
        ctx.length = len(rows_T)
        return rows_T.index_select(0, numbers_K)

    @staticmethod
    def backward(ctx, gradient_K: torch.Tensor) -> tuple[torch.Tensor, None]:
        (numbers_K,) = ctx.saved_tensors
        exact = torch.promote_types(gradient_K.dtype, torch.float32)
        sums_T = gradient_K.new_zeros(ctx.length, *gradient_K.shape[1:], dtype=exact)
        return sums_T.index_add_(0, numbers_K, gradient_K.to(exact)).to(gradient_K.dtype), None


def varlen_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float | None
) -> torch.Tensor:
    """[1, heads, T, width] to [1, T, heads, width] by one call of the varlen kernel.

    Each layer keeps its gathered keys and values for the gradient: of G completions, G (prompt + completion) tokens, as
    many as the calls per segment keep.
    """
    reading = once(layout, ("varlen", query.device), lambda: what_is_read(layout, query.device))
    query_THD, key_THD, value_THD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    grouped: Any = {"enable_gqa": query.shape[1] != key.shape[1]} if ASKS_FOR_GROUPS else {}
    output_THD: Any = varlen_attn(
        query_THD,
        Gather.apply(key_THD, reading.keys_K),
        Gather.apply(value_THD, reading.keys_K),
        *reading[1:],
        scale=scaling,
        window_size=CAUSAL,
        **grouped,
    )
    return output_THD[None]


def what_is_read(layout: Layout, device: torch.device) -> Reading:
    """Of a row's segments; those without tokens are left out, since kernels need not expect them."""
    places = torch.arange(sum(layout.lengths), device=device).split(layout.lengths)
    whole = [
        own if prefix is None else torch.cat([places[prefix], own])
        for own, prefix in zip(places, layout.prefixes, strict=True)
    ]
    keys = [read for read, length in zip(whole, layout.lengths, strict=True) if length]
    query_lengths, key_lengths = [length for length in layout.lengths if length], [len(read) for read in keys]
    query_bounds, key_bounds = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        for lengths in (query_lengths, key_lengths)
    )
    return Reading(torch.cat(keys), query_bounds, key_bounds, max(query_lengths), max(key_lengths))


def flex_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float | None
) -> torch.Tensor:
    """[1, heads, T, width] to [1, T, heads, width] by FlexAttention."""
    length = query.shape[2]
    mask = once(layout, ("flex", query.device), lambda: block_mask(layout, query.device))
    query, key, value = (pad(tensor, (0, 0, 0, -length % BLOCK)) for tensor in (query, key, value))
    attend = compiled_flex_attention if query.is_cuda else flex_attention
    grouped = query.shape[1] != key.shape[1]
    output = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
    return output[:, :, :length].transpose(1, 2)


# Compiled at the first call; a length that is not known beforehand does not compile it again.
compiled_flex_attention = torch.compile(flex_attention, dynamic=True)
compiled_block_mask = torch.compile(create_block_mask, dynamic=True)  # uncompiled it fills the whole square


def block_mask(layout: Layout, device: torch.device) -> BlockMask:
    """Which blocks of the padded row are read."""
    length = sum(layout.lengths)
    padded = length + -length % BLOCK
    create = compiled_block_mask if device.type == "cuda" else create_block_mask
    return create(who_reads(layout, padded, device), None, None, padded, padded, device=device)


def who_reads(layout: Layout, padded: int, device: torch.device) -> Callable[..., torch.Tensor]:
    """FlexAttention's question: whether the query at a place reads the key at another.

    Padding is a segment of its own: a query that reads nothing has no softmax.
    """
    lengths = torch.tensor([*layout.lengths, padded - sum(layout.lengths)])
    prefixes = torch.tensor([number if p is None else p for number, p in enumerate((*layout.prefixes, None))])
    owner_T = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
    prefix_T = prefixes.repeat_interleave(lengths).to(device)

    def reads(batch, head, query, key):
        return (query >= key) & ((owner_T[key] == owner_T[query]) | (owner_T[key] == prefix_T[query]))

    return reads


def once(layout: Layout, key: tuple, make: Callable[[], Any]) -> Any:
    """What is made of a layout in the first layer, for all of them."""
    if key not in layout.masks:
        layout.masks[key] = make()
    return layout.masks[key]


def implementation(kernel: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, None]]:
    """transformers' attention function by a kernel for rows of segments; other calls stay what they were."""

    def attention(module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs):
        # A prompt that stands outside the row, or will, is for the calls per segment.
        if layout is None or layout.prompt is not None or layout.recorded is not None:
            return segment_attention(module, query, key, value, attention_mask, scaling, layout=layout, **kwargs)
        return kernel(*in_one_dtype(query, key, value), layout, scaling), None

    return attention


for name, kernel in (("varlen", varlen_segments), ("flex", flex_segments)):
    AttentionInterface.register(IMPLEMENTATIONS[name], implementation(kernel))
    AttentionMaskInterface.register(IMPLEMENTATIONS[name], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def kernel_obstacle(name: str, config, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel cannot run on the device with a model of this configuration; None if it can."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, and this run is on {device.type}"
    if name == "flex":
        return None
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if width % WIDTH_STEP or width > WIDEST:
        return f"its heads are {width} wide, and flash attention takes multiples of {WIDTH_STEP} up to {WIDEST}"
    if torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return f"flash attention needs a GPU of compute capability {OLDEST_GPU[0]} or higher"
    if dtype not in (torch.bfloat16, torch.float16):
        return "flash attention computes in bfloat16, and this run in float32: set trainer.mixed_precision=bf16"
    return None
