"""The two sides of a whole GRPO step, each as a callable that returns the seconds of its phases.

Both write completions with the transformers model, TRL by its `generate`; or both with a vLLM in this process. Reward
functions, prompts and the number of rollouts are the same. The settings are the recipe's; TRL has the same key for each
of them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from accelerate import Accelerator

from rewards.call import call_function
from rollouts.hf import HFEngine
from sail_rl import scoring
from sail_rl.advantage import group_advantages
from sail_rl.batch import Form
from sail_rl.batch_form import choose_form
from sail_rl.before_update import MiniBatch
from sail_rl.checkpoint import full_parameters
from sail_rl.config import GrpoRecipe
from sail_rl.data.packing import idle_group, make_batches
from sail_rl.data.stream import Shard
from sail_rl.engines import end_tokens, make_vllm_engine
from sail_rl.launch import Run
from sail_rl.losses import loss_normaliser
from sail_rl.metrics import Stopwatch
from sail_rl.model.cpu_linear import use_onednn, use_torch
from sail_rl.model.cpu_passes import use_all_passes, use_fewer_passes
from sail_rl.model.load import image_token_ids, prepare_for_training
from sail_rl.optimizer import make_optimizer, set_learning_rate
from sail_rl.policy import Policy
from sail_rl.questions import Question, question_stream
from sail_rl.sampling import training_sampling
from sail_rl.update import make_groups, update_policy

Phases = dict[str, float]


@dataclass(frozen=True)
class Task:
    """What is trained, and how."""

    recipe: GrpoRecipe
    model: Any
    processor: Any
    trl_rows: int
    """Of one of TRL's micro-batches."""


def our_side(task: Task, onednn: bool) -> Callable[[], Phases]:
    """The loop body of train_grpo.py, without its log and checkpoints, with the recipe's engine and precision."""
    recipe = task.recipe
    rollout, grpo = recipe.rollout, recipe.grpo
    run, policy = new_run(recipe), copy.deepcopy(task.model)
    (use_onednn if onednn else use_torch)(policy)
    use_fewer_passes(policy)
    rewards = scoring.load_rewards(recipe)
    stream = question_stream(run, "train", task.processor)
    suppressed = image_token_ids(policy, task.processor)
    idle = idle_group(task.processor, with_picture=False)
    prepare_for_training(policy, recipe.trainer.gradient_checkpointing)
    model, optimizer = run.accelerator.prepare(Policy(policy), make_optimizer(policy, recipe.optim))
    set_learning_rate(optimizer, recipe.optim, recipe.optim.warmup_steps + 1, recipe.trainer.max_steps)
    if rollout.engine == "hf":
        engine: Any = HFEngine(policy, task.processor.tokenizer, suppressed, rollout.batch_size)
    else:
        suppressed = never_written(task)
        engine = make_vllm_engine(run, policy, task.processor, suppressed)
    sampling = training_sampling(recipe)
    watch = Stopwatch()
    chosen: list[Form] = []  # by the first step that has a group, as in train_grpo.py

    def step() -> Phases:
        with watch.phase("rollout"):
            engine.load_weights(full_parameters(policy), version=1)  # of the update before
            questions = stream.next_items(rollout.prompts_per_step)
            rollouts = engine.generate([question.prompt for question in questions], rollout.num_generations, sampling)
        with watch.phase("reward"):
            scores = scoring.score_rollouts(run, rewards, questions, rollouts, step=1)
            outcomes = scoring.gather_outcomes(run.shard, rollouts, scores)
        with watch.phase("update"):
            rewards_N = scoring.reward_tensor(outcomes)
            advantages = group_advantages(rewards_N, rollout.num_generations, grpo.scale_rewards)
            groups = make_groups(questions, rollouts, advantages, run.shard, keep_all=False)
            chosen.extend(filter(None, [] if chosen else [choose_form(run, policy, groups)]))
            batches = make_batches(groups, recipe.update.token_budget, idle, run.highest, *chosen)
            lengths = [outcome.length for outcome in outcomes if outcome.reward is not None]
            normaliser = loss_normaliser(grpo.loss_type, lengths, rollout.max_completion_length)
            update_policy(run, model, None, optimizer, [MiniBatch(batches, normaliser)], suppressed)
        return {name.removeprefix("seconds/"): seconds for name, seconds in watch.take().items()}

    return step


def never_written(task: Task) -> list[int]:
    """What vLLM is kept from: pictures' tokens, and end tokens, so that all completions have one length."""
    return [*image_token_ids(task.model, task.processor), *end_tokens(task.model, task.processor)]


def new_run(recipe: GrpoRecipe) -> Run[GrpoRecipe]:
    """A run of one process."""
    folder = Path(recipe.output_dir)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    return Run(recipe, folder, Accelerator(cpu=True, mixed_precision=recipe.trainer.mixed_precision), Shard())


