"""One of two processes in test_faults_numbers.py: does an update that is spoilt on the second leave both as they were,
and do they go on where the second has nothing to train?

python tests/fault_process.py OUTPUT_DIR [OVERRIDE …], by a launcher
"""

import math
import sys
from dataclasses import replace

import torch

from sail_rl.batch import Group
from sail_rl.before_update import MiniBatch
from sail_rl.checkpoint import full_parameters
from sail_rl.command_line import load_recipe
from sail_rl.config import GrpoRecipe, SftRecipe
from sail_rl.data.packing import idle_group, make_batches
from sail_rl.launch import start_run
from sail_rl.model.load import load_model
from sail_rl.optimizer import make_optimizer, set_learning_rate
from sail_rl.policy import Policy
from sail_rl.sharding import prepare
from sail_rl.update import update_policy
from sail_rl.update_sft import update_supervised


def main(output: str, *changes: str) -> None:
    """A good update, one that is spoilt, and a good one."""
    overrides = [f"output_dir={output}", "optim.warmup_steps=0", "optim.weight_decay=0.1", *changes]
    recipe = load_recipe(SftRecipe, "recipes/quickstart_sft.yaml", overrides)
    run = start_run(recipe)
    model, processor = load_model(recipe.model, seed=0)
    wrapped, optimizer, _ = prepare(run, Policy(model), make_optimizer(model, recipe.optim))
    set_learning_rate(optimizer, recipe.optim, 1, 9)
    idle = idle_group(processor, with_picture=True)
    groups = [Group(idle.prompt, [[5, 6 + run.shard.rank, 7 + n]], kind="cot") for n in range(2)]
    batches = make_batches(groups, 1, idle, run.highest)
    assert len(batches) == 2
    spoilt, states = [spoil(batches[0]) if run.shard.rank else batches[0], batches[1]], []
    for one in (batches, spoilt, batches):
        figures = update_supervised(run, wrapped, optimizer, one)
        states.append({name: tensor.clone() for name, tensor in full_parameters(model)})
        print(figures["updates/skipped"], figures["grad_norm"], file=sys.stderr, flush=True)
        assert bool(figures["updates/skipped"]) == (one is spoilt)
        assert math.isfinite(figures["grad_norm"]) == (one is not spoilt)
    first, second, third = states
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, third[name]) for name, tensor in first.items())
    assert all(tensor.isfinite().all() for tensor in third.values())
    print("both have left the update out", flush=True)
    # Nothing to train on the second process: it passes idle rows through the model, and waits for nobody.
    own = make_batches([] if run.shard.rank else groups, 1, idle, run.highest)
    update_supervised(run, wrapped, optimizer, own)
    grpo = load_recipe(GrpoRecipe, "recipes/quickstart.yaml", [f"output_dir={output}"])
    compared = [replace(group, advantages=[1.0 - n]) for n, group in enumerate(groups)]
    own = make_batches([] if run.shard.rank else compared, 1, idle, run.highest)
    figures = update_policy(replace(run, recipe=grpo), wrapped, None, optimizer, [MiniBatch(own, 6.0)], ())
    assert figures["grad_norm"] > 0
    print("both have updated", flush=True)


def spoil(batch):
    """The same with a pixel that is not a number."""
    pictures = {"pixel_values": batch.model_inputs["pixel_values"] * math.nan}
    return replace(batch, model_inputs=dict(batch.model_inputs) | pictures)


if __name__ == "__main__":
    main(*sys.argv[1:])
