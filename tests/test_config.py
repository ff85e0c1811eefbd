"""Recipes: every mistake named at once, overrides, shipped recipes, and answers that come before torch loads."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sail_rl.command_line import BadInput, load_recipe, recipe_text
from sail_rl.config import GrpoRecipe, SftRecipe
from sail_rl.config_data import FAMILIES

REPO = Path(__file__).resolve().parent.parent
RECIPES = sorted(path for path in (REPO / "recipes").glob("*.yaml") if not path.name.startswith("pipeline"))
SECONDS = 60  # bounds a hang; an answer that needs no torch takes about 1 s

PLAIN = """
output_dir: runs/test
model: owner/name
data: {train: pictures}
rewards: [{function: accuracy}]
trainer: {max_steps: 2}
"""


@pytest.fixture
def load(tmp_path):
    """Load PLAIN with some lines put in the place of its sections."""

    def load_changed(changes="", overrides=(), recipe_type=GrpoRecipe):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(PLAIN) | (yaml.safe_load(changes) or {})))
        return load_recipe(recipe_type, path, list(overrides))

    return load_changed


def message_of(function, *arguments, **keywords):
    """The text of the BadInput that a call must raise."""
    with pytest.raises(BadInput) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


def test_all_mistakes_are_named_at_once(load):
    message = message_of(
        load,
        """
        trainer: {max_step: 2}
        optim: {learning_rate: high, lr_scheduler_type: step}
        rollout: {temperature: 0}
        data: {train: {source: pictures, familys: [cards]}}
        learning_rate: 1
        """,
    )
    first, *lines = message.splitlines()
    assert first.endswith("recipe.yaml has 7 mistakes:")
    assert len(lines) == 7
    for expected in (
        "trainer.max_steps: this key is required",
        "trainer.max_step = 2: unknown key; did you mean max_steps? allowed: eval_batch_size,",
        'optim.learning_rate = "high": input should be a valid number',
        "optim.lr_scheduler_type = \"step\": input should be 'constant', 'linear' or 'cosine'",
        "rollout.temperature = 0: input should be greater than 0",
        'data.train.familys = ["cards"]: unknown key; did you mean families? allowed: columns,',
        "learning_rate = 1: unknown key; did you mean optim.learning_rate? allowed: data,",
    ):
        assert any(line.strip().startswith(expected) for line in lines), (expected, message)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ("grpo: {num_generations: 4}", "did you mean rollout.num_generations or num_iterations?"),
        ("pictures: {}", "pictures = {}: unknown key; allowed: data,"),
        ("data: {train: pictures, file: 3}", "data.file = 3: unknown key;"),
        ("data: {train: pictures, columns: {file: 3}}", "data.columns.file = 3: input should be a valid string"),
        ("data: {train: {source: pictures, families: [bars], forms: [summ]}}", "forms: got ('summ',); these families"),
        ("data: {train: pictures, reasoning: {terse: 0}}", "data.reasoning.terse = 0: input should be greater than 0"),
        ("data: {train: 5}", "data.train = 5: input should be a valid dictionary"),
        (
            "data: {train: {source: web, path: a}}",
            "data.train.source = \"web\": input should be 'pictures', 'file', 'hub'",
        ),
        ("data: {train: {path: a, families: [cards]}}", "unknown key; allowed: benchmark, columns, kind, path,"),
        ("data: {train: {source: file}}", "data.train.path: this key is required"),
        ("data: {train: {source: pictures, levels: [4]}}", "data.train.levels.0 = 4: input should be 1, 2 or 3"),
        ("data: {train: []}", "data.train = []: list should have at least 1 item"),
        ("data: {train: [pictures, {path: a, rows: 2}]}", "data.train.1.rows = 2: unknown key; did you mean"),
        ("data: {train: [pictures, {source: web}]}", "data.train.1.source = \"web\": input should be 'pictures',"),
        ("data: {train: [{path: a, weight: 1}, b.jsonl]}", "give a weight to each of several sources, or to none"),
        ("data: {train: {path: a, weight: 1}}", "give a weight to each of several sources, or to none"),
        ("data: {train: a.jsonl, eval: [{path: a, weight: 1}]}", "each question is asked once, so a source has no"),
        ("data: {train: {path: a, kind: cot}}", "a source has a `kind`, which `thinking: think` does not ask for"),
        ("trainer: {max_steps: '2'}", 'trainer.max_steps = "2": input should be a valid integer'),
        ("trainer: {max_steps: true}", "trainer.max_steps = true: input should be a valid integer"),
        ("trainer: {max_steps: 2.5}", "trainer.max_steps = 2.5: input should be a valid integer"),
        ("model: {}", "model = {}: give exactly one of `path` and `random_init`"),
        ("model: {path: a, random_init: tiny}", "give exactly one of"),
        ("rollout: {overlap: 1}", "`overlap` = 1 needs `engine` = vllm_server: hf cannot write during an update"),
        ("rollout: {engine: vllm_colocate, overlap: 1}", "vllm_colocate cannot write during an update"),
        ("rollout: {overlap: 2}", "rollout.overlap = 2: input should be 0 or 1"),
        (
            "rollout: {engine: vllm_server, overlap: 1}\ngrpo: {vllm_importance_sampling_correction: false}",
            "rollout.overlap = 1 trains on completions of older weights: leave out grpo.vllm_importance_sampling",
        ),
        ("rollout: {server: {urls: ['node7:8000']}}", 'rollout.server.urls.0 = "node7:8000": string should match'),
        ("rollout: {server: {restarts: -1}}", "rollout.server.restarts = -1: input should be greater than or equal"),
        ("seed: -1", "seed = -1: input should be greater than or equal to 0"),
        ("optim: {learning_rate: .inf}", "optim.learning_rate = Infinity: input should be a finite number"),
        ("rewards: []", "rewards = []: list should have at least 1 item"),
        ("rewards: [{function: accuracy, weight: .nan}]", "rewards.0.weight = NaN: input should be a finite number"),
        ("rewards: [{weight: 1}]", "rewards.0.function: this key is required"),
        ("rewards: [{function: 'a.py:same'}, {function: 'b.py:same'}]", "two entries are both logged as 'same'"),
        ("rollout: {num_generations: 1}", "rollout.num_generations = 1"),
        (
            "grpo: {dynamic_sampling: 2, baseline: batch}",
            "`dynamic_sampling` replaces groups whose rewards are all equal",
        ),
        ("grpo: {multi_objective_aggregation: normalize_then_sum, scale_rewards: none}", "leave out `baseline` and"),
        (
            "grpo: {multi_objective_aggregation: normalize_then_sum}\nreward_mix: {mode: product, factors: [accuracy]}",
            "normalize_then_sum adds rewards up, reward_mix.mode: product multiplies them",
        ),
        ("grpo: {mini_batches: 17}", "grpo.mini_batches = 17 is more than rollout.prompts_per_step = 16"),
        ("data: {train: a.jsonl, curriculum: {reward: mine}}", "data.curriculum.reward = 'mine' is not in rewards"),
        ("data: {train: a.jsonl, curriculum: {least_share: 0}}", "least_share = 0: input should be greater than 0"),
        (
            "data: {train: a.jsonl, curriculum: {}}\nrollout: {engine: vllm_server, overlap: 1}",
            "data.curriculum chooses prompts by what the last step has measured",
        ),
        ("grpo: {loss_type: cispo}", "`loss_type: cispo` cuts ratios at `epsilon_high` itself: give one of at least 1"),
        ("grpo: {loss_type: cispo, epsilon_high: 0.28}", "give one of at least 1, such as 5.0"),
        ("grpo: {kl_estimator: k1, beta: 0.1}", "set `use_bias_correction_kl: true`, or take k2"),
    ],
)
def test_a_mistake_is_named(load, changes, expected):
    message = message_of(load, changes)
    assert "recipe.yaml has 1 mistake:\n" in message
    assert expected in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2", "the key 'seed' is given twice"),
        ("optim: {beta: 1, beta: 2}", "the key 'beta' is given twice"),
        ("model: [a", "is not valid YAML"),
        ("\tmodel: a", "is not valid YAML"),
        ("", "is not a recipe: it holds NoneType"),
        ("- a\n- b", "is not a recipe: it holds list"),
    ],
)
@pytest.mark.fault(
    fault="hostile: recipes",
    injected="no YAML, no mapping, a key twice",
    expected="exit code 2 with the reason",
)
def test_a_file_that_is_no_recipe(tmp_path, text, expected):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    message = message_of(load_recipe, GrpoRecipe, path)
    assert message.startswith(str(path))
    assert expected in message


def test_a_missing_recipe_suggests_a_near_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message_of(load_recipe, GrpoRecipe, "recipes/quik.yaml") == "recipes/quik.yaml: there is no such recipe"
    Path("recipes").mkdir()
    Path("recipes/quick.yaml").touch()
    assert message_of(load_recipe, GrpoRecipe, "recipes/quik.yaml").endswith("; did you mean recipes/quick.yaml?")


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "0.1e-4", "0.00001", "+1e-5"])
def test_exponents_are_numbers(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(PLAIN + f"optim: {{learning_rate: {text}}}")
    assert load_recipe(GrpoRecipe, path).optim.learning_rate == pytest.approx(1e-5)
    assert load_recipe(GrpoRecipe, path, [f"optim.weight_decay={text}"]).optim.weight_decay == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("override", "value_of", "expected"),
    [
        ("seed=7", lambda recipe: recipe.seed, 7),
        ("output_dir=a=b", lambda recipe: recipe.output_dir, "a=b"),
        ("trainer.max_steps=9", lambda recipe: recipe.trainer.max_steps, 9),
        ("trainer.mixed_precision=no", lambda recipe: recipe.trainer.mixed_precision, "no"),  # YAML's false
        ("rollout.batch_size=3", lambda recipe: recipe.rollout.batch_size, 3),
        ("rewards.0.weight=0.5", lambda recipe: recipe.rewards[0].weight, 0.5),
        ("rewards.0.length=40", lambda recipe: recipe.rewards[0].arguments, {"length": 40}),
        ("rewards.0={function: format}", lambda recipe: recipe.rewards[0].function, "format"),
        (
            "data.train.levels=[2]",
            lambda recipe: (recipe.data.train.source, recipe.data.train.levels),
            ("pictures", [2]),
        ),
        ("data.eval.path=rows.jsonl", lambda recipe: recipe.data.eval.source, "file"),
        (
            "data.eval=rows.parquet",
            lambda recipe: (recipe.data.eval.source, recipe.data.eval.path),
            ("file", "rows.parquet"),
        ),
        (
            "data.train=owner/name",
            lambda recipe: (recipe.data.train.source, recipe.data.train.path),
            ("hub", "owner/name"),
        ),
        ("model.freeze=[tower]", lambda recipe: (recipe.model.path, recipe.model.freeze), ("owner/name", ["tower"])),
        ("model=other/name", lambda recipe: recipe.model.path, "other/name"),
    ],
)
def test_an_override_changes_its_key_alone(load, override, value_of, expected):
    recipe = load(overrides=[override])
    assert value_of(recipe) == expected
    exclude = {override.split("=")[0].split(".")[0]}
    assert recipe.model_dump(exclude=exclude) == load().model_dump(exclude=exclude)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.max_steps", "write it as key.sub=value"),
        ("=2", "write it as key.sub=value"),
        ("model.freeze=[tower", "the value is not valid YAML"),
        ("rewards.1.weight=2", "rewards.1 is not one of the 1 entries (0 is the first)"),
        ("rewards.-1.weight=2", "rewards.-1 is not one of the 1 entries"),
        ("rewards.first.weight=2", "rewards.first is not one of the 1 entries"),
        ("rewards.5=2", "rewards.5 is not one of the 1 entries"),
        ("model.freeze.0.part=x", 'model.freeze.0 is "llm", which has no keys'),
        ("model.freeze.0.part.name=x", 'model.freeze.0 is "llm", which has no keys'),
        ("trainer.max_stepz=2", "trainer.max_stepz = 2: unknown key; did you mean max_steps?"),
        ("seed.deep=2", 'seed = {"deep": 2}: input should be a valid integer'),
    ],
)
def test_an_override_that_cannot_be_applied(load, override, expected):
    message = message_of(load, "model: {path: a, freeze: [llm]}", [override])
    assert expected in message


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_its_resolved_form_loads_again(path, tmp_path):
    recipe_type = GrpoRecipe if "rewards" in yaml.safe_load(path.read_text()) else SftRecipe
    recipe = load_recipe(recipe_type, path)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(recipe_text(recipe))
    assert load_recipe(recipe_type, resolved) == recipe


def test_recipes_are_shipped_and_families_are_listed_once():
    assert {"quickstart.yaml", "quickstart_sft.yaml"} <= {path.name for path in RECIPES}
    everything = {"train": {"source": "pictures", "families": list(FAMILIES)}}
    assert GrpoRecipe.model_validate(yaml.safe_load(PLAIN) | {"data": everything}).data.train.families == list(FAMILIES)


def run_python(*arguments):
    """Run the interpreter in the repository; its error output lists every import."""
    command = [sys.executable, "-X", "importtime", *arguments]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=SECONDS)


def imported(result):
    """Top-level modules that a run imported."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.split("|")[-1].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize(
    ("arguments", "code", "stream", "expected"),
    [
        (["--help"], 0, "stdout", "trainer: max_steps, "),
        (["recipes/quickstart.yaml", "--dry-run", "trainer.max_steps=17"], 0, "stdout", "max_steps: 17"),
        (["recipes/quickstart.yaml", "trainer.max_step=2"], 2, "stderr", "did you mean max_steps?"),
        (["recipes/quickstrat.yaml"], 2, "stderr", "did you mean recipes/quickstart.yaml?"),
        ([], 2, "stderr", "required: recipe"),
    ],
)
def test_the_command_answers_before_torch_loads(arguments, code, stream, expected):
    result = run_python("sail_rl/train_grpo.py", *arguments)
    assert result.returncode == code, result.stderr[-2000:]
    assert expected in getattr(result, stream)
    assert "Traceback" not in result.stdout + result.stderr
    assert "pydantic" in imported(result)
    assert not {"torch", "transformers"} & imported(result)


def test_importing_the_package_imports_neither_torch_nor_transformers():
    result = run_python("-c", "import sail_rl, sail_rl.config, sail_rl.run_folder")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "sail_rl" in imported(result)
    assert not {"torch", "transformers"} & imported(result)
