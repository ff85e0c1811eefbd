"""Questions on their way through a step: example and prompt together, and their pictures as files for people."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from PIL import Image

from rollouts import Prompt, Rollout
from sail_rl.config import CommonRecipe, GrpoRecipe, SftRecipe
from sail_rl.config_data import DataSection
from sail_rl.data.curriculum import Curriculum
from sail_rl.data.example import Example
from sail_rl.data.images import BadRow
from sail_rl.data.mixture import open_sources
from sail_rl.data.prompting import Sample, answer_form, make_prompt, make_sample, pick_trace
from sail_rl.data.stream import RowStream
from sail_rl.launch import Run

Item = TypeVar("Item")
LARGEST_SIDE = 768  # of a picture that is kept for people to look at
LARGEST_FRAME = 384  # of a frame: there are many, and they are shown side by side


@dataclass(frozen=True)
class Question:
    """A row of data and what the model reads of it."""

    example: Example
    prompt: Prompt


@overload
def question_stream(run: Run, part: Literal["train"], processor) -> RowStream[Question]: ...
@overload
def question_stream(run: Run, part: Literal["eval"], processor) -> RowStream[Question] | None: ...
def question_stream(run, part, processor):
    """The questions of `data.train` or `data.eval`; None where the recipe names no source."""
    data = run.recipe.data
    prepare = partial(make_question, processor=processor, data=data)
    return None if part == "eval" and data.eval is None else checked_stream(run, part, prepare)


def make_question(example: Example, position: int, processor, data: DataSection) -> Question:
    """An example as the model reads it."""
    form = answer_form(example, data.thinking)
    if example.columns["answer"] is None:
        raise BadRow("no `answer` (or `solution`) to compare with; map one with data.columns or drop the row")
    if data.thinking == "by_kind":  # the format reward reads this column
        example = replace(example, columns=dict(example.columns) | {"thinking": form})
    return Question(example, make_prompt(example, processor, form, data.max_prompt_length, position))


def give_curriculum(run: Run[GrpoRecipe], stream: RowStream[Question], pass_rates: dict[int, float]) -> None:
    """Let the recipe's curriculum choose from the stream, with the pass rates of an earlier part of the run."""
    section = run.recipe.data.curriculum
    if section is not None:
        stream.curriculum = Curriculum(run.recipe.rollout.num_generations, section.least_share, run.recipe.seed)
        stream.curriculum.rates.update(pass_rates)


def note_passes(
    run: Run[GrpoRecipe], stream: RowStream[Question], questions: Sequence[Question], passes: Sequence[float | None]
) -> dict[int, float]:
    """The pass rates after a step with these questions of this process, and these rewards of all processes."""
    if stream.curriculum is None:
        return {}
    positions = run.shard.gather([question.prompt.seed for question in questions])
    stream.curriculum.note([stream.order.row_at(position) for position in positions], passes)
    return dict(stream.curriculum.rates)


def sample_stream(run: Run, processor) -> RowStream[Sample]:
    """SFT samples of `data.train`."""
    return checked_stream(run, "train", partial(place_sample, processor=processor, recipe=run.recipe))


def place_sample(example: Example, position: int, processor, recipe: SftRecipe) -> Sample:
    """An example as a sample, with the reasoning trace that belongs to its position."""
    trace = pick_trace(recipe.data.reasoning, recipe.seed, position)
    return make_sample(example, processor, recipe.data, recipe.sft, trace)


def checked_stream(run: Run, part: str, prepare: Callable[[Example, int], Item]) -> RowStream[Item]:
    """A stream over a source of the recipe, its rows checked as far as can be without decoding pictures."""
    data = run.recipe.data
    sources, split = (data.train_sources, "train") if part == "train" else (data.eval_sources, "validation")
    rows = open_sources(sources, data.columns, split, f"data.{part}")
    stream = RowStream(
        rows,
        prepare,
        seed=run.recipe.seed,
        shuffle=data.shuffle and part == "train",
        max_bad_rows=data.max_bad_rows,
        quarantine_file=run.folder / "quarantine.jsonl",
        shard=run.shard,
        video_frames=data.video_frames,
        workers=None if rows.streamed else run.workers,  # each of them would read the whole stream
        one_pass=part == "eval",
        compared=compares(run.recipe),
    )
    stream.check_rows()
    return stream


def compares(recipe: CommonRecipe) -> bool:
    """Whether completions are compared with right answers, which then have to be such that this can be done."""
    return isinstance(recipe, GrpoRecipe) and any(entry.function == "accuracy" for entry in recipe.rewards)


def reward_columns(questions: Sequence[Question], rollouts: Sequence[Rollout], run: Path) -> dict[str, list[Any]]:
    """What reward functions receive, one entry per completion: TRL's arguments and every data column."""
    group_size = len(rollouts) // len(questions)
    examples = [question.example for question in questions for _ in range(group_size)]
    columns: dict[str, list[Any]] = {"question": [example.question for example in examples]} | {
        name: [example.columns.get(name) for example in examples]
        for name in dict.fromkeys(name for example in examples for name in example.columns)
    }
    paths = {id(question.example): picture_paths(run, question.example) for question in questions}
    return columns | {
        "prompts": [example.messages if example.conversational else example.question for example in examples],
        "completions": [as_completion(e, r.text) for e, r in zip(examples, rollouts, strict=True)],
        "completion_ids": [rollout.token_ids for rollout in rollouts],
        "finish_reason": [rollout.finish_reason for rollout in rollouts],
        "images": [paths[id(example)] for example in examples],
    }


def as_completion(example: Example, text: str) -> str | list[dict[str, str]]:
    """A string, or a message where the data is conversational."""
    return [{"role": "assistant", "content": text}] if example.conversational else text


def picture_paths(run: Path, example: Example) -> list[str]:
    """Files of the example's pictures and frames; those without one are written to the run folder."""
    given = example.columns["images"]
    if given and all(path is not None for path in given) and not example.videos:
        return list(given)
    return [str(run / name) for name in save_pictures(run, example)]


def save_pictures(run: Path, example: Example) -> list[str]:
    """Write pictures, then frames, small enough to look at, and return their names within the run folder."""
    frames = [frame for video in example.videos for frame in video]
    return [
        *(save_picture(run, f"{example.id}/{n}", image, LARGEST_SIDE) for n, image in enumerate(example.images)),
        *(save_picture(run, f"{example.id}/frame{n}", frame, LARGEST_FRAME) for n, frame in enumerate(frames)),
    ]


def save_picture(run: Path, origin: str, image: Image.Image, largest_side: int) -> str:
    """Write one picture if it is not there yet; its name within the run folder."""
    # Ids are data: a hash keeps them from naming places outside the folder.
    digest = hashlib.sha256(origin.encode() + image.tobytes()).hexdigest()[:16]
    small = max(image.size) <= largest_side
    name = f"pictures/{digest}.{'png' if small else 'jpg'}"
    if not (run / name).exists():
        if not small:
            image = image.copy()
            image.thumbnail((largest_side, largest_side))
        image.save(run / name)
    return name
