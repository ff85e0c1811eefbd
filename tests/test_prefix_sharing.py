"""Rows of segments are exact: log-probabilities and every gradient are those of padded rows, for every family."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from families import FAMILIES, make_world
from tiny_models import groups as questions_of_mixture
from tiny_models import mixture, processor_for_questions
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rollouts import Prompt
from sail_rl.batch import Group, Segment, make_batch, pack
from sail_rl.before_update import after_their_prompts
from sail_rl.data.packing import make_batches, size
from sail_rl.data.stream import Shard
from sail_rl.launch import Run
from sail_rl.model import prefix_sharing
from sail_rl.model.frozen_tower import vision_tower
from sail_rl.model.load import prepare_for_training
from sail_rl.model.merged_attention import MergedAttention
from sail_rl.model.prefix_sharing import Layout, obstacle, one_by_one, segment_attention
from sail_rl.policy import LOGITS_AT_ONCE, Policy

pytestmark = pytest.mark.usefixtures("one_thread")
# Of each question: ragged, of one token, empty.
LENGTHS = [(5, 1, 9), (3, 3), (1, 0, 7, 2), (4,), (6, 2)]


def ragged_groups(prompts, vocabulary):
    """Completions of random text for each prompt, with advantages."""
    generator = torch.Generator().manual_seed(0)
    return [
        Group(
            prompt,
            [torch.randint(10, vocabulary, (length,), generator=generator).tolist() for length in lengths],
            torch.randn(len(lengths), generator=generator).tolist(),
        )
        for prompt, lengths in zip(prompts, LENGTHS, strict=False)
    ]


def log_probs_and_gradients(model, groups, form, budget=10**6, prompts_apart=False):
    """Of a loss that weighs every token differently, in one or more micro-batches."""
    policy, idle = Policy(model), Group(groups[0].prompt, [[10]], trained=False)
    model.zero_grad()
    found = {}
    batches = make_batches(groups, budget, idle, form=form, prompts_apart=prompts_apart)
    for batch, prompt in after_their_prompts(Run(None, Path(), Accelerator(cpu=True), Shard()), policy, batches):
        terms = policy(batch, 0.8, (5,), prompt)
        weights_BC = batch.advantages_B[:, None] * torch.arange(1, batch.mask_BC.shape[1] + 1)
        (terms.log_probs_BT * weights_BC * batch.mask_BC).sum().backward()
        for tokens, mask, values in zip(batch.completion_ids_BC, batch.mask_BC, terms.log_probs_BT, strict=True):
            key = tuple(tokens[mask.bool()].tolist())
            found[key] = values[mask.bool()].detach()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return found, gradients


def assert_same(ours, theirs, tolerance=2e-5):
    """Log-probabilities within 1e-5, each gradient within a share of its largest entry."""
    assert ours[0].keys() == theirs[0].keys()
    for key, expected in theirs[0].items():
        torch.testing.assert_close(ours[0][key], expected, rtol=0, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        assert (ours[1][name] - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-3), name


@pytest.fixture(scope="module", params=[*FAMILIES, "mixture of experts"])
def case(request):
    """(model, groups) of a family."""
    if request.param == "mixture of experts":
        processor = processor_for_questions()
        prompts = [group.prompt for group in questions_of_mixture(processor)]
        return mixture(processor), ragged_groups(prompts, 250)
    world = make_world(request.param)
    return world.model, ragged_groups(world.prompts, 250)


@pytest.fixture(scope="module")
def padded(case):
    return log_probs_and_gradients(*case, "padded")


@pytest.mark.parametrize("form", ["packed", "shared"])
def test_rows_of_segments_equal_padded_rows(case, padded, form):
    model, groups = case
    assert_same(log_probs_and_gradients(model, groups, form), padded)
    # Micro-batches that cut groups apart.
    assert_same(log_probs_and_gradients(model, groups, form, budget=60), padded)


def test_no_gradient_is_summed_in_an_order_that_threads_decide(case):
    """That of an index is, where it names a place twice; and a resumed run would then not be the one that went on."""
    model, groups = case
    if hasattr(model.config.get_text_config(), "num_experts"):
        pytest.skip("transformers' experts index tokens more than once; README says what that means")
    (batch,) = make_batches(groups, 10**6, Group(groups[0].prompt, [[10]], trained=False), form="shared")
    unseen, seen, indices = [Policy(model)(batch).log_probs_BT.grad_fn], set(), []
    while unseen:
        node = unseen.pop()
        if node is not None and node not in seen:
            seen.add(node)
            unseen += [before for before, _ in node.next_functions]
            indices += [node._saved_indices] if node.name() == "IndexBackward0" else []
    assert len(seen) > 100
    for given in indices:
        places = torch.stack(torch.broadcast_tensors(*(index for index in given if index is not None)))
        assert places.dtype == torch.bool or places.flatten(1).unique(dim=1).shape[1] == places.flatten(1).shape[1]


def test_gradient_checkpointing_and_parts_of_logits_change_nothing(case, padded, monkeypatch):
    model, groups = case
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", 7 * model.get_output_embeddings().weight.shape[0])
    prepare_for_training(model, gradient_checkpointing=True)
    try:
        assert_same(log_probs_and_gradients(model, groups, "shared"), padded)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def tokens_read(model, run):
    """Tokens that pass through the language model's embedding while `run` is called, and tiles through its tower."""
    counts = {"tokens": 0, "tower": 0}
    tower = vision_tower(model)

    def count(name):
        def hook(module, inputs, *_):
            counts[name] += inputs[0].numel() if name == "tokens" else 1

        return hook

    hooks = [model.get_input_embeddings().register_forward_hook(count("tokens"))]
    hooks.append(tower.register_forward_hook(count("tower")))
    run()
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_group_too_large_for_a_row_has_its_prompt_computed_once(case, padded, checkpointing):
    model, groups = case
    prepare_for_training(model, checkpointing)
    try:
        apart = log_probs_and_gradients(model, groups, "shared", budget=8, prompts_apart=True)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    assert_same(apart, padded)


