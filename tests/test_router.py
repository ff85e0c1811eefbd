"""The load-balancing loss of a mixture of experts: transformers' value and gradient, padding, processes, trainers."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from balance_process import EXPERTS, LAYERS, PER_TOKEN, TOKENS, half_mask, part_of_a_process, random_logits
from conftest import SMALL_GRPO, command, forked
from PIL import Image
from tiny_models import completion_logits, dense, groups, mixed_batch, mixture, processor_for_questions
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from sail_rl.batch import make_batch
from sail_rl.before_update import MiniBatch
from sail_rl.checkpoint import save_model
from sail_rl.command_line import BadInput
from sail_rl.config import GrpoSection, RolloutSection, SftSection
from sail_rl.config_data import ModelSection
from sail_rl.data.packing import idle_group
from sail_rl.data.stream import Shard
from sail_rl.launch import Run
from sail_rl.losses import balance_loss
from sail_rl.model.load import load_model, prepare_for_training
from sail_rl.model.router import experts_per_token, find_routers, recorded_routers
from sail_rl.policy import Policy
from sail_rl.update import update_policy
from sail_rl.update_sft import update_supervised

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def processor():
    return processor_for_questions()


@pytest.mark.parametrize("mask_N", [torch.ones(TOKENS, dtype=torch.bool), half_mask()], ids=["all", "padding"])
def test_value_and_gradient_are_those_of_transformers(mask_N):
    ours, theirs = random_logits(), random_logits()
    loss, sums = balance_loss(ours, mask_N, PER_TOKEN, normaliser=float(mask_N.sum()))
    expected = load_balancing_loss_func(tuple(theirs), EXPERTS, PER_TOKEN, mask_N[None].long())
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
    assert loss > PER_TOKEN + 0.05  # uneven
    assert sums["balance"] == loss.item()
    for one, other in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-5)
        assert one[mask_N].abs().max() > 1e-4
        assert not one[~mask_N].any()


def test_what_is_masked_has_no_influence():
    plain, spoilt = random_logits(), random_logits()
    for logits_NE in spoilt:
        logits_NE.data[~half_mask()] = 50.0 * torch.randn(EXPERTS)
    values = [balance_loss(logits, half_mask(), PER_TOKEN, normaliser=9.0) for logits in (plain, spoilt)]
    assert values[0] == values[1]


def test_balanced_and_collapsed_routers():
    """Experts in turn give the number of experts per token; one pair of experts for all gives the number of experts."""
    turns_NE = torch.eye(EXPERTS)[torch.arange(TOKENS) % EXPERTS]
    even_NE = 60 * (turns_NE + turns_NE.roll(1, dims=1))
    even, sums = balance_loss([even_NE] * LAYERS, torch.ones(TOKENS), PER_TOKEN, normaliser=TOKENS)
    assert even.item() == pytest.approx(PER_TOKEN, rel=1e-5)
    assert sums["largest_share"] == pytest.approx(1 / EXPERTS)
    assert sums["expert_entropy"] == pytest.approx(math.log(EXPERTS))
    collapsed_NE = 60 * (torch.eye(EXPERTS)[0] + torch.eye(EXPERTS)[3]).expand(TOKENS, -1)
    collapsed, sums = balance_loss([collapsed_NE, even_NE], torch.ones(TOKENS), PER_TOKEN, normaliser=TOKENS)
    assert even < collapsed < EXPERTS
    assert sums["largest_share"] == pytest.approx(1 / PER_TOKEN)
    assert sums["expert_entropy"] == pytest.approx((math.log(PER_TOKEN) + math.log(EXPERTS)) / 2)
    alone, _ = balance_loss([collapsed_NE], torch.ones(TOKENS), PER_TOKEN, normaliser=TOKENS)
    assert alone.item() == pytest.approx(EXPERTS, rel=1e-5)


def test_routers_are_found_in_a_mixture_alone(processor):
    model = mixture(processor)
    assert [module for module, _ in find_routers(model)] == [
        layer.mlp.gate for layer in model.model.language_model.layers
    ]
    assert experts_per_token(model) == 2
    assert find_routers(dense(processor)) == []


def model_balance(model, batch):
    """Of a whole batch, by our functions."""
    with recorded_routers(model) as logits:
        completion_logits(model, batch)
    assert len(logits) == 3
    return balance_loss(logits, batch.readers_RT.flatten(), experts_per_token(model), float(batch.readers_RT.sum()))[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_through_the_model_it_equals_transformers(processor, checkpointing):
    """Our hooks on the whole model against the language model's own router logits, with its inputs given to it."""
    model, batch = mixture(processor), mixed_batch(processor)
    prepare_for_training(model, checkpointing)
    loss = model_balance(model, batch)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients["model.language_model.layers.2.mlp.gate.weight"].abs().max() > 1e-4
    assert gradients["model.vision_tower.embeddings.patch_embed.weight"].abs().max() > 1e-6
    assert all(not router._forward_hooks for router, _ in find_routers(model))

    fresh, seen = mixture(processor), {}
    fresh.model.language_model.register_forward_pre_hook(lambda _, __, given: seen.update(given), with_kwargs=True)
    completion_logits(fresh, batch)
    recorded = fresh.model.language_model(**seen, output_router_logits=True).router_logits
    expected = load_balancing_loss_func(recorded, 4, 2, batch.attention_mask_RT)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
    for name, parameter in fresh.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients.pop(name), parameter.grad, atol=1e-7, rtol=1e-4, msg=name)
    assert gradients == {}


