"""Attention by one kernel for a row equals a call per segment, and is refused where it cannot run.

The varlen kernel needs a GPU: here it is emulated by its documented meaning. What runs on one is in test_gpu.py.
"""

from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import test_prefix_sharing
import torch
from test_prefix_sharing import assert_same, log_probs_and_gradients, ragged_groups
from tiny_models import MODELS, groups, processor_for_questions
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention

from sail_rl.batch_form import choose_attention
from sail_rl.command_line import BadInput
from sail_rl.config import UpdateSection
from sail_rl.model import prefix_sharing, segment_kernels
from sail_rl.model.prefix_sharing import Layout, segment_attention
from sail_rl.model.segment_kernels import Gather, flex_segments, implementation, kernel_obstacle, varlen_segments
from sail_rl.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUTS = {
    "one prompt alone": Layout((5,), (None,)),
    "one group, ragged, of one token": Layout((4, 3, 1, 6), (None, 0, 0, 0)),
    "several groups": Layout((4, 3, 2, 5, 1, 1, 7, 3), (None, 0, 0, None, 3, 3, None, 6)),
    "packed": Layout((4, 3, 4, 1), (None, 0, None, 2)),
    "a segment without tokens": Layout((4, 0, 3, 2), (None, 0, 0, 0)),
    "longer than a block": Layout((120, 9, 30), (None, 0, 0)),
}
HEADS = {"as many heads": (2, 2), "grouped queries": (4, 2), "one head of keys": (4, 1)}
varlen_attention, flex_attention = implementation(varlen_segments), implementation(flex_segments)


