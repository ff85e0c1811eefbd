"""Accuracy of a checkpoint on a recipe's `data.eval`, outside of a run; nothing is left behind."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from rollouts.hf import HFEngine
from sail_rl.command_line import BadInput, load_recipe
from sail_rl.config import CommonRecipe
from sail_rl.config_pipeline import trainer_of
from sail_rl.data.stream import Shard
from sail_rl.eval import Prediction, by_column, evaluate, share
from sail_rl.launch import Run
from sail_rl.model.load import image_token_ids, load_model
from sail_rl.questions import question_stream


def read_eval_recipe(path: Path, overrides: list[str] | None = None) -> CommonRecipe:
    """A recipe of either trainer, told apart by its rewards, that has questions to evaluate on."""
    recipe = load_recipe(trainer_of(path), path, overrides)
    if recipe.data.eval is None:
        raise BadInput(f"{path}: data.eval names no questions; give it a source")
    return recipe


def checkpoint_predictions(recipe: CommonRecipe, checkpoint: Path) -> list[Prediction]:
    """The checkpoint's greedy answers to all questions of `data.eval`, judged."""
    section = recipe.model.model_copy(update={"path": str(checkpoint), "random_init": None, "lora": None, "freeze": []})
    model, processor = load_model(section, recipe.seed)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="sail-rl-eval-") as folder:
        (Path(folder) / "pictures").mkdir()
        run = Run(recipe, Path(folder), accelerator=None, shard=Shard())
        stream = question_stream(run, "eval", processor)
        assert stream is not None
        print(f"evaluating {checkpoint} on {len(stream.rows)} questions", file=sys.stderr, flush=True)
        engine = HFEngine(model, processor.tokenizer, image_token_ids(model, processor), recipe.trainer.eval_batch_size)
        return evaluate(run, engine, stream)


def checkpoint_accuracy(recipe: CommonRecipe, checkpoint: Path) -> dict[str, Any]:
    """Of all questions, and by kind where the data has them."""
    predictions = checkpoint_predictions(recipe, checkpoint)
    kinds = {kind: found["after"] for kind, found in by_column("kind", [], predictions).items()}
    return {"accuracy": share(predictions), "questions": len(predictions)} | ({"kinds": kinds} if kinds else {})
