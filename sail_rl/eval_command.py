"""`sail-rl eval`: the model of a recipe answers `data.eval` through the recipe's engine, and is judged.

The questions go through the machinery of `sail-rl data`: answers are on the disk in `predictions.jsonl.progress` before
the next chunk begins, and the same command goes on after any end.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from sail_rl.checkpoint_accuracy import read_eval_recipe
from sail_rl.command_line import BadInput
from sail_rl.config import CommonRecipe, GrpoRecipe, RolloutSection, SftRecipe, TrainerSection
from sail_rl.config_rewards import RewardEntry
from sail_rl.data.building.job import Job, Record, Taken, do_job, open_journal
from sail_rl.data.building.report import Report
from sail_rl.data.building.sampling_run import Asked, Sampler, for_one_pass, job_on, open_sampler
from sail_rl.data.mixture import JoinedRows, open_sources
from sail_rl.data.prompting import answer_form
from sail_rl.eval import Prediction, judge
from sail_rl.eval_figures import all_figures, markdown_table
from sail_rl.run_folder import write_json


def evaluate_recipe(arguments: argparse.Namespace) -> None:
    """The whole command."""
    folder: Path = arguments.output
    if folder.is_file():
        raise BadInput(f"--output {folder}: it is a file; name a folder")
    arguments.output = folder / "predictions.jsonl"
    recipe = for_one_pass(with_rollouts(read_eval_recipe(Path(arguments.recipe), arguments.overrides)), arguments)
    job = evaluation_job(recipe, arguments)
    journal = open_journal(job)
    if journal is not None:
        greedy = arguments.samples == 1
        with closing(journal), open_sampler(recipe, job, arguments.samples, greedy) as sampler:
            do_job(job, journal, partial(work, sampler, job.rows), sampler.at_once)
    write_summary(folder, recipe, job)


def with_rollouts(recipe: CommonRecipe) -> GrpoRecipe:
    """A recipe of either trainer as one that writes completions to `data.eval`, in the place of `data.train`."""
    model = recipe.model.model_copy(update={"lora": None, "freeze": []})
    data = recipe.data.model_copy(update={"train": recipe.data.eval, "eval": None, "curriculum": None})
    if isinstance(recipe, GrpoRecipe):
        return recipe.model_copy(update={"model": model, "data": data})
    assert isinstance(recipe, SftRecipe)
    length, at_once = recipe.sft.max_completion_length, recipe.trainer.eval_batch_size
    return GrpoRecipe(
        seed=recipe.seed,
        output_dir=recipe.output_dir,
        model=model,
        data=data,
        rollout=RolloutSection(max_completion_length=length, batch_size=at_once),
        rewards=[RewardEntry(function="accuracy")],
        trainer=TrainerSection(max_steps=1, mixed_precision=recipe.trainer.mixed_precision),
    )


def evaluation_job(recipe: GrpoRecipe, arguments: argparse.Namespace) -> Job:
    """All questions of `data.eval`, which `with_rollouts` has put in the place of `data.train`."""
    rows = open_sources(recipe.data.train_sources, recipe.data.columns, "validation", "data.eval")
    return job_on(rows, "eval", recipe, arguments)


def work(sampler: Sampler, rows: JoinedRows, taken: Sequence[Taken]) -> list[Record]:
    """A record for each question of a chunk, with a prediction for each of its completions."""
    asked, rollouts, refused = sampler.ask(taken)
    records = [one.dropped("malformed row", why) for one, why in refused]
    if not asked:
        return records
    questions = [question for _, question in asked for _ in range(sampler.count)]
    judged = judge(questions, rollouts, sampler.recipe.data.thinking, Path(sampler.recipe.output_dir))
    for place, pair in enumerate(asked):
        mine = judged[place * sampler.count : (place + 1) * sampler.count]
        more = facts_of(pair, sampler.recipe.data.thinking) | source_of(rows, pair[0])
        answers = [told(one, number) | more for number, one in enumerate(mine)]
        figures = {f"right of {sampler.count}": str(sum(one["correct"] for one in mine))}
        records.append(pair[0].kept("answered", *answers, figures=figures))
    return records


def told(prediction: Prediction, sample: int) -> Prediction:
    """A prediction with what can be seen in its text."""
    text, cut_off = prediction["completion"], prediction["finish_reason"] == "length"
    return prediction | {"sample": sample, "thought": thought(text), "truncated": cut_off}


def thought(text: str) -> bool:
    """Whether there is anything in a think block, also in one that the length limit has cut off."""
    _, opened, behind = text.partition("<think>")
    return bool(opened and behind.partition("</think>")[0].strip())


def facts_of(pair: Asked, thinking: str) -> dict[str, Any]:
    """What the predictions of one question share: how it was asked for, and its pictures."""
    taken, question = pair
    media = {name: taken.row[name] for name in ("images", "videos") if taken.row.get(name)}
    return {"mode": answer_form(question.example, thinking), "images": []} | media


def source_of(rows: JoinedRows, taken: Taken) -> dict[str, str]:
    """Where the question comes from, if there are several places."""
    return {"source": rows.locate(taken.number)[0].rows.name} if len(rows.parts) > 1 else {}


def write_summary(folder: Path, recipe: GrpoRecipe, job: Job) -> None:
    """`summary.json` and `summary.md` of finished predictions."""
    predictions = read_predictions(folder / "predictions.jsonl")
    if not predictions:
        raise BadInput(f"{folder}: no question could be asked; predictions.dropped.jsonl says why")
    report = Report.read_from(job.output)
    assert report is not None  # do_job ends with it
    samples, model = job.settings["samples"], recipe.model.path or recipe.model.random_init
    head = {"model": model, "engine": recipe.rollout.engine, "samples": samples, "greedy": samples == 1}
    head |= {"seed": recipe.seed, "not_asked": report.read - sum(report.kept.values())}
    figures = all_figures(predictions, recipe.seed)
    table = markdown_table(figures)
    drawn = "greedy" if samples == 1 else f"{samples} completions each, temperature {recipe.rollout.temperature:g}"
    title = f"# {model} ({drawn})\n\n"
    (folder / "summary.md").write_text(title + table + not_asked_line(head["not_asked"], folder))
    write_json(folder / "summary.json", head | figures)
    print(table + not_asked_line(head["not_asked"], folder), flush=True)
    print(f"{folder / 'summary.json'}, summary.md and predictions.jsonl", flush=True)


def not_asked_line(count: int, folder: Path) -> str:
    """A word on rows that are missing from the figures."""
    return f"\n{count} rows could not be asked: {folder / 'predictions.dropped.jsonl'}\n" if count else ""


def read_predictions(file: Path) -> list[Prediction]:
    """The lines of a predictions.jsonl."""
    with file.open() as lines:
        return [json.loads(line) for line in lines]
