"""The model of a recipe answers the recipe's questions, through its rollout engine, and the answers are judged."""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rewards.accuracy import PASSED, accuracy_verdicts
from rewards.format import is_well_formed
from rollouts import Rollout, RolloutEngine, Sampling
from sail_rl.command_line import BadInput, load_recipe
from sail_rl.config import GrpoRecipe
from sail_rl.data.building.job import Job, Taken
from sail_rl.data.building.rows import file_digest
from sail_rl.data.example import make_example
from sail_rl.data.images import BadRow
from sail_rl.data.mixture import JoinedRows, open_sources
from sail_rl.data.prompting import answer_form
from sail_rl.data.stream import RowStream, Shard
from sail_rl.questions import Question, make_question
from sail_rl.run_folder import check_files, check_model_path

# Keys of rollout that may change when the work goes on.
FREE_KEYS = ("server", "vllm", "num_generations", "prompts_per_step", "batch_size", "overlap", "parity_limit")


Asked = tuple[Taken, Question]


@dataclass(frozen=True)
class Attempt:
    """One completion of the model's."""

    text: str
    correct: bool
    """By the rewards' comparison, cut off completions being wrong."""
    well_formed: bool


@dataclass(frozen=True)
class Sampled:
    """A row with the model's attempts at it."""

    taken: Taken
    form: str
    """The answer form that was asked for."""
    attempts: list[Attempt]
    unscored: int
    """Attempts that could not be judged; they are not among `attempts`."""


