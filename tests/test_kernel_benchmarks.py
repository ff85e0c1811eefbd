"""The benchmarks of kernels on a model of a few thousand weights: equal work is timed, other work is refused."""

import json
import sys

import pytest
import torch
from test_benchmarks import few_weights  # noqa: F401  (a fixture)

from benchmarks import attention, kernels
from benchmarks.kernels import Variant

pytestmark = pytest.mark.usefixtures("one_thread", "few_weights")
SHAPE = (256, 8, 2)


def rows_of(benchmark, monkeypatch, folder):
    """What the short command writes."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--short", "--json", str(folder / "result.json")])
    benchmark.main()
    rows = json.loads((folder / "result.json").read_text())["rows"]
    assert (folder / "result.md").read_text().count("\n| ") == len(rows) + 2  # headings and a line
    return rows


def test_kernels_gives_every_variant(monkeypatch, tmp_path):
    """What is compiled is traced here, not made into code, which takes half a minute."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # the command's own is taken back
    compile_module, compiled = torch.nn.Module.compile, []

    def traced(module, **options):
        compiled.append(type(module).__name__)
        compile_module(module, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    monkeypatch.setattr(kernels, "SHORT_SHAPE", SHAPE)
    monkeypatch.setattr(kernels, "SHORT_ROUNDS", 1)
    rows = rows_of(kernels, monkeypatch, tmp_path)
    told = [(family, name) for family, variants in kernels.families(short=True).items() for name in variants]
    assert [(row["family"], row["variant"]) for row in rows] == told
    assert all(row["seconds"] > 0 and float(row["difference"]) < 1e-4 for row in rows)
    assert compiled == ["Qwen3DecoderLayer"] * 2
    firsts = {row["family"]: row["ratio"] for row in reversed(rows)}
    assert firsts == {"compile": 1, "experts": 1, "optimizer": 1}


def scaled(policy):
    """Another model."""
    policy.lm_head.weight.data *= 1.1


@pytest.mark.parametrize("other", [Variant(scaled), Variant(optimizer={"eps": 1.0})], ids=["model", "optimizer"])
def test_another_update_is_refused(other):
    world = kernels.make_world("compile", SHAPE)
    with pytest.raises(RuntimeError, match="other makes another update"):
        kernels.measure("family", world, {"first": Variant(), "other": other}, rounds=1)


def test_experts_are_computed_as_asked():
    world = kernels.make_world("experts", SHAPE)
    for name in ("eager", "batched_mm", "grouped_mm"):
        kernels.use_experts(name)(world.model)
        assert world.model.config.text_config._experts_implementation == name


def test_attention_gives_every_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(attention, "SHORT_SHAPES", ((9, 5, 3), (4, 7, 2)))
    rows = rows_of(attention, monkeypatch, tmp_path)
    assert [(row["prompt"], row["kernel"]) for row in rows] == [(p, k) for p in (9, 4) for k in attention.CPU_KERNELS]
    assert all(row["milliseconds"] > 0 for row in rows)


def test_another_attention_is_refused(monkeypatch):
    whole_square = attention.whole_square
    monkeypatch.setattr(attention, "whole_square", lambda *where: whole_square(*where).T)
    with pytest.raises(RuntimeError, match="masked computes something else"):
        attention.measure((9, 5, 3), rounds=1)
