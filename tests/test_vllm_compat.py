"""The contract with vLLM: what a version of it changed is told by name, without an engine."""

import ast

import pytest
from conftest import ROOT

from rollouts import vllm_compat

pytestmark = pytest.mark.vllm


def test_the_installed_version_has_all_that_is_asked_for():
    assert vllm_compat.differences() == []


def test_what_is_missing_is_named(monkeypatch):
    """Had this version other names, each would be told."""
    asked = {"vllm.LLM": {"hibernate": (), "sleep": ("depth",)}}
    monkeypatch.setattr(vllm_compat, "ASKED", asked)
    monkeypatch.setattr(vllm_compat, "SETTINGS", ("dtype", "speed"))
    monkeypatch.setattr(vllm_compat, "SAMPLING", ("n", "beauty"))
    assert vllm_compat.differences() == [
        "vllm.LLM has no hibernate",
        "vllm.LLM.sleep takes no depth",
        "vllm.LLM takes no speed",
        "vllm.SamplingParams takes no beauty",
    ]


def test_nothing_else_in_rollouts_knows_vllm():
    """Imports of vLLM, and the list of what is passed to it."""
    importers, passed = [], set()
    for file in sorted((ROOT / "rollouts").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "vllm" for name in names):
                importers.append(file.name)
            if file.name == "vllm_compat.py" and isinstance(node, ast.Call) and getattr(node.func, "id", "") == "LLM":
                passed |= {keyword.arg for keyword in node.keywords}
    assert set(importers) == {"vllm_compat.py"}
    assert passed == set(vllm_compat.SETTINGS)
