"""Shipped recipes: each passes its dry run, and those of real models train a tiny one of their family."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import BIN, ROOT, SMALL, command
from datasets import Dataset, Features, Sequence, Value
from datasets import Image as DatasetImage
from PIL import Image

from rewards import accuracy_reward
from sail_rl.command_line import load_recipe
from sail_rl.config import GrpoRecipe
from sail_rl.data.example import make_example
from sail_rl.data.sources import open_rows

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
ACCELERATE = (str(BIN / "accelerate"), "launch")
FAMILIES = {
    "rlvr.yaml": ("tiny", "SailVL2ForConditionalGeneration"),
    "rlvr_8b.yaml": ("tiny", "SailVL2ForConditionalGeneration"),
    "rlvr_qwen3_vl.yaml": ("tiny_qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "rlvr_internvl3_5.yaml": ("tiny_internvl", "InternVLForConditionalGeneration"),
}
# Fresh weights answer nothing right: a reward that tells completions apart gives every step a gradient.
REWARD = "def spread(completions, **columns):\n    return [float(sum(map(ord, text)) % 11) for text in completions]\n"


def script(recipe: Path) -> str:
    """The trainer that a recipe is for."""
    return "sail_rl/train_grpo.py" if "rewards" in yaml.safe_load(recipe.read_text()) else "sail_rl/train_sft.py"


def cpu_overrides() -> list[str]:
    """The overrides that recipes/README.md gives for a try on a CPU."""
    lines = (ROOT / "recipes/README.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if "recipes/rlvr.yaml output_dir=" in line)
    text = lines[start].rstrip("\\")
    while lines[start].endswith("\\"):
        start += 1
        text += " " + lines[start].rstrip("\\")
    return text.split("recipes/rlvr.yaml")[1].split()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_dry_run(recipe):
    result = command(script(recipe), recipe.relative_to(ROOT), "--dry-run")
    assert result.returncode == 0, result.stderr
    shown, written = yaml.safe_load(result.stdout), yaml.safe_load(recipe.read_text())
    assert shown["output_dir"] == written["output_dir"]
    assert shown["trainer"].items() >= written["trainer"].items()


def test_columns_of_the_dataset(tmp_path):
    """A row with the columns of hiyouga/geometry3k, as its card lists them, becomes a question with its picture."""
    features = {"images": Sequence(DatasetImage()), "problem": Value("string"), "answer": Value("string")}
    features |= {"id": Value("int64"), "choices": Sequence(Value("string")), "ground_truth": Value("string")}
    row = {"images": [Image.new("RGB", (60, 40))], "problem": "<image>Find $x$.", "answer": "2 \\sqrt { 221 }", "id": 7}
    row |= {"choices": ["3", "2 \\sqrt { 221 }"], "ground_truth": "B"}
    Dataset.from_list([row], features=Features(features)).to_parquet(tmp_path / "rows.parquet")
    recipe = load_recipe(GrpoRecipe, ROOT / "recipes/rlvr.yaml", [f"data.train={tmp_path / 'rows.parquet'}"])
    rows = open_rows(recipe.data.train, "train", "data.train")
    example = make_example(rows.row(0), "0", recipe.data.columns, rows.folder)
    assert (example.id, example.question, example.images[0].size) == ("7", "Find $x$.", (60, 40))
    assert [part["type"] for part in example.messages[0]["content"]] == ["image", "text"]
    completions = [f"<think>see</think>\n\\boxed{{{answer}}}" for answer in ("2\\sqrt{221}", "3")]
    columns = {name: [value] * 2 for name, value in example.columns.items()}
    assert accuracy_reward(completions=completions, **columns) == [1.0, 0.0]


def test_dry_run_through_accelerate():
    result = command("sail_rl/train_grpo.py", "recipes/rlvr.yaml", "--dry-run", launcher=ACCELERATE)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["model"]["path"] == "BytedanceDouyinContent/SAIL-VL2-2B"


@pytest.mark.parametrize(
    "recipe",
    [
        # The 8B's tiny model is the 2B's.
        pytest.param(recipe, id=recipe.name, marks=[pytest.mark.slow] if recipe.name == "rlvr_8b.yaml" else [])
        for recipe in RECIPES
        if recipe.name.startswith("rlvr")
    ],
)
def test_two_steps_of_a_tiny_model_of_the_family(recipe, tmp_path):
    """The command of recipes/README.md, with the family's tiny model and a reward that fresh weights can earn."""
    family, model_class = FAMILIES[recipe.name]
    (tmp_path / "mine.py").write_text(REWARD)
    run = tmp_path / "run"
    changed = [f"output_dir={run}", f"model.random_init={family}", f"rewards.0.function={tmp_path / 'mine.py'}:spread"]
    overrides = [*cpu_overrides(), *changed]
    result = command(script(recipe), recipe.relative_to(ROOT), *overrides, launcher=ACCELERATE)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["grad_norm"] > 0 and record["rewards/spread/std"] > 0 for record in records)
    assert json.loads((run / "final/config.json").read_text())["architectures"] == [model_class]
    assert json.loads((run / "summary.json").read_text())["eval_questions"] == 8


def test_sft_of_qwen3_vl(tmp_path):
    """The other trainer, with the family whose inputs differ most from SAIL-VL2's."""
    run = tmp_path / "run"
    overrides = ("model.random_init=tiny_qwen3_vl", "data.train.families=[cards, bars]", "data.train.forms=null")
    result = command("sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", *SMALL, *overrides, f"output_dir={run}")
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[1]["loss"] < records[0]["loss"]
    assert json.loads((run / "final/config.json").read_text())["model_type"] == "qwen3_vl"
