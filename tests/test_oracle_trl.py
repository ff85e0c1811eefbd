"""TRL 1.16's GRPOTrainer is the oracle: the same rollouts give the same advantages, loss, gradient and log figures.

Nothing of TRL's is written out again here. Its real trainer takes the dataset rows (pictures included, 0, 1 and 2 a
row, one of them tiled), tokenises, pads, encodes the pictures, scores, computes advantages, old and reference
log-probabilities, and then the loss, on the tiny SAIL-VL2. Only the completions are given to it, by its `rollout_func`,
and the reference model, since TRL's loader knows no class from outside transformers.

On our side the functions of `train_grpo.py` run unchanged: `group_advantages`, `make_groups`, `make_mini_batches`,
`update_policy`. Off-policy is as in real life: old log-probabilities come from the weights before
a step, and the gradient that is compared is the second one, after the step.

`use_bias_correction_kl` is off on TRL's side unless a test says otherwise: it is by default, and on ours not.
"""

import copy
import math
import os
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from PIL import Image

from rollouts import Prompt, Rollout
from sail_rl.advantage import advantages_of_each, group_advantages
from sail_rl.config import GrpoSection, RolloutSection, UpdateSection
from sail_rl.data.packing import idle_group
from sail_rl.data.stream import Shard
from sail_rl.launch import Run
from sail_rl.mini_batches import make_mini_batches
from sail_rl.model.tiny import tiny_model, tiny_processor
from sail_rl.policy import Policy
from sail_rl.questions import Question
from sail_rl.scoring import Outcome
from sail_rl.update import make_groups, update_policy

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

# What both sides are told; `gspo` is the name of two settings together.
LOSSES = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 1.5, "sapo_temperature_neg": 2.5},
}
PLAIN = ("grpo", "dr_grpo", "dapo")
GROUP, LONGEST = 4, 24
# Text, sizes of its pictures (the wide one becomes two tiles and a thumbnail), rewards of the group.
QUESTIONS = [
    ("how many red cards are there?", [(56, 56)], (1.0, 0.0, 0.5, 1.0)),
    ("add the two numbers in the pictures", [(112, 56), (56, 56)], (0.0, 0.0, 1.0, 0.0)),
    ("what colour has it?", [(56, 56)], (0.7, 0.7, 0.7, 0.7)),
    ("what is four plus five? say nothing else", [], (0.25, 1.0, 0.0, 0.1)),
]
QUESTION_TEXTS = [text for text, *_ in QUESTIONS]
REWARDS = torch.tensor([reward for *_, rewards in QUESTIONS for reward in rewards])
BIG, SMALL = 100_000, 200  # token budgets: all rows in one micro-batch; each group in its own
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world():
    """Model, reference, prompts and completions that both sides share."""
    processor = tiny_processor([text for text, *_ in QUESTIONS] * 3, max_tiles=4)
    policy = tiny_model(processor, seed=0)
    policy.lm_head.weight.data *= 3  # far from uniform, as a trained model is
    rng, rows, prompts = np.random.default_rng(0), [], []
    for text, sizes, _ in QUESTIONS:
        images = [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for size in sizes]
        messages = [{"role": "user", "content": [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]}]
        chat = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        encoded = processor(text=[chat], images=images or None, return_tensors="pt")
        pixels = {"pixel_values": encoded["pixel_values"]} if images else {}
        prompts.append(Prompt(text, encoded["input_ids"][0].tolist(), tuple(images), pixels))
        rows += [{"prompt": [{"role": "user", "content": text}], "images": images} for _ in range(GROUP)]
    lengths = rng.permutation(np.linspace(1, LONGEST - 1, len(rows)).astype(int))
    completions = [rng.integers(0, 250, length).tolist() for length in lengths]
    return SimpleNamespace(
        processor=processor,
        policy=policy,
        reference=nudge(copy.deepcopy(policy), seed=1).eval(),
        rows=rows,
        questions=[Question(None, prompt) for prompt in prompts],
        rollouts=[Rollout(ids, [0.0] * len(ids), "", "stop", 0) for ids in completions],
        idle=idle_group(processor, with_picture=True),
    )