def test_the_prompt_of_a_large_group_passes_once(case):
    """Also its pictures; its completions in two rows."""
    model, groups = case
    group = next(group for group in groups if group.prompt.model_inputs and len(group.completions) > 1)
    budget = sum(map(len, group.completions)) - 1
    batches = make_batches([group], budget, group, form="shared", prompts_apart=True)
    assert len(batches) == 3  # and an idle one, whose backward pass is the one with an exchange of gradients
    assert batches[0].prompt is batches[1].prompt is not None
    counts = tokens_read(model, lambda: log_probs_and_gradients(model, [group], "shared", budget, prompts_apart=True))
    assert counts == {"tokens": len(group.prompt.token_ids) * 2 + 1 + budget + 1, "tower": 2}


def test_pictures_are_read_once_for_a_group(case):
    group = next(group for group in case[1] if group.prompt.model_inputs and len(group.completions) > 1)
    tiles = len(group.prompt.model_inputs["pixel_values"])
    counts = {form: len(make_batch([group], form).model_inputs["pixel_values"]) for form in ("shared", "packed")}
    assert counts == {"shared": tiles, "packed": tiles * len(group.completions)}


def test_a_completion_sees_nothing_of_the_others(case):
    """Another completion in its group changes its log-probabilities by no more than the rounding of longer rows."""
    model, groups = case
    group = groups[0]
    others = replace(group, completions=[group.completions[0], [11] * len(group.completions[1]), [12] * 9])
    with torch.no_grad():
        ours, theirs = (Policy(model)(make_batch([one], "shared")).log_probs_BT[0] for one in (group, others))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)


def other_sample(group):
    """Another sample of the same length: its text, its picture and its completions are changed."""
    tokens = [*group.prompt.token_ids[:-1], 12]
    pictures = {n: -t if n == "pixel_values" else t for n, t in group.prompt.model_inputs.items()}
    prompt = replace(group.prompt, token_ids=tokens, model_inputs=pictures)
    return replace(group, prompt=prompt, completions=[[13] * len(one) for one in group.completions])


@pytest.mark.parametrize("form", ["packed", "shared"])
def test_no_sample_of_a_row_sees_another(case, form):
    """In turn each sample is changed alone: its own log-probabilities change, those of the others do not."""
    model, groups = case
    groups = [replace(group, completions=[one or [14] for one in group.completions]) for group in groups]

    def log_probs(samples):
        batch = make_batch(samples, form)
        owners = torch.tensor([n for n, group in enumerate(samples) for _ in group.completions])
        with torch.no_grad():
            found = Policy(model)(batch).log_probs_BT
        return [found[owners == n][batch.mask_BC[owners == n] > 0] for n in range(len(samples))]

    before = log_probs(groups)
    for changed in range(len(groups)):
        after = log_probs([other_sample(group) if n == changed else group for n, group in enumerate(groups)])
        for number, (ours, theirs) in enumerate(zip(before, after, strict=True)):
            difference = (ours - theirs).abs().max()
            assert difference > 1e-3 if number == changed else difference < 1e-6, (changed, number)


