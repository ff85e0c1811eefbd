"""What tokens are drawn from, against formulas written out token by token; and the same in engine and trainer."""

import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from tiny_models import FILTERS, dense, groups, processor_for_questions

from rollouts import Filters, Sampling
from rollouts.distribution import drawn_log_probs, drawn_logits, first_places
from rollouts.hf import HFEngine
from sail_rl.batch import Group
from sail_rl.config import GrpoRecipe
from sail_rl.data.packing import idle_group, make_batches
from sail_rl.model.load import image_token_ids
from sail_rl.policy import LOGITS_AT_ONCE, Policy, compute_prompt, token_terms
from sail_rl.sampling import greedy_sampling, tell_filters, training_sampling

R, V, LENGTH, GROUP = 20, 30, 10, 3
pytestmark = pytest.mark.usefixtures("one_thread")


def by_the_book(logits_V, filters, temperature, suppressed, seen):
    """Probabilities of one token, step by step, as vLLM's documentation has them."""
    scores = {}
    for token, logit in enumerate(logits_V):
        if token in suppressed:
            continue
        if token in seen:
            logit = logit / filters.repetition_penalty if logit > 0 else logit * filters.repetition_penalty
        scores[token] = math.exp(logit / temperature)
    scores = {t: s for t, s in scores.items() if s >= filters.min_p * max(scores.values())}
    ordered = sorted(scores, key=scores.get, reverse=True)[: filters.top_k or None]
    left, total = [], sum(scores[t] for t in ordered)
    for token in ordered:
        if sum(scores[t] for t in left) < filters.top_p * total:
            left.append(token)
    total = sum(scores[t] for t in left)
    return [scores[t] / total if t in left else 0.0 for t in range(len(logits_V))]


@pytest.mark.parametrize(("name", "temperature"), list(product(FILTERS, [1.0, 0.6])))
def test_the_formula(name, temperature):
    rng = torch.Generator().manual_seed(0)
    logits_RV = 2 * torch.randn(R, V, generator=rng)
    seen_RV = torch.rand(R, V, generator=rng) < 0.4
    found_RV = drawn_log_probs(logits_RV, temperature, (3, 4), FILTERS[name], seen_RV).exp()
    sizes = set()
    for row in range(R):
        seen = set(seen_RV[row].nonzero()[:, 0].tolist())
        expected_V = by_the_book(logits_RV[row].tolist(), FILTERS[name], temperature, (3, 4), seen)
        assert found_RV[row].tolist() == pytest.approx(expected_V, rel=1e-5)
        sizes.add(sum(value > 0 for value in expected_V))
    assert max(sizes) < V - 2 or name == "repetition_penalty"
    assert max(sizes) > 1


def test_edges():
    logits_RV = torch.tensor([[3.0, 2.0, 2.0, 0.0], [9.0, 1.0, 0.0, -1.0]])
    alike = drawn_log_probs(logits_RV, 1.0, filters=Filters(top_k=2))
    assert alike.isfinite().sum(-1).tolist() == [3, 2]  # tokens that are equally likely stay together
    assert drawn_log_probs(logits_RV, 1.0, filters=Filters(top_p=1e-6)).isfinite().sum(-1).tolist() == [1, 1]
    assert drawn_log_probs(logits_RV, 1.0, filters=Filters(top_k=99)).isfinite().all()
    greedy = drawn_log_probs(logits_RV, 0.0, filters=Filters(top_k=1))
    assert torch.equal(greedy, logits_RV.log_softmax(-1))  # nothing to cut where nothing is drawn


def test_a_drawn_token_is_never_cut_and_tokens_cut_off_have_no_gradient():
    logits_RV = torch.tensor([[3.0, 2.0, 1.0, 0.0]], requires_grad=True)
    log_probs_RV = drawn_logits(logits_RV, 1.0, filters=Filters(top_k=2), drawn_R=torch.tensor([3])).log_softmax(-1)
    expected = torch.tensor([[3.0, 2.0, -torch.inf, 0.0]]).log_softmax(-1)
    assert torch.allclose(log_probs_RV, expected)
    log_probs_RV[0, 0].backward()
    share = torch.tensor([3.0, 2.0, -torch.inf, 0.0]).softmax(-1)
    assert torch.allclose(logits_RV.grad[0], torch.tensor([1.0, 0, 0, 0]) - share)
    assert logits_RV.grad[0, 2] == 0


def test_first_places():
    places = first_places(torch.tensor([[-1, 5], [2, 5]]), torch.tensor([[1, 5, 1], [0, 0, 3]]), 6)
    never = torch.iinfo(torch.int32).max
    assert places.tolist() == [[never, 0, never, never, never, -1], [0, never, -1, 2, never, -1]]