def nudge(model, seed, size=0.1):
    """Change every weight by a random share of its parameter's size, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for weights in (parameter.data for parameter in model.parameters()):
        weights += size * weights.std(correction=0) * torch.randn(weights.shape, generator=generator)
    return model


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def losses(names=LOSSES):
    return pytest.mark.parametrize("loss", names)


def trl_trainer(world, model, rewards, tmp_path, monkeypatch, **settings):
    """The real trainer; it gets our completions and rewards row by row."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import grpo_trainer

    def rollout_func(prompts, trainer):
        prompt_ids = [question.prompt.token_ids for question in world.questions for _ in range(GROUP)]
        completion_ids = [rollout.token_ids for rollout in world.rollouts]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

    def reward_of(number, values):
        def reward(completions, **columns):
            return [None if math.isnan(value) else value for value in values.tolist()]

        reward.__name__ = f"reward{number}"
        return reward

    settings |= {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    settings |= {"per_device_train_batch_size": len(world.rows), "num_generations": GROUP}
    settings = {"use_bias_correction_kl": False} | settings | {"max_completion_length": LONGEST}
    args = GRPOConfig(str(tmp_path), **settings)
    monkeypatch.setattr(grpo_trainer, "create_model_from_path", lambda *_, **__: copy.deepcopy(world.reference))
    data, processor = Dataset.from_list([{"prompt": "unused"}]), world.processor
    functions = [reward_of(*pair) for pair in enumerate(rewards.view(len(rewards), -1).unbind(1))]
    trainer = GRPOTrainer(model, functions, args, data, processing_class=processor, rollout_func=rollout_func)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as its training loop would
    return trainer


def trl_side(world, tmp_path, monkeypatch, off_policy, **settings):
    """(loss, gradient of every parameter, TRL's own log figures)."""
    settings["num_iterations"] = 2 if off_policy else 1
    model = copy.deepcopy(world.policy)
    trainer = trl_trainer(world, model, REWARDS, tmp_path, monkeypatch, **settings)
    inputs = trainer._generate_and_score_completions(world.rows)
    assert ("old_per_token_logps" in inputs) == off_policy  # else TRL, too, takes the current ones
    if off_policy:
        nudge(model, seed=2)
    (loss := trainer._compute_loss(model, inputs)).backward()
    return loss.item(), gradients(model), {name: values[-1] for name, values in trainer._metrics["train"].items()}


class Recorder:
    """Stands in for accelerator and optimizer: notes loss and gradient; a step nudges the weights."""

    device = torch.device("cpu")
    distributed_type = DistributedType.NO

    def __init__(self, model):
        self.model, self.losses, self.gradients = model, [], []

    def zero_grad(self):
        self.model.zero_grad()
        self.losses.append(0.0)

    def backward(self, loss):
        loss.backward()
        self.losses[-1] += loss.item()

    def no_sync(self, model):
        return nullcontext()

    def autocast(self):
        return nullcontext()

    def unwrap_model(self, model):
        return model

    def clip_grad_norm_(self, parameters, max_norm):
        return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])

    def step(self):
        self.gradients.append(gradients(self.model))
        nudge(self.model, seed=2)


def our_side(
    world,
    off_policy,
    token_budget=BIG,
    keep_all=True,
    idle=None,
    temperature=1.0,
    form="padded",
    apart=False,
    **settings,
):
    """(loss, gradient of every parameter, log figures, rows of each micro-batch), by what `train_grpo.py` calls."""
    grpo = GrpoSection(**settings, num_iterations=2 if off_policy else 1)
    model = copy.deepcopy(world.policy).train()
    recorder = Recorder(model)
    rollout = RolloutSection(temperature=temperature, num_generations=GROUP, max_completion_length=LONGEST)
    update, optim = UpdateSection(token_budget=token_budget), SimpleNamespace(max_grad_norm=math.inf)
    run = Run(SimpleNamespace(grpo=grpo, rollout=rollout, update=update, optim=optim), None, recorder, Shard())
    rewards = REWARDS.view(-1, GROUP)[[QUESTION_TEXTS.index(q.prompt.id) for q in world.questions]].flatten()
    advantages = group_advantages(rewards, GROUP, grpo.scale_rewards)
    masked = grpo.mask_truncated_completions
    groups = make_groups(world.questions, world.rollouts, advantages, Shard(), keep_all, masked)
    idle = idle or idle_group(world.processor, with_picture=False)
    outcomes = [Outcome(len(r.token_ids), r.finish_reason == "length", 1.0, {}, {}, {}) for r in world.rollouts]
    mini_batches = make_mini_batches(run, groups, outcomes, advantages, idle, form, apart, token_budget)
    reference = Policy(world.reference) if grpo.beta else None
    policy = Policy(model, train_entropy=grpo.entropy_coef > 0)
    figures = update_policy(run, policy, reference, recorder, mini_batches, suppressed=())
    rows = [len(batch.mask_BC) for mini_batch in mini_batches for batch in mini_batch.batches]
    return recorder.losses[-1], recorder.gradients[-1], figures, rows


def assert_same(ours, theirs, tolerance=1e-5):
    """Loss within a relative `tolerance` (or 1e-7: some are 0); each gradient within that of its own largest entry."""
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance, abs=tolerance * 1e-2)
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        largest = expected.abs().max()
        assert largest > 0, name
        assert (ours[1][name] - expected).abs().max() <= tolerance * largest, name


