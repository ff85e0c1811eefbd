"""The contract with vLLM: what a version of it changed is told by name, without an engine."""

import ast

import pytest
import torch
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


def test_tokens_are_drawn_from_the_distribution_each_by_its_own_seed():
    """20,000 draws of one distribution; a token does not depend on what else is drawn beside it."""
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    vllm_compat.draw_by_one_number()
    sampler = TopKTopPSampler(logprobs_mode=vllm_compat.LOG_PROBS)
    logits_V = torch.tensor([0.0, 1.0, 2.0, -torch.inf, 3.0])

    def drawn(seeds, top_k=None):
        generators = {row: torch.Generator().manual_seed(seed) for row, seed in enumerate(seeds)}
        top_k_R = None if top_k is None else torch.full((len(seeds),), top_k)
        return sampler(logits_V.repeat(len(seeds), 1), generators, top_k_R, None)

    seeds = range(20_000)
    tokens_R, log_probs_RV = drawn(seeds)
    expected_V = logits_V.softmax(-1)
    assert tokens_R.bincount(minlength=5) / len(seeds) == pytest.approx(expected_V, abs=4 * 0.5 / len(seeds) ** 0.5)
    assert (tokens_R != 3).all()
    torch.testing.assert_close(log_probs_RV[0], expected_V.log())
    assert drawn(seeds[100:80:-1])[0].tolist() == tokens_R.tolist()[100:80:-1]
    assert set(drawn(seeds[:1000], top_k=2)[0].tolist()) == {2, 4}
