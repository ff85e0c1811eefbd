"""`sail-rl plan`: the table, line by line, and what to change where it does not fit."""

from collections.abc import Iterator
from dataclasses import replace

from sail_rl.command_line import load_recipe
from sail_rl.config import GrpoRecipe
from sail_rl.config_data import LoraSection
from sail_rl.config_pipeline import trainer_of
from sail_rl.gpus import parse_gpus
from sail_rl.machine_checks import GIB
from sail_rl.planning.memory import SHARDINGS, USABLE
from sail_rl.planning.sizes import sizes_of
from sail_rl.planning.task import Task, expected_of

LEAST_BUDGET, MOST_GPUS = 2048, 256
COLUMNS = ("weights", "gradients", "AdamW", "exchange", "activations", "logits", "engine", "update", "rollout")


def plan(path: str, overrides: list[str], gpus: str, **told: float | int | None) -> bool:
    """Print it; whether the recipe fits as it is, by some way of sharding."""
    recipe = load_recipe(trainer_of(path), path, overrides)
    count, gpu = parse_gpus(gpus, told.get("memory_gib"), told.get("tflops"))
    sizes = sizes_of(recipe.model)
    expected = expected_of(recipe, sizes, *(told.get(name) for name in ("prompt", "tiles", "completion")))  # type: ignore[arg-type]
    task = Task(recipe, sizes, gpu, count, expected)
    tasks = ways(task)
    print("\n".join([*about(task), "", *table(tasks), "", *times(task)]))
    if not any(one.fits for one in tasks):
        print("\n".join(["", *advice(task)]))
    return any(one.fits for one in tasks)


def ways(task: Task) -> list[Task]:
    """Each way in which the GPUs can share the model."""
    return [replace(task, sharding=sharding) for sharding in SHARDINGS] if task.count > 1 else [task]


def about(task: Task) -> list[str]:
    """The model, and what is assumed of a micro-batch."""
    sizes, load, told = task.sizes, task.load, task.expected
    parts = ", ".join(f"{name} {number / 1e9:.2f}" for name, number in sizes.parts.items())
    adapters = f" (LoRA; {sizes.adapters / 1e6:.1f} million)" if sizes.adapters else ""
    precision = task.recipe.model.dtype + (" under bfloat16 autocast" if task.precision == "autocast" else "")
    again = "computed again" if task.settings.recompute else "kept"
    return [
        f"model: {sizes.origin}",
        f"  {sizes.weights / 1e9:.2f} billion weights ({parts}), {sizes.all_trained / 1e9:.2f} trained{adapters}",
        f"  {precision}",
        f"micro-batch: {load.tokens} tokens of update.token_budget = {task.recipe.update.token_budget}, "
        f"{load.patches // sizes.tile_patches} tiles, activations {again}",
        f"  expected: prompts of {told.prompt} tokens with {told.tiles} tiles, answers of {told.completion} tokens "
        "(--prompt, --tiles, --completion)",
    ]


def table(tasks: list[Task]) -> list[str]:
    """A line for each way of sharding."""
    gpu, count = tasks[0].gpu, tasks[0].count
    room = USABLE * gpu.memory_gib
    head = f"GiB on each of {count} {gpu.name}; {room:.1f} of {gpu.memory_gib:g} are counted on"
    return [head, f"{'':16}" + "".join(f"{name:>12}" for name in COLUMNS), *map(line, tasks)]


def line(task: Task) -> str:
    """Terms, the highest point of both phases, and whether it fits."""
    memory, engine = task.memory, task.engine_bytes
    terms: tuple[float, ...] = (memory.weights + memory.reference, memory.gradients, memory.optimizer, memory.exchange)
    terms += (memory.activations, memory.logits, engine, memory.update, memory.static + engine)
    verdict = "fits" if task.fits else "does not fit"
    return f"{task.sharding.name:16}" + "".join(f"{term / GIB:12.1f}" for term in terms) + f"  {verdict}"


def times(task: Task) -> list[str]:
    """Of a step and of the run."""
    rollout, update = task.seconds
    recipe = task.recipe
    together = max(rollout, update) if isinstance(recipe, GrpoRecipe) and recipe.rollout.overlap else rollout + update
    steps = recipe.trainer.max_steps
    run = f"; {steps} steps take {together * steps / 86400:.2f} days" if steps else ""
    if not isinstance(recipe, GrpoRecipe):
        samples = recipe.sft.samples_per_step  # type: ignore[attr-defined]
        return [f"time: a step of {samples} samples {together:.1f} s, {samples / together:.1f} samples/s{run}"]
    rollouts = recipe.rollout.prompts_per_step * recipe.rollout.num_generations
    tokens, writing = rollouts * task.expected.completion, task.writing
    assert writing is not None
    lines = [
        f"time: rollout {rollout:.0f} s ({tokens / rollout:.0f} tokens/s, {writing.at_once} completions at once on a "
        f"GPU), update {update:.0f} s",
        f"  {rollouts / together:.1f} rollouts/s{run}",
    ]
    if writing.engine == "vllm_server":
        weights = task.engine_weights / GIB
        lines.append(f"  servers have GPUs of their own beside these: {weights:.1f} GiB of weights, the rest is cache")
    return lines


def advice(task: Task) -> list[str]:
    """Changes in the order of what they cost, each on top of those before, until it fits."""
    lines = ["it does not fit. Each on top of those before:"]
    for text, better in changes(task):
        lines.append(f"  {text}: {better.peak:.1f} GiB{', fits' if better.fits else ''}")
        if better.fits:
            return lines
    return [*lines, "  no more is known: take GPUs with more memory"]


def changes(task: Task) -> Iterator[tuple[str, Task]]:
    """What can be done, one after another; a change that would not help is left out."""
    if not task.recipe.trainer.gradient_checkpointing:
        task = changed(task, "trainer", gradient_checkpointing=True)
        yield "trainer.gradient_checkpointing=true", task
    if task.count > 1:
        task = replace(task, sharding=SHARDINGS[2])
        yield f"recipes/accelerate/{task.sharding.file}", task
    while task.recipe.update.token_budget > LEAST_BUDGET:
        task = changed(task, "update", token_budget=max(LEAST_BUDGET, task.recipe.update.token_budget // 2))
        yield f"update.token_budget={task.recipe.update.token_budget}", task
    if not task.recipe.model.lora and task.recipe.model.path and "llm" not in task.recipe.model.freeze:
        task = changed(task, "model", lora=LoraSection(), dtype="bfloat16")
        task = replace(task, sizes=sizes_of(task.recipe.model))
        yield 'model.dtype=bfloat16 "model.lora={}"', task
    while task.count < MOST_GPUS:
        task = replace(task, count=2 * task.count, sharding=SHARDINGS[2])
        yield f"{task.count} GPUs with recipes/accelerate/{task.sharding.file}", task


def changed(task: Task, section: str, **keys: object) -> Task:
    """The task with other keys in a section of the recipe."""
    part = getattr(task.recipe, section).model_copy(update=keys)
    return replace(task, recipe=task.recipe.model_copy(update={section: part}))