@pytest.mark.dist
def test_two_processes_equal_one_with_all_tokens(tmp_path):
    mp.spawn(part_of_a_process, (tmp_path,), nprocs=2)
    (loss_0, sums_0, gradients_0), (loss_1, sums_1, gradients_1) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    logits = random_logits()
    loss, sums = balance_loss(logits, half_mask(), PER_TOKEN, normaliser=float(half_mask().sum()))
    torch.testing.assert_close(loss_0 + loss_1, loss.detach(), atol=0, rtol=1e-6)
    for name, value in sums.items():
        assert sums_0[name] + sums_1[name] == pytest.approx(value, rel=1e-6)
    for expected, first, second in zip(torch.autograd.grad(loss, logits), gradients_0, gradients_1, strict=True):
        torch.testing.assert_close(torch.cat([first, second]), expected, atol=1e-9, rtol=1e-6)
    # Each process on its own would have had another loss.
    alone, _ = balance_loss([one[:15] for one in logits], half_mask()[:15], PER_TOKEN, float(half_mask()[:15].sum()))
    assert abs(alone - loss) > 1e-2


def run_of(coefficient, **sections):
    """As much of a run as an update reads."""
    recipe = SimpleNamespace(model=SimpleNamespace(router_aux_loss_coef=coefficient), **sections)
    recipe.optim = SimpleNamespace(max_grad_norm=1e9)
    return Run(recipe, None, Accelerator(cpu=True), Shard())


def supervised_gradient(model, batches, coefficient):
    """(figures, gradients) of train_sft.py's update."""
    run = run_of(coefficient, sft=SftSection(), data=SimpleNamespace(thinking="think"))
    figures = update_supervised(run, Policy(model), torch.optim.SGD(model.parameters(), lr=0.0), batches)
    return figures, gradients_of(model)


def policy_gradient(model, batches, coefficient):
    """(figures, gradients) of train_grpo.py's update."""
    run = run_of(coefficient, grpo=GrpoSection(), rollout=RolloutSection())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    figures = update_policy(run, Policy(model), None, optimizer, [MiniBatch(batches, 9.0)], suppressed=())
    return figures, gradients_of(model)


