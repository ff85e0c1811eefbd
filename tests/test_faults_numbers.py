"""Numbers that are not finite: what they spoil is left out and counted, and a run that makes nothing else stops."""

import copy
import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import BIN, ROOT, command, torchrun
from families import make_world

from rewards.call import RewardError, as_verdict
from rewards.score import Scores
from rewards.verdict import Verdict
from rollouts import Rollout
from sail_rl.batch import Group, make_batch
from sail_rl.before_update import MiniBatch
from sail_rl.checkpoint_folder import list_checkpoints
from sail_rl.command_line import load_recipe
from sail_rl.compare import compare
from sail_rl.config import GrpoSection, OptimSection, RolloutSection, SftRecipe
from sail_rl.data.stream import Shard
from sail_rl.launch import Run, run_recipe
from sail_rl.optimizer import make_optimizer, set_learning_rate
from sail_rl.policy import Policy
from sail_rl.scoring import gather_outcomes, group_figures
from sail_rl.train_sft import train
from sail_rl.update import update_policy

pytestmark = pytest.mark.usefixtures("one_thread", "signals_as_before")
NAN, INF = math.nan, math.inf
ACCELERATE = (str(BIN / "accelerate"), "launch", "--num_processes", "2", "--main_process_port", "0", "--config_file")
LAUNCHERS = {"DDP": torchrun(2)} | {
    kind: (*ACCELERATE, str(ROOT / f"recipes/accelerate/{kind}.yaml")) for kind in ("fsdp2", "zero2", "zero3")
}
BFLOAT16 = ("model.dtype=bfloat16", "optim.learning_rate=0.01")  # weights as coarse do not see smaller steps


@pytest.fixture(scope="module")
def world():
    """A tiny model after a first update with two micro-batches, its optimizer and its batches."""
    made = make_world("sail_vl2")
    groups = [
        Group(prompt, [[20 + number, 30, 40], [50 + number]], [1.0, -0.5], [[-1.0] * 3, [-1.0]])
        for number, prompt in enumerate(made.prompts[:2])
    ]
    return SimpleNamespace(model=made.model, batches=[make_batch([group]) for group in groups])


def state_of(model, optimizer):
    """All that an update changes."""
    weights = [weight.detach().clone() for weight in model.parameters()]
    return weights + [value.clone() for one in optimizer.state.values() for value in one.values()]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def spoil_advantage(policy, reference, batch, hooks):
    return replace(batch, advantages_B=batch.advantages_B.index_fill(0, torch.tensor([1]), NAN))


def spoil_engine(policy, reference, batch, hooks):
    return replace(batch, engine_log_probs_BC=batch.engine_log_probs_BC * NAN)


def spoil_policy(policy, reference, batch, hooks):
    hooks.append(policy.register_forward_hook(partial(spoil_terms, value=NAN)))
    return batch


def spoil_reference(policy, reference, batch, hooks):
    hooks.append(reference.register_forward_hook(partial(spoil_terms, value=INF)))
    return batch


def spoil_terms(module, given, terms, value):
    return terms._replace(log_probs_BT=terms.log_probs_BT * value)


