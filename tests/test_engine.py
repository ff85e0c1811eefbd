"""The HF engine on the tiny SAIL-VL2, against transformers' own generate and the trainer's forward pass."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import completion_logits

from rollouts import Prompt, Sampling
from rollouts.hf import HFEngine
from sail_rl.batch import Group, make_batch
from sail_rl.model.load import image_token_ids
from sail_rl.model.tiny import tiny_model, tiny_processor
from sail_rl.policy import token_terms

LENGTH = 12
# Text and sizes of its pictures; the wide one becomes two tiles and a thumbnail.
QUESTIONS = [
    ("what is four plus five? say nothing else, and do not explain", []),
    ("how many red cards?", [(56, 56)]),
    ("add the two numbers", [(112, 56), (56, 56)]),
    ("hm?", []),
    ("which bar of the chart is the tallest one?", [(80, 60)]),
]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world():
    """Model, prompts with 0, 1 and 2 pictures, and the tokens that stand for pictures."""
    processor = tiny_processor([text for text, _ in QUESTIONS] * 3, max_tiles=4)
    model = tiny_model(processor, seed=0)
    model.lm_head.weight.data *= 3  # far from uniform, as a trained model is
    rng, prompts = np.random.default_rng(0), []
    for seed, (text, sizes) in enumerate(QUESTIONS):
        images = [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for size in sizes]
        messages = [{"role": "user", "content": [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]}]
        chat = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        encoded = processor(text=[chat], images=images or None, return_tensors="pt")
        pixels = {"pixel_values": encoded["pixel_values"]} if images else {}
        prompts.append(Prompt(text, encoded["input_ids"][0].tolist(), tuple(images), pixels, seed))
    assert len({len(prompt.token_ids) for prompt in prompts}) == len(prompts)
    return SimpleNamespace(
        model=model, tokenizer=processor.tokenizer, prompts=prompts, suppressed=image_token_ids(model, processor)
    )


def engine_of(world, model=None, suppressed=None, **settings):
    suppressed = world.suppressed if suppressed is None else suppressed
    return HFEngine(model or world.model, world.tokenizer, suppressed, **settings)


def trainer_log_probs(world, prompt, rollouts, temperature):
    """What the update computes for a group's completions: lists of their own lengths."""
    batch = make_batch([Group(prompt, [rollout.token_ids for rollout in rollouts])])
    with torch.no_grad():
        log_probs_BC = token_terms(world.model, batch, temperature, world.suppressed).log_probs_BT
    return [row[: len(rollout.token_ids)].tolist() for row, rollout in zip(log_probs_BC, rollouts, strict=True)]


def tokens(rollouts):
    return [rollout.token_ids for rollout in rollouts]


def test_greedy_equals_plain_generate(world):
    """Row by row, without padding, without our reading of the prompt into a cache."""
    ours = engine_of(world).generate(world.prompts, 1, Sampling(LENGTH, temperature=0))
    for prompt, rollout in zip(world.prompts, ours, strict=True):
        input_ids = torch.tensor([prompt.token_ids])
        output = world.model.eval().generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=LENGTH,
            do_sample=False,
            suppress_tokens=world.suppressed,
            **prompt.model_inputs,
        )
        assert rollout.token_ids == output[0, input_ids.shape[1] :].tolist()
    assert len({tuple(ids) for ids in tokens(ours)}) == len(ours)  # the answers differ, so that they can be told apart


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_log_probs_are_the_trainers(world, temperature):
    rollouts = engine_of(world).generate(world.prompts, 3, Sampling(LENGTH, temperature, seed=3))
    for number, prompt in enumerate(world.prompts):
        group = rollouts[3 * number : 3 * number + 3]
        for rollout, expected in zip(group, trainer_log_probs(world, prompt, group, temperature or 1.0), strict=True):
            assert rollout.log_probs == pytest.approx(expected, abs=1e-4)
            assert min(expected) < -0.5


@pytest.mark.parametrize("batch_size", [3, 6, 256])
def test_a_completion_does_not_depend_on_its_batch(world, batch_size):
    sampling = Sampling(LENGTH, seed=1)
    together = engine_of(world, batch_size=batch_size).generate(world.prompts, 3, sampling)
    alone = [rollout for prompt in world.prompts for rollout in engine_of(world).generate([prompt], 3, sampling)]
    assert tokens(together) == tokens(alone)
    for one, other in zip(together, alone, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
    backwards = engine_of(world).generate(world.prompts[::-1], 3, sampling)
    assert sorted(tokens(backwards)) == sorted(tokens(together))
    smaller_group = engine_of(world).generate(world.prompts, 2, sampling)
    assert tokens(smaller_group) == [ids for i, ids in enumerate(tokens(together)) if i % 3 < 2]


def test_the_seed_decides(world):
    engine = engine_of(world)
    first = engine.generate(world.prompts, 2, Sampling(LENGTH, seed=1))
    assert engine.generate(world.prompts, 2, Sampling(LENGTH, seed=1)) == first
    for one, other in zip(first, engine.generate(world.prompts, 2, Sampling(LENGTH, seed=2)), strict=True):
        assert one.token_ids != other.token_ids
    elsewhere = [replace(prompt, seed=prompt.seed + 100) for prompt in world.prompts]
    for one, other in zip(first, engine.generate(elsewhere, 2, Sampling(LENGTH, seed=1)), strict=True):
        assert one.token_ids != other.token_ids
    for member, other in zip(first[::2], first[1::2], strict=True):
        assert member.token_ids != other.token_ids


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_suppressed_tokens_never_appear(world, temperature):
    """Even where the model wants nothing else."""
    model, wanted = copy.deepcopy(world.model), [*world.suppressed, 70]
    boost_V = torch.zeros(len(world.tokenizer)).index_fill(0, torch.tensor(wanted), 90.0)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + boost_V)
    sampling = Sampling(LENGTH, temperature)
    unhindered = engine_of(world, model, suppressed=()).generate(world.prompts[:1], 4, sampling)
    assert {token for ids in tokens(unhindered) for token in ids} <= set(wanted)
    hindered = engine_of(world, model, suppressed=wanted).generate(world.prompts, 4, sampling)
    assert not {token for ids in tokens(hindered) for token in ids} & set(wanted)
    assert all(np.isfinite(rollout.log_probs).all() for rollout in hindered)


