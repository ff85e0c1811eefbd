"""Names and imports: our packages are ours, shadow nothing, and depend on each other one way."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import rewards
import rollouts
import sail_rl

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("sail_rl", "rewards", "rollouts")
FILES = [file for package in PACKAGES for file in sorted((REPO / package).rglob("*.py"))]


def name_of(file):
    return str(file.relative_to(REPO))


def imports_of(file):
    """(module, level) of every import statement, wherever it stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


@pytest.mark.parametrize("package", [sail_rl, rewards, rollouts], ids=lambda package: package.__name__)
def test_packages_resolve_to_this_repository(package):
    assert Path(package.__file__) == REPO / package.__name__ / "__init__.py"


def test_the_walk_finds_files_and_imports():
    assert {"sail_rl/train_grpo.py", "rewards/accuracy.py", "rollouts/hf.py"} <= {name_of(file) for file in FILES}
    found = [module for module, _ in imports_of(REPO / "sail_rl" / "train_grpo.py")]
    assert {"sail_rl.config", "sail_rl.engines"} <= set(found)  # the second stands inside a function


@pytest.mark.parametrize("file", [file for file in FILES if not name_of(file).startswith("sail_rl")], ids=name_of)
def test_rewards_and_rollouts_import_nothing_of_sail_rl(file):
    assert [module for module, _ in imports_of(file) if module.split(".")[0] == "sail_rl"] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_are_absolute(package):
    files = [file for file in FILES if file.is_relative_to(REPO / package)]
    assert [(name_of(file), module) for file in files for module, level in imports_of(file) if level] == []


def test_nothing_under_sail_rl_shadows_another_module():
    # Scripts are launched by path, so sail_rl/ itself comes first on the module path.
    ours = {path.stem for path in (REPO / "sail_rl").iterdir() if path.suffix == ".py" or path.is_dir()}
    ours -= {"__init__", "__pycache__"}
    others = set(sys.stdlib_module_names) | (set(packages_distributions()) - set(PACKAGES))
    assert {"json", "torch", "datasets"} <= others
    assert sorted(ours & (others | set(PACKAGES))) == []
