"""A run's folder: when it may go on, what is missing where, the log of a resumed run, and the learning rate."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from sail_rl.command_line import BadInput, recipe_text
from sail_rl.config import OptimSection, SftRecipe
from sail_rl.metrics import deviation, keep_steps_until, mean, plain_number
from sail_rl.optimizer import schedule, set_learning_rate
from sail_rl.run_folder import changed_keys, check_model_path, check_run, finished, write_json, write_json_lines

REPO = Path(__file__).resolve().parent.parent


def recipe(output_dir, changes=""):
    """A recipe with some sections changed."""
    values = {
        "output_dir": str(output_dir),
        "model": "owner/name",
        "data": {"train": "pictures", "columns": {"answer": "gold"}},
        "optim": {"learning_rate": 1e-6},
        "trainer": {"max_steps": 10},
    }
    for section, changed in (yaml.safe_load(changes) or {}).items():
        values[section] = values.get(section, {}) | changed if isinstance(changed, dict) else changed
    return SftRecipe.model_validate(values)


@pytest.fixture
def run_folder(tmp_path):
    """A folder in which a run has begun."""
    (tmp_path / "config.yaml").write_text(recipe_text(recipe(tmp_path)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        "",
        "trainer: {max_steps: 20}",
        "trainer: {save_every: 1, save_total_limit: 9, transcript_every: 3, log_with: [tensorboard]}",
        "data: {max_bad_rows: 3}",
    ],
)
def test_a_run_goes_on_with_the_same_recipe_or_free_keys_changed(run_folder, changes):
    check_run(recipe(run_folder, changes))


def test_a_changed_recipe_is_refused_with_the_difference(run_folder):
    changes = """
    seed: 1
    optim: {learning_rate: 2.0e-6}
    trainer: {max_steps: 20, mixed_precision: bf16}
    data: {columns: {question: problem}, eval: pictures}
    """
    with pytest.raises(BadInput) as caught:
        check_run(recipe(run_folder, changes))
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"output_dir = {run_folder} has a run with another recipe")
    assert sorted(line.strip().split(", now {")[0] for line in lines) == [
        "data.columns.answer: it was 'gold', now None",
        "data.columns.question: it was None, now 'problem'",
        "data.eval: it was None",
        "optim.learning_rate: it was 1e-06, now 2e-06",
        "seed: it was 0, now 1",
        "trainer.mixed_precision: it was 'no', now 'bf16'",
    ]


def test_keys_that_are_newer_than_a_run_have_their_defaults(run_folder):
    saved = yaml.safe_load((run_folder / "config.yaml").read_text())
    del saved["update"]["attention"], saved["data"]["workers"]
    (run_folder / "config.yaml").write_text(yaml.safe_dump(saved))
    check_run(recipe(run_folder))
    with pytest.raises(BadInput, match=r"update\.attention: it was 'auto', now 'flex'"):
        check_run(recipe(run_folder, "update: {attention: flex}"))


def test_the_recipe_of_another_version_is_compared_as_it_is(run_folder):
    saved = yaml.safe_load((run_folder / "config.yaml").read_text())
    (run_folder / "config.yaml").write_text(yaml.safe_dump(saved | {"removed": 3}))
    with pytest.raises(BadInput, match="removed: it was 3, now None"):
        check_run(recipe(run_folder))


def test_a_run_that_failed_before_its_first_step_may_be_changed(run_folder):
    (run_folder / "metrics.jsonl").unlink()
    check_run(recipe(run_folder, "seed: 1"))
    (run_folder / "checkpoints/step_1").mkdir(parents=True)
    with pytest.raises(BadInput, match="seed: it was 0, now 1"):
        check_run(recipe(run_folder, "seed: 1"))


def test_never_refuses_a_folder_with_a_run_and_takes_one_without(run_folder, tmp_path_factory):
    with pytest.raises(BadInput, match=r"already has a run, and trainer\.resume = never"):
        check_run(recipe(run_folder, "trainer: {resume: never}"))
    check_run(recipe(tmp_path_factory.mktemp("empty"), "trainer: {resume: never}"))
    check_run(recipe(run_folder / "new", "trainer: {resume: never}"))


def test_an_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="it is a file"):
        check_run(recipe(tmp_path / "file"))


def test_changed_keys_of_a_key_that_came_or_went():
    assert changed_keys({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == [("a.c", None, 2)]
    assert changed_keys({"a": {"b": 1}}, {"a": None}) == [("a", {"b": 1}, None)]
    assert changed_keys({"trainer": {"max_steps": 1}}, {"trainer": {"max_steps": 2}}) == []


@pytest.mark.parametrize(("steps", "done"), [(None, False), (9, False), (10, True), (11, True)])
def test_finished(tmp_path, steps, done):
    if steps is not None:
        write_json(tmp_path / "summary.json", {"steps": steps, "accuracy_after": 0.5})
    assert finished(recipe(tmp_path)) == ({"steps": steps, "accuracy_after": 0.5} if done else None)


@pytest.mark.parametrize("path", [None, "gpt2", "owner/name", "recipes"])
def test_model_paths_that_pass(path, monkeypatch):
    monkeypatch.chdir(REPO)
    check_model_path(path)


@pytest.mark.parametrize("path", ["./name", "/no/such", "~/name", "runs/name", "a/b/c", "../b"])
def test_a_missing_checkpoint(path, monkeypatch):
    monkeypatch.chdir(REPO)
    with pytest.raises(BadInput) as caught:
        check_model_path(path)
    assert str(caught.value) == f"model.path = {path}: there is no checkpoint"


@pytest.mark.parametrize("path", ["runs/quickstart-sft/final", "./runs/quickstart-sft/final"])
def test_a_missing_checkpoint_says_what_makes_it(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for name in ("quickstart_sft.yaml", "quickstart.yaml"):
        (tmp_path / "recipes" / name).write_text((REPO / "recipes" / name).read_text())
    with pytest.raises(BadInput, match="it is the quickstart's start: run make quickstart"):
        check_model_path(path)
    with pytest.raises(BadInput, match=r"recipes/quickstart\.yaml makes it: run that first"):
        check_model_path("runs/quickstart/final")


def test_files_are_replaced_whole(tmp_path):
    for value in ({"a": "é"}, {"b": None}):
        write_json(tmp_path / "value.json", value)
        assert json.loads((tmp_path / "value.json").read_text()) == value
    write_json_lines(tmp_path / "rows.jsonl", [{"a": 1}, {"path": Path("x")}])
    assert (tmp_path / "rows.jsonl").read_text() == '{"a": 1}\n{"path": "x"}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "value.json"]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [1, 2]), (5, [1, 2, 3])])
@pytest.mark.fault(
    fault="run folder: a torn last line",
    injected="a killed run's half record",
    expected="dropped; each step once",
)
def test_a_resumed_run_drops_the_records_that_it_writes_again(tmp_path, step, kept):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": number, "loss": 0.5}) + "\n" for number in (1, 2, 3)))
    keep_steps_until(file, step)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"step": n, "loss": 0.5} for n in kept]
    keep_steps_until(tmp_path / "none.jsonl", step)
    assert not (tmp_path / "none.jsonl").exists()


def test_figures_leave_out_what_is_not_known():
    assert mean([1.0, None, 0.0]) == 0.5
    assert deviation([1.0, None, 0.0]) == 0.5
    assert (mean([None]), deviation([])) == (None, None)
    values = [plain_number(value) for value in (torch.tensor(0.5), float("nan"), -math.inf, 3, None)]
    assert values == [0.5, None, None, 3, None]


@pytest.mark.parametrize(
    ("keys", "shares"),
    [
        ({"lr_scheduler_type": "constant"}, {1: 1.0, 5: 1.0, 10: 1.0}),
        ({"lr_scheduler_type": "constant", "warmup_steps": 4}, {1: 0.25, 2: 0.5, 4: 1.0, 5: 1.0, 10: 1.0}),
        ({"lr_scheduler_type": "linear"}, {1: 1.0, 2: 0.9, 6: 0.5, 10: 0.1}),
        ({"lr_scheduler_type": "linear", "warmup_steps": 5}, {1: 0.2, 5: 1.0, 6: 1.0, 7: 0.8, 10: 0.2}),
        ({"lr_scheduler_type": "linear", "min_lr_ratio": 0.5}, {1: 1.0, 6: 0.75}),
        ({"lr_scheduler_type": "cosine"}, {1: 1.0, 6: 0.5, 10: (1 + math.cos(0.9 * math.pi)) / 2}),
        ({"lr_scheduler_type": "cosine", "min_lr_ratio": 0.2}, {1: 1.0, 6: 0.6}),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 10}, {5: 0.5, 10: 1.0}),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 50}, {10: 0.2}),
    ],
)
def test_the_schedule(keys, shares):
    optim = OptimSection(**keys)
    assert {step: schedule(optim, step, 10) for step in shares} == pytest.approx(shares)


def test_the_rate_is_set_on_every_group():
    optim = OptimSection(learning_rate=0.01, lr_scheduler_type="linear")
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}, {"lr": 0.0}])
    assert set_learning_rate(optimizer, optim, step=6, max_steps=10) == pytest.approx(0.005)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005, 0.005])
