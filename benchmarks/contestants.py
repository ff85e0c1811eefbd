"""The two sides of a comparison, each as one callable step on the same world: our update, and TRL's GRPOTrainer.

Both run their real code on a copy of the same weights. Nothing that either does once per batch of rollouts, such as
processing pictures, is part of a step.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator

from benchmarks.scaled_model import World
from sail_rl.advantage import group_advantages
from sail_rl.batch import Form
from sail_rl.batch_form import choose_form
from sail_rl.before_update import MiniBatch
from sail_rl.config import GrpoRecipe
from sail_rl.data.packing import idle_group, make_batches
from sail_rl.data.stream import Shard
from sail_rl.launch import Run
from sail_rl.losses import loss_normaliser
from sail_rl.model.cpu_passes import use_fewer_passes
from sail_rl.model.load import prepare_for_training
from sail_rl.model.segment_kernels import Attention
from sail_rl.optimizer import make_optimizer, set_learning_rate
from sail_rl.policy import Policy
from sail_rl.questions import Question
from sail_rl.update import make_groups, update_policy

FORMS: tuple[Form, ...] = get_args(Form)
VARIANTS = ("trl", *FORMS)
FOLDER = "runs/benchmarks"
TOLERANCE = 1e-4  # relative; float32 sums in another order differ by about 1e-6


@dataclass(frozen=True)
class Outcome:
    """What a step reports; equal work gives equal outcomes."""

    loss: float
    grad_norm: float
    entropy: float


@dataclass(frozen=True)
class Contestant:
    """One side, ready to step."""

    model: torch.nn.Module
    """Its gradients are those of the last step, clipped."""
    step: Callable[[], Outcome]
    settings: dict[str, Any]
    """What matters of its configuration."""


def make_contestant(variant: str, world: World) -> Contestant:
    """TRL, or ours with batches of a form."""
    return trl_contestant(world) if variant == "trl" else our_contestant(world, variant)


def our_contestant(
    world: World,
    mode: str,
    *,
    change: Callable[[Any], None] = lambda policy: None,
    optimizer_of: Callable[..., torch.optim.Optimizer] = make_optimizer,
    accelerator: Accelerator | None = None,
    token_budget: int | None = None,
    shard: Shard | None = None,
    policy: Any = None,
    attention: Attention = "sdpa",
    trainer: Mapping[str, Any] | None = None,
) -> Contestant:
    """What train_grpo.py does between `make_batches` and the end of `update_policy`, with a change to the model.

    `policy` is trained itself; without it a copy of the world's model is.
    """
    recipe = our_recipe(mode, trainer or {})
    if policy is None:
        policy = copy.deepcopy(world.model)
        use_fewer_passes(policy)  # as `load_model` does
    prepare_for_training(policy, recipe.trainer.gradient_checkpointing)
    run = Run(recipe, Path(recipe.output_dir), accelerator or Accelerator(cpu=True), shard or Shard())
    model, optimizer = run.accelerator.prepare(Policy(policy, attention), optimizer_of(policy, recipe.optim))
    set_learning_rate(optimizer, recipe.optim, step=1, max_steps=1)
    idle = idle_group(world.processor, with_picture=run.shard.world_size > 1)
    advantages = group_advantages(world.rewards_N, world.cell.size, recipe.grpo.scale_rewards)
    questions = [Question(None, prompt) for prompt in run.shard.slice(world.prompts)]  # type: ignore[arg-type]
    groups = make_groups(questions, run.shard.slice(world.rollouts), advantages, run.shard, keep_all=False)
    form = choose_form(run, policy, groups)
    assert form == mode  # none of them may be given up for this model
    change(policy)

    def step() -> Outcome:
        batches = make_batches(groups, token_budget or recipe.update.token_budget, idle, run.highest, form)
        normaliser = loss_normaliser(recipe.grpo.loss_type, world.lengths, world.cell.completion)
        # TRL rules out no tokens, and with fewer choices the log-probabilities would not be its own.
        figures = update_policy(run, model, None, optimizer, [MiniBatch(batches, normaliser)], suppressed=())
        return Outcome(figures["loss"], figures["grad_norm"], figures["entropy"])

    return Contestant(policy, step, recipe.update.model_dump())


def our_recipe(mode: str, trainer: Mapping[str, Any]) -> GrpoRecipe:
    """The defaults, which are TRL's where both have the key."""
    required = {"model": {"random_init": "tiny"}, "data": {"train": "pictures"}, "rewards": [{"function": "accuracy"}]}
    return GrpoRecipe.model_validate(
        required | {"output_dir": FOLDER, "update": {"mode": mode}, "trainer": {"max_steps": 1, **trainer}}
    )


