"""A frozen vision tower sees the pictures of a micro-batch once, however many passes are made over it.

Such are the passes of `grpo.num_iterations` and those of the reference model, whose tower is the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

TOWERS = ("vision_tower", "visual")  # by the names that transformers gives them


def vision_tower(model: nn.Module) -> nn.Module | None:
    """The part that reads pixels; None in a model of text alone."""
    return next((part for name, part in model.named_modules() if name.split(".")[-1] in TOWERS), None)


def has_frozen_tower(model: nn.Module) -> bool:
    """Whether nothing in the tower is trained: neither its weights nor adapters on them."""
    tower = vision_tower(model)
    return tower is not None and not any(weight.requires_grad for weight in tower.parameters())


@contextmanager
def features_kept(model: nn.Module, features: list[Any] | None) -> Iterator[None]:
    """Within it, one forward pass of `model`: what its tower gives is put into `features`, or taken from there if an
    earlier pass over the same pictures has left it. None: the tower computes, as always."""
    if features is None or (tower := vision_tower(model)) is None:
        yield
        return
    compute, known, is_its_own = tower.forward, iter(tuple(features)), "forward" in vars(tower)

    @torch.no_grad()
    def look_up(*arguments: Any, **named: Any) -> Any:
        found = next(known, None)
        if found is None:
            found = compute(*arguments, **named)
            features.append(found)
        return found

    tower.forward = look_up
    try:
        yield
    finally:
        del tower.forward  # what its class has comes to light again
        if is_its_own:
            tower.forward = compute