BROKEN = {
    "causal over the whole row": lambda lengths, prefixes: ((sum(lengths),), (None,)),
    "no prompt": lambda lengths, prefixes: (lengths, (None,) * len(lengths)),
    "another prompt": lambda lengths, prefixes: (lengths, tuple(None if p is None else 0 for p in prefixes)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_layout_is_seen(case, padded, monkeypatch, name):
    """The comparison above fails where it must."""
    model, groups = case
    right = prefix_sharing.Layout

    class Wrong(right):
        def __init__(self, lengths, prefixes, *others):
            super().__init__(lengths, prefixes, *others)
            lengths, prefixes = BROKEN[name](lengths, prefixes)
            object.__setattr__(self, "read_lengths", lengths)
            object.__setattr__(self, "read_prefixes", prefixes)

    def attend(module, query, key, value, mask, layout=None, **kwargs):
        wrong = layout and right(layout.read_lengths, layout.read_prefixes)
        return segment_attention(module, query, key, value, mask, layout=wrong, **kwargs)

    monkeypatch.setattr(prefix_sharing, "Layout", Wrong)
    monkeypatch.setitem(prefix_sharing.AttentionInterface._global_mapping, prefix_sharing.ATTENTION, attend)
    wrong, _ = log_probs_and_gradients(model, groups, "shared")
    assert max((wrong[key] - padded[0][key]).abs().max() for key in wrong if key) > 1e-2


def test_rows_are_laid_out_as_told():
    one = Group(Prompt("", [1, 2, 3]), [[10, 11], [], [20]], [1.0, 2.0, 3.0])
    two = Group(Prompt("", [4]), [[30]], [4.0], trained=False)
    row = pack([one, two], share=True)
    assert row["input_ids_RT"].tolist() == [[1, 2, 3, 10, 11, 20, 4, 30]]
    # A sole reader's prompt is one segment with it.
    assert row["segments"] == (Segment(3), Segment(2, 0), Segment(1, 0), Segment(2))
    assert row["predictors_N"].tolist() == [2, 3, 2, 6]
    assert row["readers_RT"].tolist() == [[2, 2, 2, 1, 1, 1, 0, 0]]
    row = pack([one, two], share=False)
    assert row["input_ids_RT"].tolist() == [[1, 2, 3, 10, 11, 1, 2, 3, 1, 2, 3, 20, 4, 30]]
    assert row["segments"] == (Segment(5), Segment(3), Segment(4), Segment(2))
    assert row["predictors_N"].tolist() == [2, 3, 10, 12]
    for form in ("shared", "packed"):
        assert make_batch([one, two], form).input_ids_RT.numel() == size([one, two], form)


def test_attention_within_segments_equals_one_mask():
    """Against plain attention with the whole square of who sees whom, grouped queries included."""
    layout = Layout((4, 3, 2, 5), (None, 0, 0, None))
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 14, 8, dtype=torch.double) for heads in (4, 2, 2))
    owner = torch.tensor([0] * 4 + [1] * 3 + [2] * 2 + [3] * 5)
    same, prompt = owner[:, None] == owner, (owner == 0) & ((owner[:, None] == 1) | (owner[:, None] == 2))
    sees = (same | prompt) & torch.ones(14, 14, dtype=torch.bool).tril()
    keys, values = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=sees)
    ours, _ = segment_attention(None, query, key, value, None, layout=layout)
    torch.testing.assert_close(ours.transpose(1, 2), expected)


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("lengths", [(3,), (1, 1), (5, 0, 1, 33)])
def test_two_parts_put_together_equal_a_call_per_completion(lengths, heads):
    """Output and gradients, in float64; the prompt is longer and shorter than what reads it."""
    torch.manual_seed(0)
    layout = Layout((9, *lengths), (None, *(0 for _ in lengths)))
    total = sum(layout.lengths)
    query, key, value = (torch.randn(1, n, total, 8, dtype=torch.double, requires_grad=True) for n in (heads, 2, 2))
    weights = torch.randn(1, heads, total - 9, 8, dtype=torch.double)
    read, own = [key[:, :, :9], value[:, :, :9]], [tensor[:, :, 9:] for tensor in (query, key, value)]
    kept = [length for length in lengths if length]
    separate = torch.cat(one_by_one(*own, read, kept, layout, {"scale": 0.4, "enable_gqa": heads > 2}), dim=2)
    merged = MergedAttention.apply(*own, *read, kept, 0.4)
    torch.testing.assert_close(merged, separate)
    for found, expected in zip(
        torch.autograd.grad((merged * weights).sum(), (query, key, value)),
        torch.autograd.grad((separate * weights).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    wrong = MergedAttention.apply(*own, *(tensor[:, :, :8] for tensor in read), kept, 0.4)
    assert (wrong - separate).abs().max() > 1e-3


@pytest.mark.parametrize("masked", [False, True])
def test_a_token_that_is_written_reads_grouped_keys(masked):
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 6, 1, 8), (3, 2, 9, 8), (3, 2, 9, 8)
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    mask = None
    if masked:
        mask = torch.ones(3, 1, 1, 9, dtype=torch.bool)
        mask[1, ..., :4] = False
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    ours, _ = segment_attention(module, query, key, value, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"layer_types": ["linear_attention", "full_attention", "full_attention"]}, "linear_attention"),
    ],
)
def test_what_cannot_be_exact_is_named(change, told):
    model = make_world("tiny").model
    assert obstacle(model) is None
    for name, value in change.items():
        setattr(model.config.text_config, name, value)
    assert told in obstacle(model)