@losses()
@pytest.mark.parametrize(
    ("off_policy", "beta", "temperature"), [(False, 0.0, 1.0), (False, 0.04, 0.7), (True, 0.0, 0.7), (True, 0.04, 1.0)]
)
def test_loss_and_gradient_equal_trl(world, tmp_path, monkeypatch, loss, off_policy, beta, temperature):
    settings = {"beta": beta, "temperature": temperature, "epsilon": 0.1, "epsilon_high": 0.2} | LOSSES[loss]
    settings |= {"scale_rewards": "batch" if off_policy else "group"}
    *theirs, metrics = trl_side(world, tmp_path, monkeypatch, off_policy, **settings)
    for form in ("packed", "shared", "padded"):
        *ours, figures, rows = our_side(world, off_policy, form=form, **settings)
        assert rows == [len(world.rows)]
        assert_same(ours, theirs, 3e-5 if loss == "sapo" else 1e-5)  # float32: 1.07e-5 was seen of sapo
    if off_policy:  # our figures are means over both iterations, and the first clips nothing
        assert (figures["clip_fraction"] > 0.025) == (loss != "sapo")
    if loss in PLAIN:  # TRL counts sequences of `gspo`, and of `cispo` those of positive advantage
        clipped = metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]
        assert figures["clip_fraction"] * (1 + off_policy) == pytest.approx(clipped, rel=1e-5)
    if not off_policy:
        assert figures["clip_fraction"] == 0
        assert figures["entropy"] == pytest.approx(metrics["entropy"], rel=1e-5)
        assert (figures["kl"] or 0) == pytest.approx(metrics.get("kl", 0), rel=1e-5)
        assert beta == 0 or figures["kl"] > 0.01


MORE = {
    "KL term times ratio": (True, {"loss_type": "dapo", "beta": 0.5, "use_bias_correction_kl": True}),
    "KL term times ratio of sequences": (True, {**LOSSES["gspo"], "beta": 0.5, "use_bias_correction_kl": True}),
    "entropy bonus": (False, {"loss_type": "grpo", "entropy_coef": 0.1}),
    "entropy bonus, cold": (True, {"loss_type": "dr_grpo", "entropy_coef": 0.1, "temperature": 0.7}),
    "high entropy": (False, {"loss_type": "dapo", "top_entropy_quantile": 0.2, "beta": 0.04}),
    "bonus of high entropy": (False, {"loss_type": "grpo", "top_entropy_quantile": 0.3, "entropy_coef": 0.1}),
}


@pytest.mark.parametrize("case", MORE)
def test_other_terms_equal_trl(world, tmp_path, monkeypatch, case):
    """And in micro-batches, which TRL's high-entropy mask is not the same in: there ours is that of the whole step."""
    off_policy, settings = MORE[case]
    theirs = trl_side(world, tmp_path, monkeypatch, off_policy, **settings)
    for form, budget in (("shared", BIG), ("padded", BIG), ("shared", SMALL)):
        ours = our_side(world, off_policy, budget, form=form, idle=world.idle, **settings)
        assert (len(ours[3]) > 1) == (budget == SMALL)
        assert_same(ours, theirs)


