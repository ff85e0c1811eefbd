"""Out of memory in a micro-batch: the update is done again in halves, or ends with the key to change."""

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from families import make_world

from sail_rl.batch import Group
from sail_rl.before_update import MiniBatch
from sail_rl.command_line import BadInput
from sail_rl.config import GrpoSection, OptimSection, RolloutSection, UpdateSection
from sail_rl.data.packing import make_batches
from sail_rl.data.stream import Shard
from sail_rl.launch import Run
from sail_rl.memory import update_within_memory
from sail_rl.optimizer import make_optimizer, set_learning_rate
from sail_rl.policy import Policy
from sail_rl.update import update_policy

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET = 200
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")


@pytest.fixture(scope="module")
def world():
    """A tiny model, and groups of which several fit the budget."""
    made = make_world("sail_vl2")
    groups = [
        Group(prompt, [[20 + n, 30, 40], [50 + n]], [1.0, -0.5]) for n, prompt in enumerate(made.prompts) for _ in "ab"
    ]
    return SimpleNamespace(model=made.model, groups=groups)


def updated(world, budget, most=None, error=GPU, iterations=1, processes=1, at_pass=0):
    """(figures, weights) of an update, where passes over more tokens than `most` fail, from one of them on."""
    policy, optim = Policy(copy.deepcopy(world.model)), OptimSection(learning_rate=1e-3, warmup_steps=0)
    grpo, update = GrpoSection(num_iterations=iterations), UpdateSection(token_budget=budget)
    recipe = SimpleNamespace(grpo=grpo, optim=optim, rollout=RolloutSection(), update=update)
    run = Run(recipe, None, Accelerator(cpu=True), Shard())
    optimizer, passes = make_optimizer(policy.model, optim), []
    set_learning_rate(optimizer, optim, 1, 2)

    def fail(module, given):
        passes.append(given[0].input_ids_RT.numel())
        if most is not None and passes[-1] > most and len(passes) > at_pass:
            raise error

    policy.register_forward_pre_hook(fail)
    seen = replace(run, shard=Shard(0, processes))

    def cut(tokens):
        return [MiniBatch(make_batches(world.groups, tokens, world.groups[0], form="packed"), 9.0)]

    _, figures = update_within_memory(
        seen, optimizer, cut, partial(update_policy, run, policy, None, optimizer, suppressed=())
    )
    return figures, dict(policy.named_parameters()), passes


@pytest.mark.parametrize("error", [GPU, CPU], ids=["GPU", "CPU"])
@pytest.mark.fault(
    fault="memory: too little in a micro-batch",
    injected="into forward passes over more than half of the token budget",
    expected="the update is done once more with half of the budget: bit by bit what that budget gives; counted",
)
def test_it_is_done_again_in_halves(world, error, capsys):
    expected, weights, halves = updated(world, BUDGET // 2)
    assert max(updated(world, BUDGET)[2]) > BUDGET // 2 >= max(halves)
    figures, found, _ = updated(world, BUDGET, most=BUDGET // 2, error=error, at_pass=1)
    assert (expected["updates/split"], figures["updates/split"]) == (0, 1)
    assert {**figures, "updates/split": 0} == expected
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert f"memory did not suffice for {BUDGET} tokens in an update" in capsys.readouterr().err


@pytest.mark.fault(
    fault="memory: too little in halves too",
    injected="into every forward pass",
    expected="the run stops with code 2 and names update.token_budget",
)
def test_the_key_is_named_where_halves_do_not_fit(world):
    with pytest.raises(BadInput, match=f"update.token_budget = {BUDGET}: memory did not suffice"):
        updated(world, BUDGET, most=0)


@pytest.mark.parametrize("case", [{"iterations": 2}, {"processes": 2}], ids=["moved", "several"])
@pytest.mark.fault(
    fault="memory: too little where an update cannot be done again",
    injected="after a first optimizer step of the step; on one of several processes",
    expected="the run ends at once, unsaved, and names update.token_budget",
)
def test_it_ends_where_it_cannot_begin_again(world, case):
    first = len(updated(world, BUDGET)[2])  # passes until the first optimizer step
    with pytest.raises(torch.OutOfMemoryError) as end:
        updated(world, BUDGET, most=0, at_pass=first if "iterations" in case else 0, **case)
    assert "lower update.token_budget" in end.value.__notes__[0]


def test_other_errors_are_not_taken_for_it(world):
    with pytest.raises(RuntimeError, match="shapes") as end:
        updated(world, BUDGET, most=0, error=RuntimeError("shapes do not match"))
    assert not hasattr(end.value, "__notes__")