def emulated(alignment, query, key, value, query_bounds, key_bounds, longest_query, longest_keys, **options):
    """torch's varlen_attn sequence by sequence; causal from a corner."""
    assert options["window_size"] == (-1, 0)
    assert query.dtype == key.dtype == value.dtype
    if segment_kernels.ASKS_FOR_GROUPS:  # torch 2.11 takes grouped queries unasked
        assert options["enable_gqa"] or query.shape[1] == key.shape[1]
    assert query_bounds.dtype == key_bounds.dtype == torch.int32
    lengths = [
        (int(bounds[-1]), int(bounds.diff().max()), int(bounds.diff().min())) for bounds in (query_bounds, key_bounds)
    ]
    assert [length[:2] for length in lengths] == [(len(query), longest_query), (len(key), longest_keys)]
    assert min(length[2] for length in lengths) > 0
    outputs = []
    for (a, b), (c, d) in zip(pairwise(query_bounds.tolist()), pairwise(key_bounds.tolist()), strict=True):
        offset = {"lower right": (d - c) - (b - a), "upper left": 0, "off by one": (d - c) - (b - a) - 1}[alignment]
        sees = torch.ones(b - a, d - c, dtype=torch.bool).tril(offset)
        parts = (tensor.transpose(0, 1)[None] for tensor in (query[a:b], key[c:d], value[c:d]))
        output = scaled_dot_product_attention(*parts, attn_mask=sees, scale=options["scale"], enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def kernel(monkeypatch):
    """The varlen kernel as it is documented."""
    monkeypatch.setattr(segment_kernels, "varlen_attn", partial(emulated, "lower right"))


def projections(layout, heads=(4, 2)):
    """Queries, keys and values of a row."""
    generator = torch.Generator().manual_seed(0)
    length = sum(layout.lengths)
    return [
        torch.randn(1, n, length, 16, dtype=torch.double, generator=generator) for n in (heads[0], heads[1], heads[1])
    ]


def output_and_gradients(attention, layout, tensors):
    """Of a loss that weighs every entry differently."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output, _ = attention(None, *leaves, None, scaling=0.3, layout=layout)
    (output * torch.linspace(-1, 1, output.numel(), dtype=torch.double).view_as(output)).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_one_varlen_call_equals_a_call_per_segment(kernel, layout, heads):
    tensors = projections(layout, heads)
    expected = output_and_gradients(segment_attention, layout, tensors)
    torch.testing.assert_close(output_and_gradients(varlen_attention, layout, tensors), expected)


@pytest.mark.parametrize("alignment", ["upper left", "off by one"])
def test_another_corner_is_seen(monkeypatch, alignment):
    monkeypatch.setattr(segment_kernels, "varlen_attn", partial(emulated, alignment))
    layout = LAYOUTS["several groups"]
    tensors = projections(layout)
    ours, expected = (
        attention(None, *tensors, None, layout=layout)[0] for attention in (varlen_attention, segment_attention)
    )
    assert not (ours - expected).abs().max() < 1e-2  # a query that sees nothing gives NaN


def test_a_boundary_off_by_one_is_seen(kernel):
    layout = Layout((4, 3, 2, 5), (None, 0, 0, None))
    tensors = projections(layout)
    moved = Layout((5, 2, 2, 5), layout.prefixes)
    ours, expected = (varlen_attention(None, *tensors, None, layout=told)[0] for told in (moved, layout))
    assert (ours - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trained_by_the_varlen_kernel(kernel, monkeypatch, name):
    """Log-probabilities and gradients are those of padded rows, pictures and recomputed activations included."""
    processor = processor_for_questions()
    model = MODELS[name](processor)
    ragged = ragged_groups([group.prompt for group in groups(processor)], 250)
    padded = log_probs_and_gradients(model, ragged, "padded")
    monkeypatch.setattr(test_prefix_sharing, "Policy", partial(Policy, attention="varlen"))
    for form in ("shared", "packed"):
        assert_same(log_probs_and_gradients(model, ragged, form), padded)
    assert model.config.text_config._attn_implementation == segment_kernels.IMPLEMENTATIONS["varlen"]


def test_a_prompts_gradient_is_added_up_in_float32():
    """Of a thousand readers, each of which bfloat16 would round away beside the first."""
    rows = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    gathered = Gather.apply(rows, torch.zeros(1001, dtype=torch.long))
    gathered.backward(torch.tensor([256.0] + [0.5] * 1000).bfloat16().view(-1, 1, 1))
    assert rows.grad.item() == pytest.approx(756, rel=0.01)


def whole_square(layout, padded):
    """Who reads whom in a row, segment by segment; padding is a segment of its own."""
    sees = torch.zeros(padded, padded, dtype=torch.bool)
    spans = list(pairwise(torch.tensor([0, *layout.lengths]).cumsum(0).tolist()))
    for (start, end), prefix in zip(spans, layout.prefixes, strict=True):
        sees[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if prefix is not None:
            sees[start:end, slice(*spans[prefix])] = True
    end = spans[-1][1]
    sees[end:, end:] = torch.ones(padded - end, padded - end, dtype=torch.bool).tril()
    return sees


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_flex_reads_what_is_to_be_read(layout):
    """Its mask by every single place, and its output where torch has it on a CPU: the forward pass."""
    padded = sum(layout.lengths) + 3
    reads = segment_kernels.who_reads(layout, padded, torch.device("cpu"))
    mask = create_mask(reads, 1, 1, padded, padded, device="cpu")
    assert torch.equal(mask[0, 0], whole_square(layout, padded))
    for heads in HEADS.values():
        tensors = [tensor.float() for tensor in projections(layout, heads)]
        ours, expected = (
            attention(None, *tensors, None, layout=layout)[0] for attention in (flex_attention, segment_attention)
        )
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", [varlen_attention, flex_attention])
def test_calls_without_segments_are_plain(attention):
    tensors, module = projections(LAYOUTS["packed"], (2, 2)), SimpleNamespace(is_causal=True)
    expected = scaled_dot_product_attention(*tensors, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(attention(module, *tensors, None)[0], expected)


@pytest.mark.parametrize("attention", [segment_attention, varlen_attention, flex_attention])
def test_autocast_gives_kernels_one_dtype(kernel, monkeypatch, attention):
    """Norms leave queries and keys in float32; the kernels, and SDPA's causal bias on a GPU, take no mixture."""
    monkeypatch.setattr(prefix_sharing, "scaled_dot_product_attention", of_one_dtype)
    layout = LAYOUTS["several groups"]
    query, key, value = projections(layout)
    mixed = query.float(), key.float(), value.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output, _ = attention(None, *mixed, None, layout=layout)
    assert output.dtype == torch.bfloat16


def of_one_dtype(query, key, value, **options):
    assert query.dtype == key.dtype == value.dtype
    return scaled_dot_product_attention(query, key, value, **options)


def run_of(asked, device="cpu", precision="no"):
    """What `choose_attention` looks at."""
    recipe = SimpleNamespace(update=UpdateSection(attention=asked), trainer=SimpleNamespace(mixed_precision=precision))
    accelerator = SimpleNamespace(device=torch.device(device))
    return SimpleNamespace(recipe=recipe, accelerator=accelerator, is_main=True)


def test_what_cannot_run_here_is_refused():
    model = MODELS["dense"](processor_for_questions())
    for asked in ("varlen", "flex"):
        with pytest.raises(
            BadInput, match=f"update.attention = {asked}: it needs a CUDA device.*cpu; or leave it at auto"
        ):
            choose_attention(run_of(asked), model)
    assert [choose_attention(run_of(asked), model) for asked in ("auto", "sdpa")] == ["sdpa", "sdpa"]


@pytest.mark.parametrize(
    ("change", "precision", "capability", "told"),
    [
        ({}, "bf16", (9, 0), None),
        ({}, "no", (9, 0), "trainer.mixed_precision=bf16"),
        ({"head_dim": 20}, "bf16", (9, 0), "heads are 20 wide"),
        ({"head_dim": 512}, "bf16", (9, 0), "heads are 512 wide"),
        ({}, "bf16", (7, 5), "compute capability 8"),
        ({"attention_dropout": 0.1}, "bf16", (9, 0), "attention_dropout is 0.1"),
    ],
)
def test_on_a_gpu_varlen_is_taken_where_it_can_run(monkeypatch, capsys, change, precision, capability, told):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model = MODELS["dense"](processor_for_questions())
    for name, value in change.items():
        setattr(model.config.text_config, name, value)
    assert choose_attention(run_of("auto", "cuda", precision), model) == ("sdpa" if told else "varlen")
    assert (told or "varlen") in capsys.readouterr().out
    if told:
        with pytest.raises(BadInput, match=told):
            choose_attention(run_of("varlen", "cuda", precision), model)


def test_flex_takes_any_precision_on_a_gpu():
    model = MODELS["dense"](processor_for_questions())
    assert kernel_obstacle("flex", model.config, torch.device("cuda"), torch.float32) is None