@losses(("grpo", "dr_grpo", "dapo"))
def test_truncated_completions_are_masked_as_in_trl(world, tmp_path, monkeypatch, loss):
    """Every other completion ends with an end token. The others count for the baselines, and as completions."""
    end = world.processor.tokenizer.eos_token_id
    ended = [[*r.token_ids[:-1], end] if n % 2 else r.token_ids for n, r in enumerate(world.rollouts)]
    rollouts = [Rollout(ids, [0.0] * len(ids), "", "stop" if n % 2 else "length", 0) for n, ids in enumerate(ended)]
    world = SimpleNamespace(**vars(world) | {"rollouts": rollouts})
    settings = LOSSES[loss] | {"beta": 0.04, "mask_truncated_completions": True}
    theirs = trl_side(world, tmp_path, monkeypatch, True, **settings)
    ours = our_side(world, True, **settings)
    assert ours[3] == [len(world.rows) // 2]
    assert_same(ours, theirs)


@losses()
def test_micro_batches_and_idle_rows_change_nothing(world, loss):
    settings = {"beta": 0.04, "epsilon": 0.1, "temperature": 0.7} | LOSSES[loss]
    settings |= {"entropy_coef": 0.05, "top_entropy_quantile": 0.3}
    *whole, _, _ = our_side(world, off_policy=True, **settings)
    *cut, _, rows = our_side(world, off_policy=True, token_budget=SMALL, idle=world.idle, **settings)
    # A group beyond the budget is cut; the batch of text alone got the idle row.
    assert sorted(rows) == [2, 2, GROUP, GROUP, GROUP + 1]
    assert_same(cut, whole, tolerance=3e-5)  # the sums of float32 are in another order


@losses()
def test_prompts_computed_apart_change_nothing(world, loss, monkeypatch):
    """Two iterations and a KL term; every group is beyond the budget, and no row computes its prompt for itself."""
    settings = {"beta": 0.04, "epsilon": 0.1, "temperature": 0.7} | LOSSES[loss]
    settings |= {"entropy_coef": 0.05, "top_entropy_quantile": 0.3}
    *whole, _, _ = our_side(world, off_policy=True, **settings)
    monkeypatch.setattr("sail_rl.policy.compute_prompt", None)
    *apart, _, rows = our_side(world, off_policy=True, form="shared", token_budget=8, apart=True, **settings)
    assert len(rows) > len(world.rows) / GROUP + 1  # the last is the idle row
    assert_same(apart, whole, tolerance=3e-5)


@losses()
def test_leaving_out_groups_without_signal_changes_nothing(world, loss):
    *everything, figures, _ = our_side(world, off_policy=True, **LOSSES[loss])
    *some, fewer, rows = our_side(world, off_policy=True, keep_all=False, **LOSSES[loss])
    assert rows == [len(world.rows) - GROUP]
    assert fewer["tokens/trained"] < figures["tokens/trained"]
    assert_same(some, everything)


@losses()
def test_a_later_mini_batch_is_trained_against_the_policy_before_the_first(world, loss):
    """The second of two equals a second iteration over its groups alone, after the same step."""
    odd = [number for number in range(len(QUESTIONS)) if number % 2]
    half = SimpleNamespace(**vars(world))
    half.questions = [world.questions[number] for number in odd]
    half.rollouts = [world.rollouts[number * GROUP + member] for number in odd for member in range(GROUP)]
    settings = {"beta": 0.04, "epsilon": 0.1} | LOSSES[loss]
    *ours, figures, rows = our_side(world, off_policy=False, mini_batches=2, **settings)
    *alone, _, _ = our_side(half, off_policy=True, **settings)
    assert rows == [2 * GROUP, 2 * GROUP]
    assert (figures["clip_fraction"] > 0) == (loss != "sapo")
    assert_same(ours, alone, tolerance=3e-5)


@pytest.mark.parametrize("unscored", [(), (0, 5)])
def test_rewards_normalised_one_by_one_equal_trl(world, tmp_path, monkeypatch, unscored):
    """GDPO: a reward of large numbers, one of small ones that two groups lack, and completions without any."""
    rewards = torch.rand(len(world.rows), 2, generator=torch.Generator().manual_seed(3)) * torch.tensor([10.0, 0.1])
    rewards[4:12, 1] = torch.nan
    rewards[12:, 0] = 0.5
    rewards[list(unscored)] = torch.nan
    model, weights = copy.deepcopy(world.policy), [0.3, 0.7]
    settings = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": weights}
    trainer = trl_trainer(world, model, rewards, tmp_path, monkeypatch, **settings)
    text_rows = [{"prompt": row["prompt"]} for row in world.rows]
    theirs = trainer._generate_and_score_completions(text_rows)["advantages"]
    ours = advantages_of_each(rewards, torch.tensor(weights), GROUP)
    torch.testing.assert_close(ours.values_N, theirs, rtol=1e-4, atol=2e-5)
    assert ours.has_signal_P.all()
    assert ours.scored_N.tolist() == [number not in unscored for number in range(len(world.rows))]


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("unscored", [(), (1, 4, 5, 6, 8, 9, 10, 11)])
def test_advantages_equal_trl(world, tmp_path, monkeypatch, scale_rewards, unscored):
    """Random rewards; one group with equal ones; and a group with one, a group with three and one with none."""
    rewards = torch.rand(len(world.rows), generator=torch.Generator().manual_seed(len(unscored)))
    rewards[12:] = 0.1
    rewards[list(unscored)] = torch.nan
    model = copy.deepcopy(world.policy)
    trainer = trl_trainer(world, model, rewards, tmp_path, monkeypatch, scale_rewards=scale_rewards)
    text_rows = [{"prompt": row["prompt"]} for row in world.rows]
    theirs = trainer._generate_and_score_completions(text_rows)["advantages"]
    ours = group_advantages(rewards, GROUP, scale_rewards)
    torch.testing.assert_close(ours.values_N, theirs, rtol=1e-5, atol=1e-6)
    assert ours.values_N.abs().max() > 0.1
    assert not ours.values_N[12:].any()
    assert ours.has_signal_P.tolist() == [True, not unscored, not unscored, False]