@dataclass(frozen=True)
class Sampler:
    """Everything that writes and judges attempts."""

    recipe: GrpoRecipe
    folder: Path
    """Of the rows' pictures."""
    processor: Any
    engine: RolloutEngine
    sampling: Sampling
    count: int

    @property
    def at_once(self) -> int:
        """Rows of a chunk: as many completions as the engine writes at once."""
        return max(1, self.recipe.rollout.batch_size // self.count)

    def sample(self, taken: Sequence[Taken]) -> tuple[list[Sampled], list[tuple[Taken, str]]]:
        """Rows with their attempts, and those that cannot be asked, with the reason."""
        asked, rollouts, refused = self.ask(taken)
        return judge_attempts(asked, rollouts, self.recipe.data.thinking), refused

    def ask(self, taken: Sequence[Taken]) -> tuple[list[Asked], list[Rollout], list[tuple[Taken, str]]]:
        """Rows as questions, the completions of all of them, and the rows that cannot be asked, with the reason."""
        asked, refused = [], []
        for one in taken:
            try:
                asked.append((one, self.question(one)))
            except BadRow as error:
                refused.append((one, str(error)))
        rollouts = self.engine.generate([question.prompt for _, question in asked], self.count, self.sampling)
        return asked, rollouts, refused

    def stream(self, job: Job) -> RowStream:
        """The rows as a training run would read them, for the check before the first."""
        prepare = partial(make_question, processor=self.processor, data=self.recipe.data)
        frames, most = self.recipe.data.video_frames, len(job.rows)
        return RowStream(
            job.rows,
            prepare,
            seed=0,
            shuffle=False,
            max_bad_rows=most,
            quarantine_file=None,
            shard=Shard(),
            video_frames=frames,
        )

    def question(self, one: Taken) -> Question:
        """A row as the model reads it; its number is the seed of its attempts."""
        data = self.recipe.data
        name = f"row {one.number + 1}"
        example = make_example(one.row, name, {}, self.folder, data.video_frames, compared=True)
        return make_question(example, one.number, self.processor, data)


def judge_attempts(asked: Sequence[Asked], rollouts: Sequence[Rollout], thinking: str) -> list[Sampled]:
    """The completions of each row, judged: all of them in one call."""
    count = len(rollouts) // max(len(asked), 1)
    names = ("answer", "answer_type", "options", "tolerance")
    columns: dict[str, Any] = {n: [q.example.columns.get(n) for _, q in asked for _ in range(count)] for n in names}
    texts = [rollout.text for rollout in rollouts]
    reasons = [rollout.finish_reason for rollout in rollouts]
    verdicts = accuracy_verdicts(texts, finish_reason=reasons, **columns) if texts else []
    sampled = []
    for place, (one, question) in enumerate(asked):
        form = answer_form(question.example, thinking)
        members = range(place * count, (place + 1) * count)
        judged = [(texts[i], verdicts[i].value) for i in members]
        attempts = [Attempt(text, v >= PASSED, is_well_formed(text, form)) for text, v in judged if v is not None]
        sampled.append(Sampled(one, form, attempts, count - len(attempts)))
    return sampled


def read_recipe(arguments: argparse.Namespace) -> GrpoRecipe:
    """The recipe with what one pass over its rows changes: in order, prepared here, and nothing is trained."""
    recipe = load_recipe(GrpoRecipe, arguments.recipe, arguments.overrides)
    check_files(recipe)
    return for_one_pass(recipe, arguments)


def for_one_pass(recipe: GrpoRecipe, arguments: argparse.Namespace) -> GrpoRecipe:
    """A recipe as it is used here."""
    check_model_path(recipe.model.path)
    if arguments.samples < 1:
        raise BadInput(f"--samples {arguments.samples}: give 1 or more")
    data = recipe.data.model_copy(update={"workers": 0, "eval": None})
    trainer = recipe.trainer.model_copy(update={"log_with": []})
    folder = str(run_folder(arguments.output))
    return recipe.model_copy(update={"data": data, "trainer": trainer, "output_dir": folder})


def run_folder(output: Path) -> Path:
    """Where an engine finds the model's description, and a server writes its log; gone when all is done."""
    return output.with_suffix(".run")


def sampling_job(command: str, recipe: GrpoRecipe, arguments: argparse.Namespace, **settings: Any) -> Job:
    """The recipe's rows and what the attempts at them depend on."""
    rows = open_sources(recipe.data.train_sources, recipe.data.columns, "train", "data.train")
    rows.weights = None  # each row once, whatever the mixture
    return job_on(rows, command, recipe, arguments, **settings)


def job_on(rows: JoinedRows, command: str, recipe: GrpoRecipe, arguments: argparse.Namespace, **settings: Any) -> Job:
    """The same for rows that are open."""
    rollout = recipe.rollout.model_dump(mode="json", exclude=set(FREE_KEYS))
    data = recipe.data.model_dump(mode="json", include={"train", "thinking", "video_frames", "max_prompt_length"})
    model = recipe.model.model_dump(mode="json") | {"files": weights_of(recipe)}
    values = {"model": model, "data": data, "rollout": rollout, "seed": recipe.seed, "samples": arguments.samples}
    return Job(command, rows, arguments.output, values | settings, arguments.limit)


def weights_of(recipe: GrpoRecipe) -> list[str]:
    """What tells this checkpoint from another that was written in its place."""
    files = sorted(Path(recipe.model.path).glob("*.safetensors")) if recipe.model.path else []
    return [f"{file.name}, {file_digest(file)}" for file in files]


@contextmanager
def open_sampler(recipe: GrpoRecipe, job: Job, count: int, greedy: bool = False) -> Iterator[Sampler]:
    """The model in its engine, which is checked against the model itself as before a training run."""
    from rewards import algebra_pool
    from sail_rl.checkpoint import full_parameters
    from sail_rl.engines import make_engine
    from sail_rl.launch import start_run
    from sail_rl.model.load import image_token_ids, load_model
    from sail_rl.parity import check_parity
    from sail_rl.sampling import greedy_sampling, training_sampling
    from sail_rl.sharding import Whole

    run = start_run(recipe)
    if run.shard.world_size > 1:
        raise BadInput(f"{job.command} is one process; to use several GPUs, name servers in rollout.server.urls")
    print(f"loading {recipe.model.path or recipe.model.random_init}", flush=True)
    model, processor = load_model(recipe.model, recipe.seed)
    model = model.to(run.accelerator.device).eval()
    whole, suppressed = Whole(model, nullcontext), image_token_ids(model, processor)
    engine = make_engine(run, whole, processor, suppressed)
    try:
        engine.load_weights(full_parameters(model), version=0)
        sampling = greedy_sampling(recipe) if greedy else training_sampling(recipe)
        sampler = Sampler(recipe, job.output.parent, processor, engine, sampling, count)
        check_parity(run, whole, engine, sampler.stream(job), suppressed)
        yield sampler
    finally:
        engine.close()
        algebra_pool.close()
    shutil.rmtree(run.folder)
