"""`sail-rl doctor`: whether a recipe can be trained here, found out by the trainer's own functions, one line a check.

Nothing is left behind: what a run would write goes to a temporary folder.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sail_rl.command_line import BadInput, load_recipe, read_yaml
from sail_rl.config import CommonRecipe, GrpoRecipe, SftRecipe
from sail_rl.machine_checks import check_device, check_exchange, check_files, check_memory, check_packages, room
from sail_rl.threads import wait_briefly

SAMPLE = 16  # rows of each source
BYTES_PER_WEIGHT = {"float32": 4, "bfloat16": 2}
RULES = ("accuracy", "format")  # what a row's own answer must satisfy
# What stands before an answer in each answer form.
BEFORE = {
    "think": "<think>It can be seen in the picture.</think>\n",
    "direct": "",
    "judge": "<judge>It can be seen.</judge><think>\n\n</think>\n",
}


@dataclass
class Patient:
    """What the checks have made so far, for those after them."""

    recipe: Any
    output_dir: str
    """The recipe's own, where the run would be."""
    run: Any = None
    policy: Any = None
    processor: Any = None
    whole: Any = None
    suppressed: Any = None
    stream: Any = None
    engine: Any = None


def examine(path: str, overrides: list[str]) -> bool:
    """Print a line for every check; whether all is well."""
    wait_briefly()
    recipes: list[CommonRecipe] = []
    if not look("recipe", lambda: read_recipe(path, overrides, recipes)):
        return False
    patient = Patient(recipes[0], recipes[0].output_dir)
    first = {
        "packages": check_packages,
        "device": check_device,
        "exchange": check_exchange,
        "files": check_files,
        "memory": check_memory,
    }
    results = [look(name, partial(check, patient.recipe)) for name, check in first.items()]
    with temporary_run(patient):
        for name, check, needed in CHECKS if isinstance(patient.recipe, GrpoRecipe) else SFT_CHECKS:
            made = all(getattr(patient, part) is not None for part in needed)
            results.append(look(name, partial(check, patient)) if made else skip(name))
    return all(results)


def look(name: str, check: Callable[[], str]) -> bool:
    """One check and its line. Whatever it meets is what it was to find, so no error goes further."""
    try:
        line, well = f"ok       {name}: {check()}", True
    except BadInput as mistake:
        line, well = f"problem  {name}: {mistake}", False
    except Exception as error:
        gist = next(iter(str(error).strip().splitlines()), "")
        line, well = f"problem  {name}: {type(error).__name__}: {gist}", False
    print(line, flush=True)
    return well


def skip(name: str) -> bool:
    """A check that cannot be made before the problems above are solved."""
    print(f"skipped  {name}", flush=True)
    return False


@contextmanager
def temporary_run(patient: Patient) -> Iterator[None]:
    """The recipe with a folder that is gone in the end, and with the engine that the checks may have started."""
    recipe = patient.recipe
    trainer = recipe.trainer.model_copy(update={"log_with": [], "resume": "never"})
    data = recipe.data.model_copy(update={"workers": 0})
    with tempfile.TemporaryDirectory(prefix="sail-rl-doctor-") as folder:
        patient.recipe = recipe.model_copy(update={"output_dir": folder, "trainer": trainer, "data": data})
        yield
        if patient.engine is not None:
            patient.engine.close()


def read_recipe(path: str, overrides: list[str], found: list[CommonRecipe]) -> str:
    """The recipe of either trainer, told apart by its rewards."""
    kind = GrpoRecipe if "rewards" in read_yaml(Path(path)) else SftRecipe
    recipe = load_recipe(kind, path, overrides)
    found.append(recipe)
    return f"{path} for {'train_grpo.py' if kind is GrpoRecipe else 'train_sft.py'}"


def check_model(patient: Patient) -> str:
    """Load it and wrap it as the trainer does."""
    from sail_rl.batch_form import choose_attention
    from sail_rl.launch import start_run
    from sail_rl.model.load import image_token_ids, load_model, prepare_for_training
    from sail_rl.optimizer import make_optimizer
    from sail_rl.policy import Policy
    from sail_rl.sharding import prepare

    recipe = patient.recipe
    patient.run = start_run(recipe)
    policy, patient.processor = load_model(recipe.model, recipe.seed)
    patient.suppressed = image_token_ids(policy, patient.processor)
    prepare_for_training(policy, recipe.trainer.gradient_checkpointing)
    attention = choose_attention(patient.run, policy)
    patient.whole = prepare(patient.run, Policy(policy, attention), make_optimizer(policy, recipe.optim))[2]
    patient.policy = policy
    trained, weights = counts(policy)
    return f"{type(policy).__name__}, {weights / 1e6:,.1f} million weights, {trained / 1e6:,.1f} of them trained"


def counts(policy) -> tuple[int, int]:
    """How many weights are trained, and how many there are."""
    weights = list(policy.parameters())
    return sum(w.numel() for w in weights if w.requires_grad), sum(w.numel() for w in weights)


