"""Shipped recipes: each passes its dry run, and those of real models train a tiny one of their family."""

import json
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from conftest import BIN, ROOT, SMALL, command
from datasets import Dataset, Features, Sequence, Value
from datasets import Image as DatasetImage
from PIL import Image

from rewards import accuracy_reward
from sail_rl.command_line import load_recipe
from sail_rl.config import GrpoRecipe, SftRecipe
from sail_rl.data.example import make_example
from sail_rl.data.sources import open_rows

RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if not path.name.startswith("pipeline"))
ACCELERATE = (str(BIN / "accelerate"), "launch")
FAMILIES = {
    "rlvr.yaml": ("tiny", "SailVL2ForConditionalGeneration"),
    "rlvr_8b.yaml": ("tiny", "SailVL2ForConditionalGeneration"),
    "rlvr_a3b.yaml": ("tiny", "SailVL2ForConditionalGeneration"),
    "rlvr_qwen3_vl.yaml": ("tiny_qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "rlvr_internvl3_5.yaml": ("tiny_internvl", "InternVLForConditionalGeneration"),
}
SAME_MODEL = ("rlvr_8b.yaml", "rlvr_a3b.yaml")
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


def test_phases_of_basic_sft_are_commands_that_work():
    """Phases 2 to 4 are the recipe with the keys that its first lines name; each starts from the one before."""
    lines = (ROOT / "recipes/sft_basic.yaml").read_text().splitlines()
    phases = [shlex.split(line)[3:] for line in lines if line.startswith("#   ... recipes/sft_basic.yaml")]
    recipes = [load_recipe(SftRecipe, ROOT / "recipes/sft_basic.yaml", overrides) for overrides in ([], *phases)]
    assert [recipe.output_dir for recipe in recipes] == [f"runs/sft_basic_{phase}" for phase in (1, 2, 3, 4)]
    for before, recipe in pairwise(recipes):
        assert recipe.model.path == f"{before.output_dir}/final"
        assert recipe.data.train != before.data.train
    assert [source.weight for source in recipes[3].data.train_sources] == [1, 1]


def test_think_fusion_on_rows_of_ones_own_sets_bad_ones_aside(start, tmp_path):
    """The recipe of a real model, on a tiny one: a pass over two files, each with two rows that cannot be used."""
    Image.new("RGB", (56, 56), "red").save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    good = {"question": "What is A plus B?", "answer": "3", "images": ["good.png"]}
    direct = [*[good] * 8, good | {"images": ["torn.png"], "id": "torn"}]
    direct.append({"messages": [{"role": "user", "content": "Why?"}], "id": "alone"})
    traced = good | {"reasoning": "A is 1 and B is 2."}
    traces = [*[traced] * 2, traced | {"reasoning": "A is <think> 1", "id": "open"}, traced | {"reasoning": "1 " * 99}]
    for name, rows in (("direct", direct), ("traces", traces)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    overrides = [f"model.path={start}", f"output_dir={run}", "trainer.mixed_precision='no'", "data.max_bad_rows=4"]
    overrides += [f"data.train.{n}.path={tmp_path / name}.jsonl" for n, name in enumerate(("direct", "traces"))]
    overrides += ["data.train.0.weight=1", "sft.samples_per_step=4", "sft.max_length=150", "optim.learning_rate=1e-3"]
    result = command("sail_rl/train_sft.py", "recipes/sft_think_fusion.yaml", *overrides)
    assert result.returncode == 0, result.stderr
    quarantined = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    found = {(r["source"].split("/")[-1], r["row"], r["id"]): r["reason"] for r in quarantined}
    reasons = {
        ("direct.jsonl (direct)", 9, "torn"): "image torn.png cannot be read",
        ("direct.jsonl (direct)", 10, "alone"): "the conversation does not end with a turn of the assistant's",
        ("traces.jsonl (cot)", 3, "open"): "the target's think tags are <think>, <think>, </think>",
        ("traces.jsonl (cot)", 4, "-"): "prompt and target have",
    }
    assert found.keys() == reasons.keys()
    assert all(found[row].startswith(reason) for row, reason in reasons.items())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]  # 14 rows, four a step
    assert all(record["samples/cot"] + record["samples/direct"] == 4 for record in records)
    assert all(record["samples/cot"] > 0 for record in records)
    assert records[-1]["data/bad_rows"] == 4
    assert records[-1]["nll/cot"] < records[0]["nll/cot"]


def test_dry_run_through_accelerate():
    result = command("sail_rl/train_grpo.py", "recipes/rlvr.yaml", "--dry-run", launcher=ACCELERATE)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["model"]["path"] == "BytedanceDouyinContent/SAIL-VL2-2B"


@pytest.mark.parametrize(
    "recipe",
    [
        # The 8B's and A3B's tiny model is the 2B's.
        pytest.param(recipe, id=recipe.name, marks=[pytest.mark.slow] if recipe.name in SAME_MODEL else [])
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
    # Tiny models are dense: what the A3B's recipe asks of its experts has to be left out.
    dense = ["model.router_aux_loss_coef=0"] if recipe.name == "rlvr_a3b.yaml" else []
    overrides = [*cpu_overrides(), *changed, *dense]
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
