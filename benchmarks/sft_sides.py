"""The two sides of a supervised step, each as one callable on the same samples: ours, and TRL's SFTTrainer.

Both run their real code on a copy of the same weights. Pictures are processed, and rows padded or packed into tensors,
before; TRL refuses to pack multimodal samples, so its rows are padded, in batches as its own collator makes them.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from benchmarks.contestants import FOLDER, Contestant, Outcome, gradient_difference
from benchmarks.scaled_model import QUESTION, noise_picture, scaled_config, scaled_processor
from rollouts.inputs import encoded_prompt
from sail_rl.batch import Form, Group
from sail_rl.batch_form import choose_form
from sail_rl.config import SftRecipe
from sail_rl.data.packing import idle_group, make_batches
from sail_rl.data.stream import Shard
from sail_rl.launch import Run
from sail_rl.model.load import prepare_for_training
from sail_rl.model.modeling_sail_vl2 import SailVL2ForConditionalGeneration
from sail_rl.model.tiny import random_model
from sail_rl.optimizer import make_optimizer, set_learning_rate
from sail_rl.policy import Policy
from sail_rl.update_sft import update_supervised

TILES, TILE_SHARES = (0, 2, 4, 6, 12), (0.2, 0.3, 0.25, 0.15, 0.1)  # of a picture, its thumbnail aside; 0: text alone
QUESTION_LENGTH, TARGET_LENGTH = (3.5, 0.8), (4.5, 1.0)  # tokens: mean and spread of their logarithm
LONGEST = 512  # tokens of a target, and of a question's text
TOKEN_BUDGET = 4096
TOLERANCE = 1e-4  # relative; float32 sums in another order differ by about 1e-6


@dataclass(frozen=True)
class Shape:
    """Of one sample."""

    tiles: int
    question: int
    """Tokens of text beyond the fixed words."""
    target: int
    """Tokens, the end of the turn included."""


@dataclass(frozen=True)
class SftWorld:
    """What all variants start from."""

    processor: Any
    model: SailVL2ForConditionalGeneration
    groups: list[Group]
    rows: list[dict[str, Any]]
    """The same samples as TRL reads them: columns `prompt`, `completion`, `images`."""


def draw_shapes(count: int, seed: int) -> list[Shape]:
    """Ragged samples: text alone, small pictures, large ones, short and long answers."""
    rng = np.random.default_rng(seed)
    tiles = rng.choice(TILES, count, p=TILE_SHARES)
    questions, targets = (
        rng.lognormal(*shape, count).clip(2, LONGEST).astype(int) for shape in (QUESTION_LENGTH, TARGET_LENGTH)
    )
    return [Shape(int(t), int(q), int(a)) for t, q, a in zip(tiles, questions, targets, strict=True)]


def make_sft_world(shapes: Sequence[Shape]) -> SftWorld:
    """The scaled-down model and a sample of each shape, the same for the same shapes."""
    rng, processor = np.random.default_rng(0), scaled_processor()
    model = random_model(SailVL2ForConditionalGeneration, scaled_config(processor), processor.tokenizer, seed=0)
    model.lm_head.weight.data *= 3  # far from uniform, as a trained model is
    samples = [make_sample(processor, shape, rng) for shape in shapes]
    return SftWorld(processor, model, [group for group, _ in samples], [row for _, row in samples])


def make_sample(processor, shape: Shape, rng: np.random.Generator) -> tuple[Group, dict[str, Any]]:
    """One sample for us and for TRL: the same text and picture."""
    pictures = [noise_picture(shape.tiles, rng)] if shape.tiles else []
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": QUESTION + " count" * shape.question}]
    turn = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    prompt = encoded_prompt("benchmark", processor(text=[text], images=pictures or None, return_tensors="pt"))
    tokenizer = processor.tokenizer
    target = " count" * (shape.target - 1) + tokenizer.eos_token
    target_ids = tokenizer(target, add_special_tokens=False)["input_ids"]
    if len(target_ids) != shape.target:
        raise ValueError(f"a target of {shape.target} tokens cannot be made: {len(target_ids)}")
    return Group(prompt, [target_ids], kind="direct"), {"prompt": text, "completion": target, "images": pictures}


def our_side(world: SftWorld, form: Form) -> Contestant:
    """What train_sft.py does between `make_batches` and the end of `update_supervised`."""
    required = {"model": {"random_init": "tiny"}, "data": {"train": "pictures"}, "trainer": {"max_steps": 1}}
    update = {"mode": form, "token_budget": TOKEN_BUDGET}
    recipe = SftRecipe.model_validate(required | {"output_dir": FOLDER, "update": update})
    policy = copy.deepcopy(world.model)
    prepare_for_training(policy, recipe.trainer.gradient_checkpointing)
    run = Run(recipe, Path(recipe.output_dir), Accelerator(cpu=True), Shard())
    model, optimizer = run.accelerator.prepare(Policy(policy), make_optimizer(policy, recipe.optim))
    set_learning_rate(optimizer, recipe.optim, step=1, max_steps=1)
    form_taken = choose_form(run, policy, world.groups)
    assert form_taken == form  # none of them may be given up for this model
    batches = make_batches(world.groups, TOKEN_BUDGET, idle_group(world.processor, with_picture=False), form=form)

    def step() -> Outcome:
        figures = update_supervised(run, model, optimizer, batches)
        return Outcome(figures["loss"], figures["grad_norm"], figures["entropy"])

    tokens = sum(batch.input_ids_RT.numel() for batch in batches)
    return Contestant(policy, step, {"mode": form, "token_budget": TOKEN_BUDGET} | padding_of(world, tokens))


def trl_side(world: SftWorld, batch_size: int, by_length: bool = False) -> Contestant:
    """Loss, backward, clip and step of the real trainer, over micro-batches of its own collator."""
    trainer = trl_trainer(world, copy.deepcopy(world.model), batch_size)
    order = sorted(range(len(world.rows)), key=lambda n: tokens_of(world.groups[n])) if by_length else None
    rows = [dict(world.rows[n]) for n in order or range(len(world.rows))]
    inputs = [trainer.data_collator(rows[n : n + batch_size]) for n in range(0, len(rows), batch_size)]
    trained = sum(int((one["labels"] != -100).sum()) for one in inputs)
    model, optimizer = trainer.model, trainer.create_optimizer()

    def step() -> Outcome:
        optimizer.zero_grad()
        loss = 0.0
        for micro_batch in inputs:
            part = trainer.compute_loss(model, dict(micro_batch), num_items_in_batch=torch.tensor(trained))
            trainer.accelerator.backward(part)
            loss += part.item()
        norm = float(trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm))
        optimizer.step()
        weights = [float((one["labels"] != -100).sum()) for one in inputs]
        entropies = trainer._metrics["train"]["entropy"][-len(inputs) :]
        return Outcome(loss, norm, sum(e * w for e, w in zip(entropies, weights, strict=True)) / trained)

    settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": len(inputs)}
    settings |= {"sorted_by_length": by_length, "optim": str(trainer.args.optim)}
    settings |= {"attention": trainer.model.config._attn_implementation, "head": "fused, chunked (default)"}
    return Contestant(model, step, settings | padding_of(world, sum(one["input_ids"].numel() for one in inputs)))


def trl_trainer(world: SftWorld, model, batch_size: int):
    """SFTTrainer at its best: no recomputed activations, loss on the answer alone, float32 as on our side."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings: dict[str, Any] = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    settings |= {"per_device_train_batch_size": batch_size, "max_length": None, "completion_only_loss": True}
    settings |= {"max_grad_norm": 1.0}
    data = Dataset.from_list([{"prompt": "unused", "completion": "unused", "images": []}])
    trainer = SFTTrainer(
        model, SFTConfig(f"{FOLDER}/trl_sft", **settings), train_dataset=data, processing_class=world.processor
    )
    trainer.model.train()
    return trainer


def tokens_of(group: Group) -> int:
    """Prompt and target."""
    return len(group.prompt.token_ids) + len(group.completions[0])


def padding_of(world: SftWorld, computed: int) -> dict[str, Any]:
    """Tokens that the language model computes, and how many of them are padding."""
    needed = sum(map(tokens_of, world.groups))
    return {"tokens": computed, "padding": 1 - needed / computed}


def relative_difference(ours: Contestant, outcome: Outcome, theirs: Contestant, expected: Outcome) -> float:
    """The largest of loss, gradient norm, entropy and the gradient itself; unequal work is an error."""
    names = ("loss", "grad_norm", "entropy")
    parts = [abs(getattr(outcome, n) - getattr(expected, n)) / abs(getattr(expected, n)) for n in names]
    largest = max(*parts, gradient_difference(ours.model, theirs.model))
    if not largest <= TOLERANCE:
        raise RuntimeError(f"unequal work: {largest:.1e}; {outcome} and {expected}")
    return largest