def check_disk(patient: Patient) -> str:
    """Room for the checkpoints, one of them before the oldest is dropped, and for the final model."""
    recipe = patient.recipe
    trained, weights = counts(patient.policy)
    size = BYTES_PER_WEIGHT[recipe.model.dtype]
    whole, moments = weights * size, 2 * trained * size
    checkpoint = moments + (trained * size if recipe.model.lora else whole)
    needed = (recipe.trainer.save_total_limit + 1) * checkpoint + whole
    return room(needed, Path(patient.output_dir))


def check_data(patient: Patient) -> str:
    """The first rows as the trainer will have them; text, pictures and answers of all rows where they are few."""
    from sail_rl.questions import question_stream, sample_stream

    run, processor, told = patient.run, patient.processor, []
    is_grpo = isinstance(patient.recipe, GrpoRecipe)
    train = question_stream(run, "train", processor) if is_grpo else sample_stream(run, processor)
    streams = {"train": train, "eval": question_stream(run, "eval", processor)}
    for part, stream in streams.items():
        if stream is not None:
            prompts = [item.prompt for item in take(stream)]
            lengths, pictures = [len(prompt.token_ids) for prompt in prompts], sum(len(p.images) for p in prompts)
            rows = f"{len(prompts)} rows tried, {pictures} pictures, prompts of {min(lengths)} to {max(lengths)} tokens"
            told.append(f"data.{part}: {rows}, {len(stream.bad_rows)} bad rows")
    patient.stream = train
    return "; ".join(told)


def take(stream) -> list[Any]:
    """A sample of the stream, which then stands where it stood."""
    position = stream.position
    items = stream.next_items(min(SAMPLE, len(stream.rows)))
    stream.position = position
    return items


def check_engine(patient: Patient) -> str:
    """Start it and give it the weights."""
    from sail_rl.checkpoint import full_parameters
    from sail_rl.engines import make_engine

    patient.engine = make_engine(patient.run, patient.whole, patient.processor, patient.suppressed)
    patient.engine.load_weights(full_parameters(patient.policy), version=0)
    return f"{patient.recipe.rollout.engine} has started and has the weights"


def check_engine_parity(patient: Patient) -> str:
    """The trainer's own gate."""
    from sail_rl.parity import check_parity

    if patient.recipe.rollout.engine == "hf":
        return "nothing to compare: the engine is the trainer's model"
    check_parity(patient.run, patient.whole, patient.engine, patient.stream, patient.suppressed)
    return "engine and trainer read the same tokens and pictures, and agree on the log-probabilities"


def check_rewards(patient: Patient) -> str:
    """Every reward on completions of the model, and on right answers in the form that is asked for."""
    from sail_rl.metrics import mean
    from sail_rl.sampling import training_sampling
    from sail_rl.scoring import load_rewards, score_rollouts, try_on_data

    run, recipe = patient.run, patient.recipe
    rewards = load_rewards(recipe)
    try_on_data(run, rewards, patient.engine, patient.stream)
    questions = take(patient.stream)
    written = patient.engine.generate([q.prompt for q in questions], 1, training_sampling(recipe))
    right = [right_answer(question, recipe.data.thinking, patient.processor.tokenizer) for question in questions]
    scores = [score_rollouts(run, rewards, questions, completions, step=0) for completions in (right, written)]
    wrong = [
        f"{name} gives {value} to the row's own answer {q.example.columns['answer']!r} (id {q.example.id})"
        for name in RULES
        for value, q in zip(scores[0].parts.get(name, []), questions, strict=False)
        if value != 1
    ]
    errors = [*scores[0].errors, *scores[1].errors, *wrong]
    if errors:
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise BadInput("; ".join(errors[:3]) + f"{more}: mend the reward, the rows, or answer_type")
    told = [
        f"{reward.name} {shown(mean(scores[0].parts[reward.name]))} on right answers and "
        f"{shown(mean(scores[1].parts[reward.name]))} on the model's"
        for reward in rewards
    ]
    return f"{len(questions)} questions: {', '.join(told)}"


def right_answer(question, thinking: str, tokenizer):
    """A completion that says what the row does."""
    from rollouts import Rollout
    from sail_rl.data.prompting import answer_form

    text = f"{BEFORE[answer_form(question.example, thinking)]}\\boxed{{{question.example.columns['answer']}}}"
    return Rollout(tokenizer(text, add_special_tokens=False)["input_ids"], [], text, "stop", weight_version=0)


def shown(value: float | None) -> str:
    """A mean; rewards may abstain from all."""
    return "nothing" if value is None else f"{value:.2f}"


# Name, function, and what must have been made before.
SFT_CHECKS = (
    ("model", check_model, ()),
    ("disk", check_disk, ("policy",)),
    ("data", check_data, ("policy",)),
)
CHECKS = (
    *SFT_CHECKS,
    ("engine", check_engine, ("policy",)),
    ("parity", check_engine_parity, ("engine", "stream")),
    ("rewards", check_rewards, ("engine", "stream")),
)
