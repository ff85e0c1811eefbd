"""What theory says of one policy update: the FLOPs of a forward pass, from the model's sizes and the batch's shape.

Backward costs twice the forward for every layout, so it cancels in ratios. Attention is counted as causal, although a
padded batch computes the masked half as well: the ratios are those of the work that is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sail_rl.flops import Shape, model_cost
from sail_rl.model.configuration_sail_vl2 import SailVL2Config
from sail_rl.model.modeling_sail_vl2 import SailVL2ForConditionalGeneration

TYPICAL_PROMPT = 1024  # tokens, at which tower and language model are compared


@dataclass(frozen=True)
class Costs:
    """Forward FLOPs of the parts of a model."""

    tile: float
    """Tower and adapter, for one tile."""
    token: float
    """The language model's matrices, for one token."""
    pair: float
    """Its attention, for one query with one key."""
    scored: float
    """The head, for one position."""


@dataclass(frozen=True)
class Work:
    """How much of each an update does."""

    tiles: int
    tokens: int
    pairs: int
    scored: int

    def flops(self, costs: Costs) -> float:
        """Forward FLOPs."""
        tower = self.tiles * costs.tile
        return tower + self.tokens * costs.token + self.pairs * costs.pair + self.scored * costs.scored


def costs_of(config: SailVL2Config) -> Costs:
    """Costs of a SAIL-VL2, by the formulas of sail_rl/flops.py."""
    with torch.device("meta"):
        cost = model_cost(SailVL2ForConditionalGeneration(config))
    one_tile = Shape((round(config.vision_config.image_size / cost.patch_size) ** 2,), config.image_seq_length, 0, ())
    _, _, _, llm, head = cost.parts
    return Costs(cost.forward_of(one_tile), llm.forward(1, 0), llm.attention, head.forward(1, 0))


def tower_share(config: SailVL2Config) -> float:
    """FLOPs of the tower by those of the language model, per token of a picture in a typical prompt."""
    costs = costs_of(config)
    return costs.tile / config.image_seq_length / (costs.token + costs.pair * TYPICAL_PROMPT / 2)


def work_of(layout: str, prompt: int, lengths: Sequence[int], tiles: int) -> Work:
    """What one group's update passes through the model: `trl`, `padded`, `packed` or `shared`."""
    size, longest, total = len(lengths), max(lengths), sum(lengths)
    width = prompt + longest
    if layout == "shared":
        pairs = causal(prompt) + sum(prompt * length + causal(length) for length in lengths)
        return Work(tiles, prompt + total, pairs, total)
    if layout == "packed":
        return Work(size * tiles, size * prompt + total, sum(causal(prompt + length) for length in lengths), total)
    # TRL's default head scores every position on a CPU.
    scored = width - 1 if layout == "trl" else longest + 1
    return Work(size * tiles, size * width, size * causal(width), size * scored)


def causal(tokens: int) -> int:
    """Query-key pairs of a causal sequence."""
    return tokens * (tokens + 1) // 2