def spoil_gradient(policy, reference, batch, hooks):
    hooks.append(next(policy.parameters()).register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), INF)))
    return batch


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_advantage, "not finite: advantages"),
        (spoil_engine, "not finite: log-probabilities by the engine"),
        (spoil_policy, "not finite: log-probabilities by the policy"),
        (spoil_reference, "not finite: log-probabilities by the starting model"),
        (spoil_gradient, "not finite: the gradient alone"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.fault(
    fault="numbers: NaN or infinity in an advantage, a log-probability or a gradient",
    injected="into one micro-batch of an update",
    expected="the update is left out: weights and optimizer bit by bit as before; what was not finite is named",
)
def test_an_update_is_left_out(spoil, told, world):
    policy, reference = Policy(copy.deepcopy(world.model)), Policy(copy.deepcopy(world.model).eval())
    weights = {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate"}
    grpo = GrpoSection(beta=0.1, **weights)
    optim = OptimSection(learning_rate=1e-3, warmup_steps=0)
    run = Run(SimpleNamespace(grpo=grpo, optim=optim, rollout=RolloutSection()), None, Accelerator(cpu=True), Shard())
    optimizer = make_optimizer(policy.model, optim)
    set_learning_rate(optimizer, optim, 1, 2)
    update = partial(update_policy, run, policy, reference, optimizer, suppressed=())
    assert update([MiniBatch(world.batches, 4.0)])["updates/skipped"] == 0
    before, hooks = state_of(policy, optimizer), []
    batches = [world.batches[0], spoil(policy, reference, world.batches[1], hooks)]
    figures = update([MiniBatch(batches, 4.0)])
    assert [reason.split(" (")[0] for reason in figures["updates/why"]] == [told]
    assert same(before, state_of(policy, optimizer))
    for hook in hooks:
        hook.remove()
    figures = update([MiniBatch(world.batches, 4.0)])
    assert figures["updates/skipped"] == 0
    assert math.isfinite(figures["loss"])
    assert not same(before, state_of(policy, optimizer))


def outcomes_of(rewards, log_probs):
    rollouts = [Rollout([1, 2], values, "", "stop", 0) for values in log_probs]
    verdicts = {"mine": [Verdict(0.0)] * len(rewards)}
    failed = {"mine": [False] * len(rewards)}
    return gather_outcomes(Shard(), rollouts, Scores(rewards, {"mine": rewards}, failed, [], verdicts))


@pytest.mark.parametrize(
    ("rewards", "log_probs", "scored", "counted"),
    [
        ([0.0, 1.0, 0.5, 0.0], [[-1.0, -1.0]] * 4, [1, 1, 1, 1], 0),
        ([0.0, NAN, 0.5, 0.0], [[-1.0, -1.0]] * 4, [1, 0, 1, 1], 1),
        ([0.0, 1e39, 0.5, 0.0], [[-1.0, -1.0]] * 4, [1, 0, 1, 1], 1),  # more than float32 holds
        ([0.0, 1.0, 0.5, 0.0], [[-1.0, -1.0], [-1.0, NAN], [-INF, 0.0], [-1.0, 0.0]], [1, 0, 0, 1], 2),
        ([0.0, None, 0.5, 0.0], [[-1.0, -1.0]] * 4, [1, 0, 1, 1], 0),  # a reward that does not apply is no fault
        ([3e38, 3e38, 3e38, 0.0], [[-1.0, -1.0]] * 4, [0, 0, 0, 0], 4),  # a mean that overflows: the advantages
    ],
)
@pytest.mark.fault(
    fault="numbers: NaN or infinity in one reward, advantage or log-probability by the engine",
    injected="into a completion of a group",
    expected="that completion is masked and counted; the others are compared without it",
)
def test_a_completion_is_masked(rewards, log_probs, scored, counted):
    grpo = GrpoSection(scale_rewards="none")
    recipe = SimpleNamespace(grpo=grpo, rollout=RolloutSection(num_generations=4))
    outcomes = outcomes_of(rewards, log_probs)
    advantages = compare(recipe, [SimpleNamespace(weight=1.0, name="mine")], outcomes)
    assert advantages.scored_N.tolist() == list(map(bool, scored))
    assert advantages.values_N.isfinite().all()
    kept = [reward for reward, one in zip(rewards, scored, strict=True) if one]
    for reward, one, value in zip(rewards, scored, advantages.values_N.tolist(), strict=True):
        assert value == pytest.approx(reward - sum(kept) / len(kept) if one else 0.0)
    assert group_figures(advantages, outcomes, {"seconds": 1.0}, False)["completion/not_finite"] == counted


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_verdict_is_a_finite_number_too(value):
    with pytest.raises(RewardError, match="a reward is a finite number or None"):
        as_verdict(Verdict(value), 3)


@pytest.mark.fault(
    fault="numbers: an infinite loss after good steps, once and for three steps",
    injected="into the loss of SFT steps 2 and 4 to 6",
    expected="step 2 is counted and passed; the run stops at step 6 with code 2; the newest checkpoint is step 3",
)
def test_three_steps_in_a_row_stop_the_run(tmp_path, monkeypatch, capsys):
    import sail_rl.update_sft

    steps, loss = iter(range(1, 9)), sail_rl.update_sft.supervised_loss
    monkeypatch.setattr(
        "sail_rl.update_sft.supervised_loss", lambda *terms: loss(*terms) * (INF if next(steps) in (2, 4, 5, 6) else 1)
    )
    overrides = [f"output_dir={tmp_path}", "data.eval=null", "sft.samples_per_step=2", "trainer.max_steps=8"]
    overrides += ["trainer.save_every=1", "trainer.save_total_limit=9", "trainer.eval_every=null"]
    recipe = load_recipe(SftRecipe, ROOT / "recipes/quickstart_sft.yaml", overrides)
    with pytest.raises(SystemExit, match="2"):
        run_recipe(train, recipe)
    told = capsys.readouterr().err
    assert "step 2: the update was left out, weights and optimizer are as before: not finite: the loss" in told
    assert "3 steps in a row, up to step 6" in told
    assert f"the newest checkpoint is {tmp_path / 'checkpoints/step_3'}" in told
    assert [folder.name for folder in list_checkpoints(tmp_path / "checkpoints")] == ["step_1", "step_3"]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["updates/skipped"] for record in records] == [0, 1, 0, 1, 1]
    assert [record["loss"] is None for record in records] == [False, True, False, True, True]


@pytest.mark.dist
@pytest.mark.parametrize("changes", [(), BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "DDP" else pytest.mark.slow) for kind in LAUNCHERS]
)
@pytest.mark.fault(
    fault="numbers: a NaN, and then nothing to train, on one of two processes, plain or sharded",
    injected="into a pixel of the second process's first micro-batch of two; groups for the first process alone",
    expected="both leave the update out, their weights bit by bit as before; both go on, and none waits",
)
def test_processes_agree(kind, changes, tmp_path):
    result = command("tests/fault_process.py", tmp_path / "run", *changes, launcher=LAUNCHERS[kind])
    assert result.returncode == 0, result.stderr[-4000:]
    for line in ("both have left the update out", "both have updated"):
        assert result.stdout.count(line) == 2
