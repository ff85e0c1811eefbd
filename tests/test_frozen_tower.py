"""A frozen tower runs once for all passes over a micro-batch, and nothing else changes by that."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from families import make_world

from sail_rl.batch import Group, make_batch
from sail_rl.before_update import MiniBatch
from sail_rl.config import GrpoSection, OptimSection, RolloutSection
from sail_rl.data.stream import Shard
from sail_rl.launch import Run
from sail_rl.model.frozen_tower import features_kept, has_frozen_tower, vision_tower
from sail_rl.model.load import freeze
from sail_rl.optimizer import make_optimizer, set_learning_rate
from sail_rl.policy import Policy
from sail_rl.update import update_policy

pytestmark = pytest.mark.usefixtures("one_thread")
ITERATIONS = 2


@pytest.fixture(scope="module", params=["sail_vl2", "qwen3_vl"])
def world(request):
    """A family's model, and two micro-batches: one with pictures of two prompts, one with one."""
    world = make_world(request.param)
    groups = [
        Group(prompt, [[20 + number, 30, 40], [50 + number]], [1.0, -0.5])
        for number, prompt in enumerate(p for p in world.prompts if p.model_inputs)
    ]
    return SimpleNamespace(model=world.model, batches=[make_batch(groups[:2], "shared"), make_batch(groups[1:2])])


def updated(world, frozen):
    """(figures, weights, number of the tower's passes) of one update: the reference's pass and two iterations."""
    model, passes = copy.deepcopy(world.model), []
    for part in frozen:
        freeze(model, part)
    reference = Policy(copy.deepcopy(model).eval())
    grpo, optim = GrpoSection(beta=0.1, num_iterations=ITERATIONS), OptimSection(learning_rate=1e-2, warmup_steps=0)
    recipe = SimpleNamespace(grpo=grpo, optim=optim, rollout=RolloutSection())
    for one in (model, reference):
        vision_tower(one).forward = counting(vision_tower(one).forward, passes)
    optimizer = make_optimizer(model, optim)
    set_learning_rate(optimizer, optim, 1, 2)
    run = Run(recipe, None, Accelerator(cpu=True), Shard())
    figures = update_policy(run, Policy(model), reference, optimizer, [MiniBatch(world.batches, 6.0)], ())
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return figures, weights, len(passes)


def counting(forward, passes):
    def counted(*arguments, **named):
        passes.append("computed")
        return forward(*arguments, **named)

    return counted


def test_each_picture_is_seen_once(world, monkeypatch):
    frozen = ["tower", "adapter"]
    figures, weights, passes = updated(world, frozen)
    assert passes == len(world.batches)
    monkeypatch.setattr("sail_rl.before_update.has_frozen_tower", lambda model: False)
    expected, expected_weights, all_passes = updated(world, frozen)
    assert all_passes == len(world.batches) * (ITERATIONS + 1)
    known = {name: value for name, value in expected.items() if value is not None}  # no engine wrote these completions
    assert {name: figures[name] for name in known} == pytest.approx(known, rel=1e-5, abs=1e-8)
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-7)
    assert figures["kl"] > 0


def test_a_trained_tower_is_computed_in_every_pass(world):
    assert updated(world, [])[2] == len(world.batches) * (ITERATIONS + 1)


def test_what_counts_as_frozen(world):
    model = copy.deepcopy(world.model)
    assert not has_frozen_tower(model)
    for part in ("tower", "adapter"):
        freeze(model, part)
    assert has_frozen_tower(model)
    next(vision_tower(model).parameters()).requires_grad_(True)
    assert not has_frozen_tower(model)
    assert not has_frozen_tower(model.lm_head)


def test_the_tower_is_itself_again(world):
    """Also after an error; an earlier pass's pictures are not mixed up with the next one's."""
    tower, batch = vision_tower(world.model), world.batches[0]
    features: list = []
    with pytest.raises(ZeroDivisionError), features_kept(world.model, features):
        raise ZeroDivisionError
    assert "forward" not in vars(tower)
    policy, found = Policy(world.model), []
    for pixels in (batch.model_inputs["pixel_values"], torch.zeros_like(batch.model_inputs["pixel_values"])):
        features = []
        inputs = batch.model_inputs | {"pixel_values": pixels}
        for _ in range(2):
            with torch.no_grad(), features_kept(world.model, features):
                found.append(policy(replace(batch, model_inputs=inputs)).log_probs_BT)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert not torch.allclose(found[0], found[2])
