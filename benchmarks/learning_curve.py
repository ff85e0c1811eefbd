"""Accuracy over the number of rollouts: the quickstart trained by train_grpo.py and by TRL's own training loop."""

import json
import time
from collections.abc import Callable, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from transformers import TrainerCallback

from benchmarks.common import SHORT_RESULTS, markdown
from benchmarks.full_step import Task, new_run, trl_row, trl_trainer
from benchmarks.quickstart_runs import launch, sft_start
from rollouts.hf import HFEngine
from sail_rl.command_line import load_recipe
from sail_rl.config import GrpoRecipe
from sail_rl.eval import evaluate, share
from sail_rl.model.cpu_linear import use_torch
from sail_rl.model.cpu_passes import use_all_passes
from sail_rl.model.load import image_token_ids, load_model
from sail_rl.questions import question_stream

RECIPE = Path("recipes/quickstart.yaml")
STEPS, SHORT_STEPS = 60, 10
EVAL_EVERY, QUESTIONS = 4, 1000
Point = dict[str, Any]


def curve(seeds: Sequence[int], short: bool) -> list[Point]:
    """The points of both sides, seed by seed."""
    steps = SHORT_STEPS if short else STEPS
    points = []
    for seed in seeds:
        start = sft_start(seed, short)
        for side, run in (("ours", our_points), ("trl", trl_points)):
            points += kept_points(side, run, start, seed, steps)
    return points


def kept_points(side: str, run: Callable[..., list[Point]], start: Path, seed: int, steps: int) -> list[Point]:
    """A run's points, from its file if it is done."""
    folder = SHORT_RESULTS / f"curve_{side}{steps}_seed{seed}"
    file = folder / "points.json"
    if not file.is_file():
        points = [{"side": side, "seed": seed, **point} for point in run(folder, start, seed, steps)]
        file.write_text(json.dumps(points, indent=2) + "\n")
    return json.loads(file.read_text())


def our_points(folder: Path, start: Path, seed: int, steps: int) -> list[Point]:
    """Of the real command, from the files of its run."""
    overrides = [*of_run(folder, start, seed), f"trainer.eval_every={EVAL_EVERY}"]
    launch("sail_rl/train_grpo.py", str(RECIPE), steps, *overrides)
    summary = json.loads((folder / "summary.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    recipe = load_recipe(GrpoRecipe, folder / "config.yaml", [])
    seconds, points = 0.0, [point(recipe, 0, summary["accuracy_before"], 0.0)]
    for record in records:
        seconds += sum(value for name, value in record.items() if name.startswith("seconds/"))
        accuracy = summary["accuracy_after"] if record["step"] == steps else record.get("eval/accuracy")
        if accuracy is not None:
            points.append(point(recipe, record["step"], accuracy, seconds))
    return points


def of_run(folder: Path, start: Path, seed: int) -> list[str]:
    """What differs from the quickstart's recipe."""
    return [f"seed={seed}", f"model={start}", f"output_dir={folder}", f"data.eval.rows={QUESTIONS}"]


def point(recipe: GrpoRecipe, step: int, accuracy: float | None, seconds: float) -> Point:
    """One point of a curve."""
    rollouts = step * recipe.rollout.prompts_per_step * recipe.rollout.num_generations
    return {"rollouts": rollouts, "accuracy": accuracy, "seconds": seconds}


def trl_points(folder: Path, start: Path, seed: int, steps: int) -> list[Point]:
    """Of `GRPOTrainer.train()`, from the same checkpoint, on the same questions in the same order."""
    recipe = load_recipe(GrpoRecipe, RECIPE, [*of_run(folder, start, seed), f"trainer.max_steps={steps}"])
    model, processor = load_model(recipe.model, seed)
    use_torch(model)
    use_all_passes(model)
    run = new_run(recipe)
    questions = question_stream(run, "train", processor).next_items(steps * recipe.rollout.prompts_per_step)
    task = Task(recipe, model, processor, recipe.rollout.prompts_per_step * recipe.rollout.num_generations)
    trainer = trl_trainer(task, model, [trl_row(question) for question in questions])
    recorder = Recorder(run, model, processor)
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.points


class Recorder(TrainerCallback):
    """Evaluates TRL's model with our engine and judge, off the clock."""

    def __init__(self, run, model, processor):
        self.run, self.points, self.seconds = run, [], 0.0
        self.engine = HFEngine(model, processor.tokenizer, image_token_ids(model, processor))
        self.stream = question_stream(run, "eval", processor)

    def on_train_begin(self, arguments, state, control, **_):
        self.record(0)

    def on_step_end(self, arguments, state, control, **_):
        self.seconds += time.perf_counter() - self.started
        if state.global_step % EVAL_EVERY == 0:
            self.record(state.global_step)
        self.started = time.perf_counter()

    def record(self, step: int) -> None:
        accuracy = share(evaluate(self.run, self.engine, self.stream))
        print(f"TRL, step {step}: accuracy {accuracy:.3f} after {self.seconds:.0f} s", flush=True)
        self.points.append(point(self.run.recipe, step, accuracy, self.seconds))
        self.started = time.perf_counter()


def curve_table(points: Sequence[Point]) -> str:
    """A line for each number of rollouts."""
    numbers = dict.fromkeys(point["rollouts"] for point in points)
    lines = [curve_line([point for point in points if point["rollouts"] == number]) for number in numbers]
    return f"Greedy accuracy on {QUESTIONS} unseen questions.\n\n{markdown(lines, {name: name for name in lines[0]})}"


def curve_line(points: Sequence[Point]) -> dict[str, Any]:
    """Mean and spread over the seeds, how far the sides are apart, and seconds of training until then."""
    line: dict[str, Any] = {"rollouts": points[0]["rollouts"]}
    means, variance_of_difference = [], 0.0
    for side in ("ours", "trl"):
        here = [point for point in points if point["side"] == side]
        accuracies = [point["accuracy"] for point in here]
        spread = stdev(accuracies) if len(accuracies) > 1 else 0.0
        means.append(mean(accuracies))
        variance_of_difference += spread**2 / len(accuracies)
        line[side] = f"{means[-1]:.3f} ± {spread:.3f}"
        line[f"{side} seconds"] = mean(point["seconds"] for point in here)
    line["difference"] = f"{means[0] - means[1]:+.3f}"
    line["two standard errors"] = f"{2 * sqrt(variance_of_difference):.3f}"
    return line
