"""What theory says of one policy update: the FLOPs of a forward pass, from the model's sizes and the batch's shape.

Backward costs twice the forward for every layout, so it cancels in ratios. Attention is counted as causal, although a
padded batch computes the masked half as well: the ratios are those of the work that is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sail_rl.model.configuration_sail_vl2 import SailVL2Config

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
    """Costs of a SAIL-VL2 with a dense Qwen3."""
    text = config.text_config
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    layer = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    return Costs(
        tile=tile_cost(config),
        token=2 * text.num_hidden_layers * layer,
        pair=4 * text.num_hidden_layers * queries,
        scored=2 * text.hidden_size * text.vocab_size,
    )


def tile_cost(config: SailVL2Config) -> float:
    """Forward FLOPs of the tower and the adapter on one tile."""
    vision, width = config.vision_config, config.text_config.hidden_size
    patches = (vision.image_size // vision.patch_size) ** 2
    hidden, fold = vision.hidden_size, round(1 / config.downsample_ratio) ** 2
    layer = 2 * hidden * (4 * hidden + 3 * vision.intermediate_size) + 4 * patches * hidden
    embedding = 2 * vision.num_channels * vision.patch_size**2 * hidden
    adapter = 2 * (fold * hidden * width + width * width)
    return patches * (vision.num_hidden_layers * layer + embedding) + patches // fold * adapter


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
