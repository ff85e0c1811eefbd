"""A recipe on some GPUs: what one of them holds and does, by its keys and the questions expected."""

import math
from dataclasses import dataclass, replace

from sail_rl.command_line import BadInput
from sail_rl.config import CommonRecipe, GrpoRecipe, SftRecipe
from sail_rl.flops import Shape
from sail_rl.gpus import Gpu
from sail_rl.machine_checks import GIB
from sail_rl.planning.memory import (
    PLAIN,
    USABLE,
    Load,
    Memory,
    Precision,
    Settings,
    Sharding,
    cache_bytes,
    memory_of,
)
from sail_rl.planning.sizes import Sizes
from sail_rl.planning.speed import Update, Writing, rollout_seconds, update_seconds

QUESTION = 64  # tokens beside the pictures, unless --prompt says how many there are in all


@dataclass(frozen=True)
class Expected:
    """What questions and answers are like, in the mean."""

    prompt: int
    tiles: int
    completion: int


@dataclass(frozen=True)
class Task:
    """All that the formulas need; changed copies answer what would help."""

    recipe: CommonRecipe
    sizes: Sizes
    gpu: Gpu
    count: int
    expected: Expected
    sharding: Sharding = PLAIN

    # ---- what is trained

    @property
    def groups(self) -> int:
        """Groups of a step, or samples, that one GPU trains."""
        recipe = self.recipe
        whole = recipe.rollout.prompts_per_step if isinstance(recipe, GrpoRecipe) else recipe.sft.samples_per_step  # type: ignore[attr-defined]
        return math.ceil(whole / self.count)

    @property
    def shape(self) -> Shape:
        """Of one group."""
        told = self.expected
        size = self.recipe.rollout.num_generations if isinstance(self.recipe, GrpoRecipe) else 1
        return self.sizes.shape(told.prompt, told.tiles, (told.completion,) * size)

    @property
    def rows(self) -> list[Shape]:
        """What the update reads of a group: the group at once, or its prompt again for each completion."""
        shape = self.shape
        if self.recipe.update.mode in ("auto", "shared"):
            return [shape]
        return [replace(shape, lengths=(length,)) for length in shape.lengths]

    @property
    def settings(self) -> Settings:
        """The recipe's keys that matter for memory."""
        recipe, model = self.recipe, self.recipe.model
        weight_bytes = 4 if model.dtype == "float32" else 2
        return Settings(
            precision=self.precision,
            weight_bytes=weight_bytes,
            trained_bytes=4 if model.lora else weight_bytes,
            recompute=recipe.trainer.gradient_checkpointing,
            reference=isinstance(recipe, GrpoRecipe) and bool(recipe.grpo.beta) and not model.lora,
        )

    @property
    def precision(self) -> Precision:
        if self.recipe.model.dtype == "bfloat16":
            return "bfloat16"
        return "autocast" if self.recipe.trainer.mixed_precision == "bf16" else "float32"

    @property
    def update(self) -> Update:
        """A step's updates."""
        recipe, rows = self.recipe, self.rows * self.groups
        grpo = recipe.grpo if isinstance(recipe, GrpoRecipe) else None
        mini_batches, passes = (grpo.mini_batches, grpo.num_iterations) if grpo else (1, 1)
        tokens = sum(map(tokens_of, rows))
        return Update(
            shapes=rows,
            micro_batches=mini_batches * math.ceil(tokens / mini_batches / recipe.update.token_budget),
            optimizer_steps=mini_batches * passes,
            passes=passes,
            forwards=(bool(grpo.beta) + grpo.looks_ahead) if grpo else 0,
            recompute=recipe.trainer.gradient_checkpointing,
        )

    @property
    def load(self) -> Load:
        """A micro-batch as full as it gets. A group that is too large for it is cut; its prompt is there throughout."""
        update, budget = self.update, self.recipe.update.token_budget
        row = update.shapes[0]
        count = max(1, min(budget // tokens_of(row), len(update.shapes)))
        tokens = min(tokens_of(row) * count, max(budget, row.prompt))
        tokens += row.prompt if tokens_of(row) > budget else 0
        scored = min(sum(row.lengths) * count, budget)
        alone = update.micro_batches * update.passes == update.optimizer_steps
        return Load(tokens, sum(row.windows) * count, row.pictures * count, scored, alone)

    @property
    def memory(self) -> Memory:
        return memory_of(self.sizes, self.settings, self.load, self.sharding, self.count)

    # ---- who writes

    @property
    def writing(self) -> Writing | None:
        """None where nothing is written. vLLM writes as many completions at once as its cache has room for."""
        if not isinstance(self.recipe, GrpoRecipe):
            return None
        rollout, length = self.recipe.rollout, self.expected.prompt + self.expected.completion
        engine_precision: Precision = "bfloat16" if self.precision == "autocast" else self.precision
        of_token = cache_bytes(self.sizes, engine_precision)
        at_once = rollout.batch_size
        if rollout.engine != "hf":
            free = rollout.vllm.gpu_memory_utilization * self.gpu.memory_gib * GIB - self.engine_weights
            if free < length * of_token:
                raise BadInput(
                    f"rollout.vllm.gpu_memory_utilization = {rollout.vllm.gpu_memory_utilization}: of "
                    f"{self.gpu.memory_gib:g} GiB the engine's weights alone take {self.engine_weights / GIB:.1f}; "
                    "raise it, or take GPUs with more memory"
                )
            at_once = min(at_once, int(free / (length * of_token)))
        # transformers reads float32, and writes and reads autocast's copies.
        read = self.sizes.matrices * (8 if rollout.engine == "hf" and self.precision == "autocast" else 0)
        return Writing(rollout.engine, at_once, read or self.engine_weights, of_token)

    @property
    def engine_weights(self) -> float:
        """Bytes of an engine's own copy."""
        return (self.sizes.weights - self.sizes.adapters) * (4 if self.precision == "float32" else 2)

    @property
    def engine_bytes(self) -> float:
        """Beside what training holds, while completions are written: hf's cache and whole weights, or vLLM's share."""
        writing = self.writing
        if writing is None or writing.engine == "vllm_server":
            return 0
        if writing.engine == "vllm_colocate":
            return self.recipe.rollout.vllm.gpu_memory_utilization * self.gpu.memory_gib * GIB  # type: ignore[attr-defined]
        longest = self.expected.prompt + self.recipe.rollout.max_completion_length  # type: ignore[attr-defined]
        whole = self.sizes.weights * self.settings.weight_bytes if self.sharding.weights else 0
        copies = 2 * self.sizes.matrices if self.precision == "autocast" else 0
        at_once = min(writing.at_once, self.groups * len(self.shape.lengths))
        return whole + copies + at_once * longest * writing.cache_bytes

    # ---- what comes out

    @property
    def peak(self) -> float:
        """GiB, of the phase that needs most."""
        return max(self.memory.update, self.memory.static + self.engine_bytes) / GIB

    @property
    def fits(self) -> bool:
        return self.peak <= USABLE * self.gpu.memory_gib

    @property
    def seconds(self) -> tuple[float, float]:
        """(rollout, update) of a step."""
        update = update_seconds(self.sizes, self.gpu, self.update)
        if (writing := self.writing) is None:
            return 0.0, update
        groups = self.groups
        if writing.engine == "vllm_server":
            servers = len(self.recipe.rollout.server.urls) or 1  # type: ignore[attr-defined]
            groups = math.ceil(self.recipe.rollout.prompts_per_step / servers)  # type: ignore[attr-defined]
        return rollout_seconds(self.sizes, self.gpu, [self.shape] * groups, writing), update


def tokens_of(shape: Shape) -> int:
    """Of a row."""
    return shape.prompt + sum(shape.lengths)


def expected_of(
    recipe: CommonRecipe,
    sizes: Sizes,
    prompt: int | None = None,
    tiles: int | None = None,
    completion: int | None = None,
) -> Expected:
    """What the command line says; else a picture of four tiles and its thumbnail, and half of the longest answer."""
    tiles = min(5, (recipe.model.max_tiles or 4) + 1) if tiles is None else tiles
    prompt = prompt or tiles * sizes.tile_tokens + QUESTION
    if prompt < tiles * sizes.tile_tokens:
        raise BadInput(f"--prompt {prompt}: its {tiles} tiles alone have {tiles * sizes.tile_tokens} tokens")
    if isinstance(recipe, GrpoRecipe):
        most = recipe.rollout.max_completion_length
    else:
        assert isinstance(recipe, SftRecipe)
        most = max(1, recipe.sft.max_length - prompt)
    return Expected(prompt, tiles, completion or max(1, most // 2))