def gradients_of(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("update", [supervised_gradient, policy_gradient])
def test_both_updates_add_it(processor, update):
    """Two micro-batches, one with an idle row: each counts by its tokens, and the idle row not at all."""
    ours, idle, coefficient = groups(processor), idle_group(processor, with_picture=True), 0.5
    batches = [make_batch([ours[0], idle]), make_batch(ours[1:])]
    without, plain = update(mixture(processor).train(), batches, 0.0)
    figures, gradients = update(mixture(processor).train(), batches, coefficient)
    assert figures == without | {"grad_norm": figures["grad_norm"]}

    model = mixture(processor)
    parts = [make_batch(ours[:1]), make_batch(ours[1:])]
    tokens = [int(part.readers_RT.sum()) for part in parts]
    loss = sum(model_balance(model, part) * count for part, count in zip(parts, tokens, strict=True)) / sum(tokens)
    loss.backward()
    assert figures["router/balance_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert 1 / 4 < figures["router/largest_share"] <= 1 / 2
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            added = gradients[name] - plain[name]
            torch.testing.assert_close(added, coefficient * parameter.grad, atol=2e-6, rtol=1e-3, msg=name)
    assert (gradients["lm_head.weight"] == plain["lm_head.weight"]).all()


def test_each_micro_batch_is_balanced_by_itself(processor):
    """The loss is no sum over tokens: it depends on the cut into micro-batches, and nothing else of an update does."""
    ours, idle = groups(processor), idle_group(processor, with_picture=True)
    whole, parts = [make_batch([*ours, idle])], [make_batch([ours[0], idle]), make_batch(ours[1:])]

    def norm(batches, coefficient):
        return policy_gradient(mixture(processor).train(), batches, coefficient)[0]["grad_norm"]

    assert norm(whole, 0.0) == pytest.approx(norm(parts, 0.0), rel=1e-5)
    assert norm(whole, 5.0) != pytest.approx(norm(parts, 5.0), rel=1e-3)


def test_a_dense_model_logs_nothing_of_routers(processor):
    figures, _ = supervised_gradient(dense(processor).train(), [mixed_batch(processor)], 0.0)
    assert [name for name in figures if name.startswith("router")] == []


def test_the_coefficient_needs_a_mixture(processor, tmp_path):
    for name, make in (("dense", dense), ("mixture", mixture)):
        save_model(tmp_path / name, make(processor), processor)
    load_model(ModelSection(path=str(tmp_path / "mixture"), router_aux_loss_coef=0.01), seed=0)
    with pytest.raises(BadInput, match=r"model\.router_aux_loss_coef.*has no mixture of experts"):
        load_model(ModelSection(path=str(tmp_path / "dense"), router_aux_loss_coef=0.01), seed=0)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("coefficient", "budget"), [(0.0, 100), (0.1, 16384)])
def test_grpo_on_two_processes_equals_one(processor, mixed_rows, tmp_path, coefficient, budget):
    """Cut into several micro-batches without the loss, and with it where each process has one."""
    save_model(tmp_path / "start", mixture(processor), processor)
    model = f"{{path: {tmp_path / 'start'}, router_aux_loss_coef: {coefficient}}}"
    common = ["sail_rl/train_grpo.py", "recipes/quickstart.yaml", *SMALL_GRPO, f"model={model}", "data.eval=null"]
    common += [f"rewards=[{{function: '{mixed_rows / 'mine.py'}:spread'}}]", f"data.train={mixed_rows / 'rows.jsonl'}"]
    common += ["data.shuffle=false", f"update.token_budget={budget}", "grpo.beta=0.1", "optim.warmup_steps=0"]
    found = []
    for processes, launcher in (("one", (sys.executable,)), ("two", forked(2))):
        result = command(*common, f"output_dir={tmp_path / processes}", launcher=launcher)
        assert result.returncode == 0, result.stderr
        lines = (tmp_path / processes / "metrics.jsonl").read_text().splitlines()
        found.append([[json.loads(line)[name] for name in ("loss", "grad_norm", "kl")] for line in lines])
    for one, two in zip(*found, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.dist
def test_the_command_on_two_processes_equals_one(processor, tmp_path):
    """With all samples in one micro-batch of each process; the second has text alone, and so an idle picture."""
    save_model(tmp_path / "start", mixture(processor), processor)
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    rows = [
        {"question": f"how many red cards? {i}", "answer": str(i), "reasoning": "four plus " * (1 + i)}
        | ({"images": ["red.png"]} if i % 4 < 2 else {})
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ["sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", "model.random_init=null", "data.eval=null"]
    common += [f"model.path={tmp_path / 'start'}", "model.router_aux_loss_coef=0.1", "data.reasoning=terse"]
    common += [f"data.train={tmp_path / 'rows.jsonl'}", "data.shuffle=false", "sft.samples_per_step=4"]
    common += ["trainer.max_steps=2"]
    found = []
    for processes, launcher in (("one", (sys.executable,)), ("two", forked(2))):
        result = command(*common, f"output_dir={tmp_path / processes}", launcher=launcher)
        assert result.returncode == 0, result.stderr
        found.append([json.loads(line) for line in (tmp_path / processes / "metrics.jsonl").read_text().splitlines()])
    names = ("loss", "grad_norm", "router/balance_loss", "router/largest_share")
    for one, two in zip(*found, strict=True):
        assert [one[name] for name in names] == pytest.approx([two[name] for name in names], rel=1e-5)
        assert 2 < one["router/balance_loss"] < 4