def test_finish_reason_and_end_tokens(world):
    """A completion ends with the first of the model's end tokens, and keeps it; one without any is cut by length."""
    sampling = Sampling(LENGTH, temperature=0)
    model = copy.deepcopy(world.model)
    model.lm_head.weight.data[world.tokenizer.eos_token_id] = 0  # too unlikely to be written
    endless = engine_of(world, model).generate(world.prompts, 1, sampling)
    assert {rollout.finish_reason for rollout in endless} == {"length"}
    assert {len(rollout.token_ids) for rollout in endless} == {LENGTH}
    end = endless[1].token_ids[4]
    # Padding, too, is an end token of the released models.
    model.generation_config.eos_token_id = [world.tokenizer.eos_token_id, world.tokenizer.pad_token_id, end]
    ended = engine_of(world, model).generate(world.prompts, 1, sampling)
    assert ended[1].finish_reason == "stop"
    for full, short in zip(endless, ended, strict=True):
        found = end in full.token_ids
        length = full.token_ids.index(end) + 1 if found else LENGTH
        assert short.finish_reason == ("stop" if found else "length")
        assert short.token_ids == full.token_ids[:length]
        assert len(short.log_probs) == length
        assert short.text == world.tokenizer.decode(short.token_ids, skip_special_tokens=True)
    assert {rollout.finish_reason for rollout in ended} == {"stop", "length"}


def test_the_pictures_are_seen(world):
    """A blank picture, or the two pictures of a prompt exchanged, changes what comes."""
    sampling = Sampling(LENGTH, temperature=0)
    seen = engine_of(world).generate(world.prompts, 1, sampling)
    pixels = [prompt.model_inputs.get("pixel_values") for prompt in world.prompts]
    for change in (torch.zeros_like, lambda tiles_N: tiles_N.flip(0)):
        changed = [
            prompt if tiles is None else replace(prompt, model_inputs={"pixel_values": change(tiles)})
            for prompt, tiles in zip(world.prompts, pixels, strict=True)
        ]
        others = engine_of(world).generate(changed, 1, sampling)
        for tiles, one, other in zip(pixels, seen, others, strict=True):
            same = tiles is None or torch.equal(change(tiles), tiles)
            assert (one.log_probs == pytest.approx(other.log_probs, abs=1e-3)) == same


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_first_tokens_follow_the_distribution(world, temperature):
    """Pearson's statistic over the tokens that are likely enough, the others as one."""
    prompt, draws = world.prompts[1], 3000
    rollouts = engine_of(world).generate([prompt], draws, Sampling(1, temperature, seed=5))
    counts_V = np.bincount([rollout.token_ids[0] for rollout in rollouts], minlength=len(world.tokenizer))
    with torch.no_grad():
        logits_V = completion_logits(world.model, make_batch([Group(prompt, [[70]])]))[0, 0].double()
    logits_V[world.suppressed] = -torch.inf
    expected_V = draws * torch.softmax(logits_V / temperature, -1).numpy()
    likely_V = expected_V >= 8
    observed = np.append(counts_V[likely_V], counts_V[~likely_V].sum())
    expected = np.append(expected_V[likely_V], expected_V[~likely_V].sum())
    assert expected.sum() == pytest.approx(draws, rel=1e-4)
    assert len(expected) > 10
    freedom = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert freedom - 5 * (2 * freedom) ** 0.5 < statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_weights_and_mode_belong_to_the_trainer(world):
    """Rollouts carry the version that was loaded last; the model is left in the mode it was in."""
    engine = engine_of(world)
    for version, training in ((7, True), (8, False)):
        engine.load_weights(iter(()), version)
        world.model.train(training)
        assert engine.generate(world.prompts[:1], 1, Sampling(2))[0].weight_version == version
        assert world.model.training == training


def test_rows_that_have_ended_leave_the_batch(world):
    """Few are left at the end, and each completion is what it is alone."""
    sampling, sizes, model = Sampling(40, seed=2), [], copy.deepcopy(world.model)
    # About one token in ten ends a completion.
    model.lm_head.weight.data[world.tokenizer.eos_token_id] = 0
    boost_V = torch.zeros(len(world.tokenizer)).index_fill(0, torch.tensor([world.tokenizer.eos_token_id]), 2.5)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + boost_V)
    alone = [r for p in world.prompts for r in engine_of(world, model, batch_size=1).generate([p], 4, sampling)]
    model.lm_head.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    together = engine_of(world, model).generate(world.prompts, 4, sampling)
    assert tokens(together) == tokens(alone)
    lengths = [len(ids) for ids in tokens(together)]
    assert len(set(lengths)) > 5
    written = sizes[1:]  # the first call reads the prompts
    assert written[0] == len(together)
    assert written == sorted(written, reverse=True)
    assert len(written) == max(lengths)
    assert sum(written) <= sum(lengths) / (1 - 1 / 8) + max(lengths)
