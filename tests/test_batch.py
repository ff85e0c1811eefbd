"""Micro-batches: groups stay whole, rows are padded and masked, and every process has as many batches."""

import pytest
import torch

from rollouts import Prompt
from sail_rl.batch import Group, make_batch
from sail_rl.data.packing import make_batches, size, split_by_token_budget


def picture(tiles=1, value=1.0):
    return {"pixel_values": torch.full((tiles, 3, 4, 4), value)}


def group(prompt_length=3, completion_lengths=(2, 4), first_token=10, model_inputs=None, advantages=None, **rest):
    """Prompt tokens count up from `first_token`, completion tokens from 100."""
    prompt = Prompt(
        str(first_token), [*range(first_token, first_token + prompt_length)], model_inputs=model_inputs or {}
    )
    completions = [[*range(100, 100 + length)] for length in completion_lengths]
    return Group(prompt, completions, [1.0] * len(completions) if advantages is None else advantages, **rest)


IDLE = Group(Prompt("idle", [7, 8], model_inputs=picture(value=0.0)), [[9]], trained=False)
TEXT_IDLE = Group(Prompt("idle", [7, 8]), [[9]], trained=False)


def test_padded_tokens_is_the_size_of_the_rectangle():
    groups = [group(3, (2, 4)), group(5, (1, 1, 1))]
    assert size(groups, "padded") == 5 * (5 + 4)
    assert size(groups, "padded") == make_batch(groups).input_ids_RT.numel()


@pytest.mark.parametrize("budget", [1, 20, 60, 100, 10_000])
def test_splitting_keeps_the_budget_and_cuts_groups_only_where_it_must(budget):
    lengths = [(3, (5, 5)), (30, (2, 2)), (4, (9, 1)), (3, (6, 5)), (12, (3, 20)), (30, (2, 3))]
    groups = [group(prompt, completions, first_token=10 * i) for i, (prompt, completions) in enumerate(lengths)]
    parts = split_by_token_budget(groups, budget)
    everything = [(g.prompt.id, c, a) for g in groups for c, a in zip(g.completions, g.advantages, strict=True)]
    found = [
        (g.prompt.id, c, a) for part in parts for g in part for c, a in zip(g.completions, g.advantages, strict=True)
    ]
    assert sorted(found) == sorted(everything)
    for part in parts:
        alone = len(part) == 1 and len(part[0].completions) == 1
        assert alone or size(part, "padded") <= budget
    whole = [g for part in parts for g in part if len(g.completions) == 2]
    assert len(whole) == sum(size([g], "padded") <= budget for g in groups)
    assert len(parts) == {1: 12, 10_000: 1}.get(budget, len(parts))


def test_splitting_fills_the_budget_with_groups_of_like_length():
    # Each group alone is 2 x 10 tokens; two of them fill a budget of 40, a third would exceed it.
    groups = [group(6, (4, 4), first_token=i) for i in range(5)]
    assert [len(part) for part in split_by_token_budget(groups, 40)] == [2, 2, 1]
    assert [len(part) for part in split_by_token_budget(groups, 39)] == [1] * 5
    short_and_long = [group(6, (4, 4)), group(60, (4, 4)), group(6, (4, 4)), group(60, (4, 4))]
    parts = split_by_token_budget(short_and_long, 4 * 64)
    assert [[len(g.prompt.token_ids) for g in part] for part in parts] == [[6, 6], [60, 60]]
    assert split_by_token_budget([], 10) == []


@pytest.mark.parametrize("form", ["packed", "shared"])
def test_rows_are_filled_and_no_long_sample_is_left_out(form):
    # The best that six pieces of 50, 60, 30, 40, 20 and 100 tokens can do with rows of 100.
    pieces = [group(size - 5, (5,), first_token=size) for size in (50, 20, 60, 30, 40, 100)]
    parts = split_by_token_budget(pieces, 100, form)
    assert sorted(sorted(size([g], form) for g in part) for part in parts) == [[20, 30, 50], [40, 60], [100]]
    beyond = [*pieces, group(500, (5,), first_token=7)]
    assert [size(part, form) for part in split_by_token_budget(beyond, 100, form)] == [505, 100, 100, 100]


def test_ragged_samples_leave_little_of_the_budget_unused():
    rng = torch.Generator().manual_seed(0)
    lengths = torch.empty(400).log_normal_(6, 0.9, generator=rng).clamp(20, 4096).int().tolist()
    parts = split_by_token_budget([group(length, (5,), n) for n, length in enumerate(lengths)], 4200, "packed")
    rows = [size(part, "packed") for part in parts]
    assert max(rows) <= 4200
    assert sum(rows) / (4200 * len(rows)) > 0.97
    assert sum(map(len, parts)) == 400