def trl_contestant(world: World, policy: Any = None, optimizer: Any = None, **settings: Any) -> Contestant:
    """Log-probabilities, loss, backward, clip and step of the real trainer, a whole group per micro-batch.

    `policy` is trained itself, and by the optimizer; without them a copy of the world's model is.
    """
    trainer = trl_trainer(world, copy.deepcopy(world.model) if policy is None else policy, settings)
    inputs = trl_inputs(trainer, world)
    model, optimizer = trainer.model, optimizer or trainer.create_optimizer()

    def step() -> Outcome:
        optimizer.zero_grad()
        loss = 0.0
        for micro_batch in inputs:
            part = trainer._compute_loss(model, micro_batch)
            trainer.accelerator.backward(part)
            loss += part.item()
        norm = float(trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm))
        optimizer.step()
        entropies = trainer._metrics["train"]["entropy"][-len(inputs) :]
        return Outcome(loss, norm, weighted_mean(entropies, [one["completion_mask"] for one in inputs]))

    return Contestant(model, step, trl_settings(trainer))


def trl_trainer(world: World, model, more: Mapping[str, Any]):
    """GRPOTrainer at its best: on-policy without a pass for old log-probabilities, no recomputed activations."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def rollout_func(prompts, trainer):
        prompt_ids = [prompt.token_ids for prompt in world.prompts for _ in range(world.cell.size)]
        completion_ids = [rollout.token_ids for rollout in world.rollouts]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

    def reward(completions, **columns):
        return world.rewards_N.tolist()

    settings: dict[str, Any] = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    settings |= {"per_device_train_batch_size": world.cell.size, "num_generations": world.cell.size}
    settings |= {"gradient_accumulation_steps": world.cell.groups, "max_completion_length": world.cell.completion}
    args, data = GRPOConfig(f"{FOLDER}/trl", **(settings | more)), Dataset.from_list([{"prompt": "unused"}])
    trainer = GRPOTrainer(model, reward, args, data, processing_class=world.processor, rollout_func=rollout_func)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = world.cell.groups  # as its training loop would
    return trainer


def trl_inputs(trainer, world: World) -> list[dict[str, Any]]:
    """Its own tensors for the rollouts, split as `_prepare_inputs` does, but unshuffled: a group stays together."""
    from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

    rows = [
        {"prompt": [{"role": "user", "content": question}], "images": list(prompt.images)}
        for question, prompt in zip(world.questions, world.prompts, strict=True)
        for _ in range(world.cell.size)
    ]
    batch = split_pixel_values_by_grid(trainer._generate_and_score_completions(rows))
    parts = split_tensor_dict(batch, trainer.args.steps_per_generation)
    return [unsplit_pixel_values_by_grid(part) for part in parts]


def trl_settings(trainer) -> dict[str, Any]:
    """What its speed and its loss depend on."""
    names = ("loss_type", "beta", "num_generations", "per_device_train_batch_size", "gradient_accumulation_steps")
    names += ("steps_per_generation", "num_iterations", "gradient_checkpointing", "bf16", "use_liger_kernel", "optim")
    settings = {name: str(getattr(trainer.args, name)) for name in names}
    return settings | {"attention": trainer.model.config._attn_implementation, "head": "fused, chunked (default)"}


def weighted_mean(values: list[float], masks: list[torch.Tensor]) -> float:
    """Mean over tokens from the means of micro-batches."""
    tokens = [float(mask.sum()) for mask in masks]
    return sum(value * count for value, count in zip(values, tokens, strict=True)) / sum(tokens)


def check_equal_work(contestants: Mapping[str, Contestant], outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """Largest relative difference of each variant to TRL, in loss, gradient norm, entropy and the gradient itself.

    On-policy the loss is the same for any log-probabilities; the gradient is what tells whether the work is equal.
    """
    differences = {}
    theirs, expected = contestants["trl"], outcomes["trl"]
    for name in [name for name in contestants if name != "trl"]:
        parts = [
            abs(getattr(outcomes[name], part) - getattr(expected, part)) / abs(getattr(expected, part))
            for part in ("loss", "grad_norm", "entropy")
        ]
        differences[name] = max(*parts, gradient_difference(contestants[name].model, theirs.model))
        if not differences[name] <= TOLERANCE:
            raise RuntimeError(f"{name} and TRL do unequal work: {differences[name]:.1e}; {outcomes[name]}, {expected}")
    return differences


def gradient_difference(model: torch.nn.Module, expected: torch.nn.Module) -> float:
    """Distance of two gradients by the length of the second."""
    theirs = {name: parameter.grad for name, parameter in expected.named_parameters()}
    squares = [(p.grad - theirs[name]).square().sum() for name, p in model.named_parameters()]
    return float(sum(squares) / sum(grad.square().sum() for grad in theirs.values())) ** 0.5
