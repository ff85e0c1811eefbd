"""Reading the routers of a mixture of experts while the model runs, whatever its wrapper returns.

Works with gradient checkpointing of the kind that we use (not reentrant): the logits that a hook sees in the forward
pass belong to the graph, and the pass that is run again for the gradient finds no hook any more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils.output_capturing import OutputRecorder


def find_routers(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """Routers in the order of their layers, each with the place of the logits in its output; none in a dense model.

    transformers notes at each class of model where router logits are to be found.
    """
    notes = [getattr(module, "_can_record_outputs", None) or {} for module in model.modules()]
    found = [note["router_logits"] for note in notes if isinstance(note.get("router_logits"), OutputRecorder)]
    # A router that is a plain linear layer could not be told from the others.
    places = {recorder.target_class: recorder.index for recorder in found if recorder.target_class is not nn.Linear}
    return [(module, places[type(module)]) for module in model.modules() if type(module) in places] if places else []


@contextmanager
def recorded_routers(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects router logits [N tokens, E experts], a tensor for each layer, of the forward pass within the block."""
    logits: list[torch.Tensor] = []
    hooks = [router.register_forward_hook(partial(keep, logits, place)) for router, place in find_routers(model)]
    yield logits
    for hook in hooks:
        hook.remove()


def keep(logits: list[torch.Tensor], place: int, _router: nn.Module, _inputs: Any, outputs: Any) -> None:
    """The hook: note the logits among a router's outputs."""
    logits.append(outputs[place])


def experts_per_token(model: nn.Module) -> int:
    """How many experts read each token."""
    return model.config.get_text_config().num_experts_per_tok  # type: ignore[union-attr,operator]
