"""Updates that are left out, since a number in them is not finite; a run that makes no others stops.

Weights and optimizer are then bit by bit as before, on all processes: they see the same norm of the gradient.
Suffixes: _B completions, _C tokens of a completion.
"""

import sys
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from sail_rl.checkpoint import Progress
from sail_rl.checkpoint_folder import list_checkpoints
from sail_rl.command_line import BadInput
from sail_rl.launch import Run

STEPS_OF_PATIENCE = 3
WHY = "updates/why"


def is_finite(tensor: torch.Tensor | None) -> bool:
    """Whether all of a tensor is; also where there is none."""
    return tensor is None or bool(tensor.detach().isfinite().all())


def reason(run: Run, tensors: Iterable[Mapping[str, torch.Tensor | None]], loss: float, norm: float) -> str:
    """What was not finite, of all processes; called by each of them. `tensors` are those of the micro-batches, by name,
    in the order in which one spoils the next."""
    named = [(name, is_finite(tensor)) for batch in tensors for name, tensor in batch.items()]
    named += [("the loss", is_finite(torch.tensor(loss)))]
    first = next((name for name, finite in named if not finite), None)
    found = run.shard.gather([first])
    if not any(found):
        return f"not finite: the gradient alone (its norm is {norm})"
    places = [f" of process {rank}" if len(found) > 1 else "" for rank in range(len(found))]
    told = [f"{name}{place}" for name, place in zip(found, places, strict=True) if name]
    return f"not finite: {', '.join(told)} (the gradient's norm is {norm})"


def skipped_figures(reasons: Sequence[str]) -> dict[str, Any]:
    """How many updates of a step were left out, and why, if any was."""
    return {"updates/skipped": len(reasons)} | ({WHY: reasons} if reasons else {})


def note_skipped(run: Run, step: int, progress: Progress, figures: MutableMapping[str, Any]) -> int:
    """Steps in a row of which an update was left out, this one among them. Its reasons are told, and are no figures."""
    reasons = figures.pop(WHY, [])
    if not reasons:
        return 0
    in_a_row, why = progress.steps_skipped + 1, "; ".join(dict.fromkeys(reasons))
    if run.is_main:
        what = "the update was" if len(reasons) == 1 else f"{len(reasons)} updates were"
        print(
            f"warning: step {step}: {what} left out, weights and optimizer are as before: {why}",
            file=sys.stderr,
            flush=True,
        )
    if in_a_row == STEPS_OF_PATIENCE:
        newest = next(reversed(list_checkpoints(run.folder / "checkpoints")), None)
        raise BadInput(
            f"updates had to be left out in {in_a_row} steps in a row, up to step {step}: {why}. These steps are not "
            f"saved; {f'the newest checkpoint is {newest}' if newest else 'there is no checkpoint'}. Look at the rows "
            "of these steps, and lower optim.learning_rate in a run that starts from an earlier checkpoint"
        )
    return in_a_row