@pytest.fixture(scope="module")
def world():
    processor = processor_for_questions()
    model = dense(processor)
    prompts = [replace(group.prompt, seed=number) for number, group in enumerate(groups(processor))]
    suppressed = image_token_ids(model, processor)
    engine = HFEngine(model, processor.tokenizer, suppressed)
    return SimpleNamespace(model=model, processor=processor, prompts=prompts, suppressed=suppressed, engine=engine)


@pytest.mark.parametrize("form", ["shared", "packed", "padded", "prompts apart"])
def test_trainer_and_engine_agree_in_every_layout(world, form):
    """The engine's log-probabilities are the trainer's, and far from those without the filters."""
    model = Policy(world.model).model
    for name, filters in FILTERS.items():
        rollouts = world.engine.generate(world.prompts, GROUP, Sampling(LENGTH, 0.9, seed=3, filters=filters))
        written = [rollouts[i * GROUP : (i + 1) * GROUP] for i in range(len(world.prompts))]
        work = [
            Group(prompt, [r.token_ids for r in group], log_probs=[r.log_probs for r in group])
            for prompt, group in zip(world.prompts, written, strict=True)
        ]
        idle = idle_group(world.processor, with_picture=False)
        apart = form == "prompts apart"
        batches = make_batches(work, 25 if apart else 1000, idle, form="shared" if apart else form, prompts_apart=apart)
        gaps, plain = [], []
        with torch.no_grad():
            for batch in (batch for batch in batches if batch.engine_log_probs_BC is not None):
                prompt = compute_prompt(model, batch.prompt) if batch.prompt else None
                for found, used in ((gaps, filters), (plain, None)):
                    terms = token_terms(model, batch, 0.9, world.suppressed, prompt, used)
                    found.append((terms.log_probs_BT - batch.engine_log_probs_BC)[batch.mask_BC > 0].abs())
        assert apart == any(batch.prompt is not None for batch in batches)
        assert torch.cat(gaps).max() < 1e-4, name
        assert torch.cat(plain).max() > 0.1, name


def test_logits_in_parts_are_filtered_alike(world, monkeypatch):
    group = Group(world.prompts[1], [[80, 81, 80, 82], [83, 80]])
    (batch,) = make_batches([group], 1000, group)
    sizes = []
    own = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda t, *args: sizes.append(args) or own(t, *args))
    whole = token_terms(world.model, batch, 1.0, world.suppressed, filters=FILTERS["all"])
    assert not sizes
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", 2 * world.model.config.text_config.vocab_size)
    parts = token_terms(world.model, batch, 1.0, world.suppressed, filters=FILTERS["all"])
    assert sizes
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_stop_texts(world):
    """A completion ends with the token that completes a text, wherever the text began, and keeps it."""
    sampling = Sampling(LENGTH, seed=5)
    full = world.engine.generate(world.prompts, GROUP, sampling)
    across = world.processor.tokenizer.decode(full[0].token_ids[2:5], skip_special_tokens=True)[1:]
    stops = (across, world.processor.tokenizer.decode(full[4].token_ids[:1]))
    stopped = world.engine.generate(world.prompts, GROUP, replace(sampling, stop=stops))
    assert (stopped[0].token_ids, stopped[0].finish_reason) == (full[0].token_ids[:5], "stop")
    assert (stopped[4].token_ids, stopped[4].finish_reason) == (full[4].token_ids[:1], "stop")
    for before, after in zip(full, stopped, strict=True):
        ends = [n for n in range(1, LENGTH + 1) if any(text in decoded(world, before.token_ids[:n]) for text in stops)]
        assert after.token_ids == before.token_ids[: min(ends, default=LENGTH)]
        assert after.text == decoded(world, after.token_ids)
        assert len(after.log_probs) == len(after.token_ids)


def decoded(world, token_ids):
    return world.processor.tokenizer.decode(token_ids, skip_special_tokens=True)


def recipe(**rollout):
    required = {"model": {"random_init": "tiny"}, "data": {"train": "pictures"}, "rewards": [{"function": "accuracy"}]}
    return GrpoRecipe.model_validate(
        required | {"output_dir": "x", "seed": 7, "trainer": {"max_steps": 1}, "rollout": rollout}
    )


def test_the_recipes_keys(capsys):
    keys = {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "stop": ["###"], "temperature": 0.8}
    given = recipe(**keys, max_completion_length=LENGTH, seed=9)
    assert training_sampling(given) == Sampling(LENGTH, 0.8, 9, Filters(1.1, 0.1, 5, 0.9), ("###",))
    assert greedy_sampling(given) == Sampling(LENGTH, 0.0, stop=("###",))
    assert training_sampling(recipe()) == Sampling(256, seed=7)
    tell_filters(SimpleNamespace(recipe=recipe(), is_main=True))
    assert not capsys.readouterr().out
    tell_filters(SimpleNamespace(recipe=given, is_main=True))
    told = capsys.readouterr().out
    assert "sampling is cut (rollout.top_p = 0.9, rollout.top_k = 5, rollout.min_p = 0.1)" in told
    assert "rollout.repetition_penalty = 1.1" in told