def trl_side(task: Task) -> Callable[[], Phases]:
    """TRL's generation, rewards and update; its rows are made beforehand and not timed."""
    from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

    if task.recipe.rollout.engine == "hf":
        policy = copy.deepcopy(task.model)
        use_torch(policy)
        use_all_passes(policy)
        trainer = trl_trainer(task, policy, [{"prompt": "unused"}])
    else:
        from benchmarks.vllm_sides import trl_with_vllm

        trainer = trl_with_vllm(task)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    optimizer, watch = trainer.create_optimizer(), Stopwatch()
    stream = question_stream(new_run(task.recipe), "train", task.processor)
    calculate_rewards = trainer._calculate_rewards

    def timed_rewards(*arguments):
        with watch.phase("reward"):
            return calculate_rewards(*arguments)

    trainer._calculate_rewards = timed_rewards

    def step() -> Phases:
        questions = stream.next_items(task.recipe.rollout.prompts_per_step)
        rows = [trl_row(question) for question in questions for _ in range(task.recipe.rollout.num_generations)]
        trainer.model.train()
        with watch.phase("rollout"):
            batch = trainer._generate_and_score_completions(rows)
        with watch.phase("update"):
            parts = split_tensor_dict(split_pixel_values_by_grid(batch), trainer.args.steps_per_generation)
            optimizer.zero_grad()
            for part in parts:
                with trainer.compute_loss_context_manager():  # bfloat16, if that is the precision
                    loss = trainer._compute_loss(trainer.model, unsplit_pixel_values_by_grid(part))
                trainer.accelerator.backward(loss)
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
            optimizer.step()
            trainer.state.global_step += 1  # its vLLM is given the new weights
        phases = {name.removeprefix("seconds/"): seconds for name, seconds in watch.take().items()}
        return phases | {"rollout": phases["rollout"] - phases["reward"]}  # the rewards are called within

    return step


def trl_trainer(task: Task, model, rows: list[dict[str, Any]], changes: dict[str, Any] | None = None):
    """GRPOTrainer with the recipe's settings, and changes of TRL's own keys."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    recipe = task.recipe
    rollout, grpo, optim = recipe.rollout, recipe.grpo, recipe.optim
    micro_batches = rollout.prompts_per_step * rollout.num_generations // task.trl_rows
    settings: dict[str, Any] = {"report_to": "none", "use_cpu": True, "gradient_checkpointing": False}
    settings |= {"bf16": recipe.trainer.mixed_precision == "bf16"}
    settings |= {"per_device_train_batch_size": task.trl_rows, "gradient_accumulation_steps": micro_batches}
    settings |= rollout.model_dump(include={"num_generations", "max_completion_length", "temperature"})
    settings |= grpo.model_dump(include={"loss_type", "epsilon", "epsilon_high", "beta", "scale_rewards"})
    settings |= optim.model_dump(include={"learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"})
    settings |= optim.model_dump(include={"adam_beta1", "adam_beta2", "max_grad_norm"})
    settings |= {"max_steps": recipe.trainer.max_steps, "seed": recipe.seed, "save_strategy": "no"}
    settings |= {"shuffle_dataset": False, "disable_tqdm": True, "logging_strategy": "no"}
    settings |= {"reward_weights": [entry.weight for entry in recipe.rewards]}
    settings |= {"chat_template_kwargs": {"thinking": recipe.data.thinking}}
    # A picture's token in a completion would end the run: the model would look for its picture.
    settings |= {"generation_kwargs": {"suppress_tokens": image_token_ids(model, task.processor)}}
    args = GRPOConfig(f"{recipe.output_dir}/trl", **(settings | (changes or {})))
    return GRPOTrainer(model, reward_functions(recipe), args, Dataset.from_list(rows), processing_class=task.processor)


def reward_functions(recipe: GrpoRecipe) -> list[Callable]:
    """The recipe's own, which take TRL's arguments."""
    return [named(reward) for reward in scoring.load_rewards(recipe)]


def named(reward) -> Callable[..., Any]:
    """A plain function, since TRL asks rewards for their name; and with text, as our rewards get from such rows."""

    def function(completions, **columns):
        texts = [completion[0]["content"] for completion in completions]
        verdicts = call_function(reward.function, {**columns, **reward.arguments, "completions": texts})
        return [verdict.value for verdict in verdicts]

    function.__name__ = reward.name
    return function


def trl_row(question: Question) -> dict[str, Any]:
    """A row as TRL's users have it."""
    columns = {name: value for name, value in question.example.columns.items() if name != "images"}
    prompt = [{"role": "user", "content": question.example.question}]
    return columns | {"prompt": prompt, "images": list(question.example.images)}


def total(phases: Phases) -> float:
    """Seconds of a step."""
    return sum(phases.values())


def median_phases(runs: list[Phases]) -> Phases:
    """Phase by phase."""
    return {name: median(run[name] for run in runs) for name in runs[0]}
