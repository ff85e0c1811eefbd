"""The figures of parity, and what the engine is told when vLLM is not there."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import sail_rl.engines
from rollouts import Prompt
from sail_rl.batch import Group, make_batch
from sail_rl.command_line import BadInput
from sail_rl.data.stream import Shard
from sail_rl.engines import make_engine
from sail_rl.losses import importance_weights
from sail_rl.parity import first_difference, parity_figures
from sail_rl.sharding import Whole
from sail_rl.update import importance_of

RUN = SimpleNamespace(shard=Shard())


def batch_of(*log_probs, trained=True):
    completions = [[5] * len(row) for row in log_probs]
    return make_batch([Group(Prompt("", [1, 2]), completions, log_probs=list(log_probs), trained=trained)])


def test_figures_of_known_gaps():
    """300 tokens in two batches: padding and idle completions do not count."""
    batches = [batch_of([-1.0] * 200, [-1.0] * 99), batch_of([-1.0]), batch_of([-1.0], trained=False)]
    trainer = [torch.full((2, 200), -1.1), torch.tensor([[-0.5]]), torch.tensor([[9.0]])]
    figures = parity_figures(RUN, trainer, batches)
    assert figures["parity/mean"] == pytest.approx((299 * 0.1 + 0.5) / 300, rel=1e-5)
    assert figures["parity/p99"] == pytest.approx(0.1, rel=1e-5)
    assert figures["parity/max"] == pytest.approx(0.5)
    assert figures["parity/ratio_min"] == pytest.approx(math.exp(-0.1))
    assert figures["parity/ratio_max"] == pytest.approx(math.exp(0.5))
    assert figures["parity/ratio_std"] > 0


def test_no_trained_token_has_no_figures():
    assert set(parity_figures(RUN, [torch.zeros(1, 1)], [batch_of([0.0], trained=False)]).values()) == {None}
    without = make_batch([Group(Prompt("", [1, 2]), [[5]])])
    assert set(parity_figures(RUN, [torch.zeros(1, 1)], [without]).values()) == {None}


@pytest.mark.parametrize(
    ("engine", "wanted", "corrects"),
    [("hf", None, False), ("vllm_colocate", None, True), ("hf", True, True), ("vllm_colocate", False, False)],
)
def test_who_is_corrected(engine, wanted, corrects):
    keys = {"mode": "token_truncate", "clip_max": 3.0, "clip_min": None}
    grpo = SimpleNamespace(
        vllm_importance_sampling_correction=wanted,
        **{f"vllm_importance_sampling_{name}": value for name, value in keys.items()},
    )
    recipe = SimpleNamespace(rollout=SimpleNamespace(engine=engine), grpo=grpo)
    batch, old_BC = batch_of([-1.0, -2.0]), torch.tensor([[-1.5, -1.0]])
    expected = importance_weights(old_BC, batch.engine_log_probs_BC, batch.mask_BC, **keys)
    assert torch.equal(
        torch.as_tensor(importance_of(recipe, old_BC, batch)), expected if corrects else torch.tensor(1.0)
    )


def test_where_rows_of_tokens_part():
    assert first_difference([1, 2, 9, 9], [1, 2, 3]) == (
        "4 reached the engine and the trainer has 3; from token 2: [9, 9], not [3]"
    )
    assert "from token 2: [3], not []" in first_difference([1, 2, 3], [1, 2])


@pytest.mark.parametrize("engine", ["vllm_colocate", "vllm_server"])
def test_vllm_is_missing(engine, monkeypatch):
    monkeypatch.setattr(sail_rl.engines.importlib.util, "find_spec", lambda name: None)
    rollout = SimpleNamespace(engine=engine, server=SimpleNamespace(urls=[]))
    run = SimpleNamespace(recipe=SimpleNamespace(rollout=rollout))
    with pytest.raises(BadInput, match=rf"rollout\.engine = {engine}: vllm is not installed; install it with"):
        make_engine(run, Whole(None, nullcontext), None, [])


def test_processes_on_several_machines_name_their_servers(monkeypatch):
    monkeypatch.setattr(sail_rl.engines.importlib.util, "find_spec", lambda name: object())  # as if vllm were there
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    rollout = SimpleNamespace(engine="vllm_server", server=SimpleNamespace(urls=[]))
    run = SimpleNamespace(recipe=SimpleNamespace(rollout=rollout), shard=Shard(0, 4))
    with pytest.raises(BadInput, match=r"rollout\.server\.urls: the trainer has processes on several machines"):
        make_engine(run, Whole(None, nullcontext), None, [])
