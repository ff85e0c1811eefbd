"""Liger's kernels in the language model: Triton does not run here, so functions of their signature and formula do."""

import copy
import sys
from types import ModuleType

import pytest
import torch
from families import make_world
from tiny_models import groups, mixture, processor_for_questions
from torch.nn.functional import silu

from sail_rl.batch import make_batch
from sail_rl.command_line import BadInput
from sail_rl.config_data import ModelSection
from sail_rl.model.cpu_passes import use_all_passes
from sail_rl.model.liger import ROTARY, require_liger, use_liger
from sail_rl.model.load import load_model
from sail_rl.policy import token_terms

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def calls(monkeypatch):
    """Counts of each function; after the test the rotary embedding is transformers' own again."""
    module, counts = ModuleType("liger_kernel.transformers.functional"), {"norm": 0, "silu": 0, "rotary": 0}

    def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        counts["norm"] += 1
        wide = X.float()
        return (W + offset) * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(X.dtype)

    def liger_swiglu(a, b):
        counts["silu"] += 1
        return silu(a) * b

    def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        counts["rotary"] += 1
        turned = [torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1) for x in (q, k)]
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return tuple(x * cos + y * sin for x, y in zip((q, k), turned, strict=True))

    vars(module).update(liger_rms_norm=liger_rms_norm, liger_swiglu=liger_swiglu, liger_rope=liger_rope)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("qwen3", "qwen3_moe", "qwen3_vl", "qwen2_5_vl"):
        file = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=[ROTARY])
        monkeypatch.setattr(file, ROTARY, getattr(file, ROTARY))
    return counts


def terms_and_gradients(model, batch):
    model.zero_grad()
    terms = token_terms(model, batch)
    (terms.log_probs_BT * batch.mask_BC).sum().backward()
    return terms.log_probs_BT.detach(), {n: w.grad for n, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("family", ["tiny", "tiny_qwen3_vl", "tiny_internvl", "qwen2_5_vl", "mixture"])
def test_log_probs_and_gradients_stay(calls, family):
    """Each norm and gated layer of tower and language model once; a mixture's experts keep their own kernel."""
    if family == "mixture":
        processor = processor_for_questions()
        model, batch = mixture(processor), make_batch(groups(processor))
    else:
        world = make_world(family)
        model, batch = world.model, make_batch(world.groups(world.generate(world.prompts)))
    use_all_passes(model)  # as transformers computes, in the order that the functions above have
    expected, expected_gradients = terms_and_gradients(model, batch)
    changed = copy.deepcopy(model)
    use_liger(changed)
    found, gradients = terms_and_gradients(changed, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    gated = sum(name.endswith("gate_proj") for name, _ in model.named_modules())
    layers = len(changed.base_model.language_model.layers)
    assert calls == {"norm": norms, "silu": gated, "rotary": layers}


def test_it_is_refused_where_it_cannot_run(monkeypatch, tmp_path):
    section = ModelSection(random_init="tiny", use_liger_kernel=True)
    with pytest.raises(BadInput, match=r"model\.use_liger_kernel: liger-kernel is not installed"):
        load_model(section, seed=0)
    monkeypatch.setattr("sail_rl.model.liger.find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match=r"model\.use_liger_kernel: its kernels run on a GPU alone"):
        require_liger()
