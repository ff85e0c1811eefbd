"""An update that memory does not suffice for is done once more, in micro-batches of half the size."""

import gc
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from sail_rl.command_line import BadInput
from sail_rl.launch import Run
from sail_rl.sharding import sharding_of

Batches = TypeVar("Batches")
ADVICE = "lower update.token_budget, which a run may change when it goes on"


def update_within_memory(
    run: Run, optimizer: Any, cut: Callable[[int], Batches], update: Callable[[Batches], dict[str, Any]]
) -> tuple[Batches, dict[str, Any]]:
    """Cut the step's groups by the recipe's budget of tokens and update; what was trained, and its figures.

    Gradients of what was computed before memory ran out are dropped. An update that has moved the weights already
    cannot be done again, and of several processes one cannot begin again alone: these runs end, unsaved.
    """
    budget, begun_at = run.recipe.update.token_budget, optimizer_steps(optimizer)
    for tokens in (budget, budget // 2):
        batches = cut(max(1, tokens))
        try:
            return batches, update(batches) | {"updates/split": int(tokens < budget)}
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if run.shard.world_size > 1 or sharding_of(run.accelerator) or optimizer_steps(optimizer) != begun_at:
                error.add_note(f"memory did not suffice in an update: {ADVICE}")
                raise
            what = str(error).strip().splitlines()[0]
        # Here, since the exception holds on to all that the passes had computed.
        del batches
        optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        print(f"warning: memory did not suffice for {tokens} tokens in an update: {what}", file=sys.stderr, flush=True)
    raise BadInput(f"update.token_budget = {budget}: memory did not suffice, nor did it for half of that; {ADVICE}")


def is_out_of_memory(error: BaseException) -> bool:
    """On a GPU, or on a CPU, where torch has no class for it."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def optimizer_steps(optimizer: Any) -> float:
    """How many steps an optimizer has made, by the first weight: on a GPU each number is waited for."""
    return next((float(state["step"]) for state in optimizer.state.values() if "step" in state), 0.0)
