"""A run is a folder: what is in it, whether it may go on, and what machine wrote it. Imports no torch at the top."""

import importlib.util
import json
import os
import platform
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rewards.load import RewardError, find_reward
from sail_rl.command_line import BadInput
from sail_rl.config import CommonRecipe, GrpoRecipe
from sail_rl.config_data import FileSource

# Keys that may differ when a run goes on: they change how long and how loudly it runs, not what it computes.
FREE_KEYS = (
    "trainer.max_steps",
    "trainer.num_train_epochs",
    "trainer.save_every",
    "trainer.save_total_limit",
    "trainer.push_to_hub",
    "trainer.transcript_every",
    "trainer.resume",
    "trainer.log_with",
    "trainer.profile",
    "trainer.stuck_after",
    "update.token_budget",
    "data.max_bad_rows",
    "data.workers",
    # Where and how patiently the judge is asked; the judge itself stays.
    *(f"judge.{key}" for key in ("base_url", "api_key_env", "concurrency", "call_seconds", "batch_seconds")),
    *(f"judge.{key}" for key in ("tries", "breaker", "cache", "when_failing")),
    "reward_workers",
    "rollout.server",
)


def check_run(recipe: CommonRecipe) -> None:
    """Everything about folders that can be wrong, before torch is imported."""
    check_model_path(recipe.model.path)
    check_trackers(recipe.trainer.log_with)
    check_files(recipe)
    folder = Path(recipe.output_dir)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"output_dir = {folder}: it is a file")
    if not has_begun(folder):
        return
    if recipe.trainer.resume == "never":
        raise BadInput(f"output_dir = {folder} already has a run, and trainer.resume = never; name another folder")
    differences = changed_keys(saved_recipe(folder, type(recipe)), recipe.model_dump(mode="json"))
    if differences:
        raise BadInput(
            f"output_dir = {folder} has a run with another recipe; go on with the same, or name another folder:\n"
            + "\n".join(f"  {key}: it was {old!r}, now {new!r}" for key, old, new in differences)
        )


def saved_recipe(folder: Path, kind: type[CommonRecipe]) -> Any:
    """The recipe of the run in a folder. Keys that are newer than it have their defaults; what no longer is a recipe of
    this kind stays as it was written."""
    saved = read_saved(folder)
    try:
        return kind.model_validate(saved).model_dump(mode="json")
    except ValidationError:
        return saved


def read_saved(run_folder: Path) -> Any:
    """A run's config.yaml as plain values: it may come from elsewhere, with objects in it that would be made."""
    file = run_folder / "config.yaml"
    try:
        return yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{file} is not the recipe of a run: {' '.join(str(error).split())}") from None


def has_begun(folder: Path) -> bool:
    """Whether a run in this folder has done a step; one that failed before may be started anew with another recipe."""
    metrics = folder / "metrics.jsonl"
    recorded = metrics.is_file() and metrics.stat().st_size > 0
    return (folder / "config.yaml").is_file() and (recorded or any((folder / "checkpoints").glob("step_*")))


def check_model_path(path: str | None) -> None:
    """A local checkpoint folder must exist; a Hub id is looked up later."""
    if path is None or Path(path).is_dir():
        return
    is_hub_id = path.count("/") <= 1 and path[0] not in "./~"
    if is_hub_id and not path.startswith("runs/"):
        return
    maker = recipe_that_writes(Path(path))
    hint = f"\n  {maker} makes it: run that first" if maker else ""
    if maker and Path(maker).stem == "quickstart_sft":
        hint = "\n  it is the quickstart's start: run make quickstart"
    raise BadInput(f"model.path = {path}: there is no checkpoint{hint}")


def check_trackers(names: list) -> None:
    """A tracker whose package is missing is a mistake; accelerate would leave it out without a word."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise BadInput(f"trainer.log_with = [{name}]: the package is not installed; pip install {name}")


def check_files(recipe: CommonRecipe) -> None:
    """Data files and reward functions that the recipe names must exist; all that are missing are named at once."""
    parts = {"data.train": recipe.data.train_sources, "data.eval": recipe.data.eval_sources}
    missing = [
        f"{key}{f'.{number}' if len(sources) > 1 else ''}.path = {source.path}: there is no such file"
        for key, sources in parts.items()
        for number, source in enumerate(sources)
        if isinstance(source, FileSource) and not Path(source.path).is_file()
    ]
    for number, entry in enumerate(recipe.rewards if isinstance(recipe, GrpoRecipe) else []):
        try:
            find_reward(entry.function)
        except RewardError as error:
            missing.append(f"rewards.{number}: {error}")
    if missing:
        raise BadInput("\n  ".join(missing))


def recipe_that_writes(path: Path) -> str | None:
    """The shipped recipe whose output_dir holds this path."""
    for file in sorted(Path("recipes").glob("*.yaml")):
        found = re.search(r"^output_dir:\s*(\S+)", file.read_text(), re.MULTILINE)
        if found and path.is_relative_to(found[1]):
            return str(file)
    return None


def changed_keys(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of all keys that differ, save those that may."""
    if prefix.rstrip(".") in FREE_KEYS or old == new:
        return []
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [(prefix.rstrip("."), old, new)]
    keys = dict.fromkeys([*old, *new])
    return [change for key in keys for change in changed_keys(old.get(key), new.get(key), f"{prefix}{key}.")]


def finished(recipe: CommonRecipe) -> dict[str, Any] | None:
    """The summary of a run that has done all its steps, else None."""
    file = Path(recipe.output_dir) / "summary.json"
    summary = json.loads(file.read_text()) if file.is_file() else {}
    return summary if summary.get("steps", -1) >= recipe.trainer.max_steps else None


def environment(accelerator) -> dict[str, Any]:
    """Versions, devices, processes and threads of this run."""
    import torch

    return {
        "python": platform.python_version(),
        **{package: installed(package) for package in ("torch", "transformers", "accelerate", "sail-rl")},
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        "processes": accelerator.num_processes,
        "distributed_type": str(accelerator.distributed_type.value),
        "threads_per_process": torch.get_num_threads(),
    }


def installed(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_json(path: Path, value: Any) -> None:
    """Replace a file of one JSON value."""
    replace_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Replace a file whole: a reader never sees half of it, nor does whoever goes on after an end in the middle."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a file of one JSON object a line."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("w") as file:
        # Escaped: some characters that a model may write end a line for `splitlines`, others cannot be encoded.
        file.writelines(json.dumps(row, default=str) + "\n" for row in rows)
    os.replace(temporary, path)