def test_rows_are_padded_and_masked():
    batch = make_batch([group(2, (1, 3), 10, advantages=[0.5, -0.5]), group(4, (2,), 20, advantages=[2.0])])
    assert batch.input_ids_RT.tolist() == [
        [0, 0, 10, 11, 100, 0, 0],
        [0, 0, 10, 11, 100, 101, 102],
        [20, 21, 22, 23, 100, 101, 0],
    ]
    assert batch.attention_mask_RT.tolist() == [
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 0],
    ]
    assert batch.completion_ids_BC.tolist() == [[100, 0, 0], [100, 101, 102], [100, 101, 0]]
    assert batch.mask_BC.tolist() == [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    assert batch.mask_BC.dtype == torch.float32
    assert batch.advantages_B.tolist() == [0.5, -0.5, 2.0]
    assert batch.model_inputs == {}


def test_an_empty_completion_is_a_row_without_trained_tokens():
    batch = make_batch([group(2, (0, 0))])
    assert batch.mask_BC.tolist() == [[0.0], [0.0]]
    assert batch.attention_mask_RT.tolist() == [[1, 1, 0]] * 2


def test_sft_groups_have_no_advantages():
    assert make_batch([group(2, (1,), advantages=[])]).advantages_B.tolist() == [0.0]


def test_every_row_has_its_own_pictures():
    # As many tiles as placeholders: a prompt's picture is there once for each of its completions, in the rows' order.
    groups = [
        group(2, (1, 1), model_inputs=picture(2, 1.0)),
        group(2, (1, 1, 1), model_inputs=picture(1, 5.0)),
        group(2, (1,)),
    ]
    pixels = make_batch(groups).model_inputs["pixel_values"]
    assert pixels[:, 0, 0, 0].tolist() == [1.0] * 4 + [5.0] * 3


def test_pixels_of_a_single_prompt_are_not_copied():
    alone = group(2, (1, 1), model_inputs=picture(2, 1.0))
    assert make_batch([alone], "shared").model_inputs["pixel_values"] is alone.prompt.model_inputs["pixel_values"]


def test_moving_a_batch_moves_every_tensor():
    moved = make_batch([group(model_inputs=picture())]).to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 9
    assert {t.device.type for t in [*tensors, *moved.model_inputs.values()]} == {"meta"}


def test_a_text_batch_gets_the_idle_picture_and_trains_the_same_tokens():
    text, alone = group(4, (2, 3)), make_batch([group(4, (2, 3))])
    (batch,) = make_batches([text], 1000, IDLE)
    assert batch.input_ids_RT.shape == (3, 7)
    assert batch.input_ids_RT[2].tolist() == [0, 0, 7, 8, 9, 0, 0]
    assert batch.mask_BC[2].tolist() == [0.0] * 3
    assert batch.attention_mask_RT[2].tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert batch.model_inputs["pixel_values"].shape == (1, 3, 4, 4)
    for name in ("input_ids_RT", "attention_mask_RT", "completion_ids_BC", "mask_BC", "advantages_B"):
        assert torch.equal(getattr(batch, name)[:2], getattr(alone, name)), name


@pytest.mark.parametrize(
    ("groups", "idle", "rows"),
    [
        ([group(3, (2, 2), model_inputs=picture())], IDLE, 2),
        ([group(3, (2, 2), model_inputs=picture()), group(3, (2, 2))], IDLE, 4),
        ([group(3, (2, 2))], TEXT_IDLE, 2),
    ],
    ids=["a picture", "a picture and text", "an idle group without a picture"],
)
def test_no_idle_row_where_it_is_not_needed(groups, idle, rows):
    (batch,) = make_batches(groups, 1000, idle)
    assert len(batch.input_ids_RT) == rows
    assert batch.mask_BC.sum() == 2 * rows


@pytest.mark.parametrize(("count", "others", "expected"), [(2, 5, 5), (2, 1, 2), (0, 3, 3), (0, 0, 1)])
def test_every_process_has_as_many_batches(count, others, expected):
    groups = [group(6, (4, 4), first_token=i, model_inputs=picture()) for i in range(count)]
    asked = []

    def highest(number):
        asked.append(number)
        return max(number, others)

    batches = make_batches(groups, 20, IDLE, highest)
    assert len(batches) == expected
    assert asked == [max(count, 1)]
    assert [float(batch.mask_BC.sum()) for batch in batches] == [8.0] * count + [0.0] * (expected - count)
    assert all("pixel_values" in batch.model_inputs for batch in batches)


@pytest.mark.parametrize("form", ["shared", "packed", "padded"])
def test_log_probs_of_the_engine_follow_their_completions(form):
    """Through cutting, sorting and prompts computed apart; what no engine wrote has none."""
    log_probs = [[-0.1 * length] * length for length in (2, 7, 4)]
    written = group(6, (2, 7, 4), model_inputs=picture(), log_probs=log_probs)
    found = []
    batches = make_batches([written], 12, IDLE, form=form, prompts_apart=True)
    assert [batch.engine_log_probs_BC is None for batch in batches[:-1]] == [False] * (len(batches) - 1)
    for batch in batches[: -1 if form == "shared" else None]:  # the last is then the idle row alone
        lengths = (batch.completion_ids_BC >= 100).sum(1).tolist()
        rows = zip(lengths, batch.engine_log_probs_BC.tolist(), strict=True)
        found += [row[:length] for length, row in rows if length]
        assert not batch.engine_log_probs_BC[batch.completion_ids_BC < 100].any()
    assert sorted(found, key=len) == [pytest.approx(row) for row in sorted(log_probs, key=len)]
    assert make_batch([group(), IDLE], form).engine_log_probs_BC is None
    assert make_batch([written, IDLE], form).engine_log_probs_BC.shape == (4, 7)
