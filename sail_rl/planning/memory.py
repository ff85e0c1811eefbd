"""What one GPU holds while it trains and while completions are written, in GiB, term by term.

Of a layer, what the backward pass needs is counted tensor by tensor (`layer_bytes`); of the rest, what is large. What
torch's allocator cannot use, CUDA's own memory and NCCL's buffers are not counted: USABLE leaves room for them.
"""

from dataclasses import dataclass
from typing import Literal

from sail_rl.planning.sizes import Layers, Sizes
from sail_rl.policy import LOGITS_AT_ONCE

USABLE = 0.92  # of a GPU's memory
LOGIT_BYTES = 22  # of each logit that is in the works: bfloat16, float32, its logarithm, and the entropy's three
DEEPSPEED_BUCKET = 5e8  # elements that are exchanged at once
ZERO3_LIVE = 1e9  # weights that may be whole at a time

Precision = Literal["float32", "autocast", "bfloat16"]


@dataclass(frozen=True)
class Sharding:
    """How processes share the model."""

    name: str
    file: str
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    deepspeed: bool = False
    offload: bool = False
    """The optimizer, and its copy of the weights, are in main memory."""


PLAIN = Sharding("plain", "ddp_8.yaml")
SHARDINGS = (
    PLAIN,
    Sharding("ZeRO-2", "zero2.yaml", gradients=True, optimizer=True, deepspeed=True),
    Sharding("FSDP2", "fsdp2.yaml", weights=True, gradients=True, optimizer=True),
    Sharding("ZeRO-3", "zero3.yaml", weights=True, gradients=True, optimizer=True, deepspeed=True),
    Sharding(
        "ZeRO-3, offload",
        "zero3_offload.yaml",
        weights=True,
        gradients=True,
        optimizer=True,
        deepspeed=True,
        offload=True,
    ),
)


@dataclass(frozen=True)
class Load:
    """What a micro-batch holds, on one GPU."""

    tokens: int
    patches: int
    picture_tokens: int
    scored: int
    """Tokens whose probabilities are computed."""
    alone: bool = False
    """It is an update's only one, so that no gradients wait while it is computed."""


@dataclass(frozen=True)
class Settings:
    """What the recipe says that matters here."""

    precision: Precision
    weight_bytes: int
    trained_bytes: int
    """Of a trained weight: adapters are in float32."""
    recompute: bool
    """Gradient checkpointing."""
    reference: bool = False
    """The starting model is kept beside the trained one."""
    device: str = "cuda"


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    exchange: float
    """Buckets of gradients, weights that are whole for a while, copies that autocast makes."""
    activations: float
    logits: float
    reference: float
    load: Load

    @property
    def static(self) -> float:
        """Held in every phase, gradients among it: they are freed when the next update begins."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def update(self) -> float:
        """The highest point of an update: at the end of a forward pass, or of the backward pass."""
        waiting = 0 if self.load.alone else self.gradients
        forward = self.static - self.gradients + waiting + self.exchange + self.activations + self.logits
        return max(forward, self.static)


def memory_of(sizes: Sizes, settings: Settings, load: Load, sharding: Sharding = PLAIN, processes: int = 1) -> Memory:
    """Every term."""
    whole, trained, share = sizes.weights, sizes.all_trained, 1 / processes
    weights = whole * settings.weight_bytes * (share if sharding.weights else 1)
    gradients = trained * settings.trained_bytes * (share if sharding.gradients else 1)
    adamw = 2 * trained * settings.trained_bytes * (share if sharding.optimizer else 1)
    # DeepSpeed's own copy in float32, which ZeRO-3 makes of other weights alone.
    copied = sharding.deepspeed and not (sharding.weights and settings.trained_bytes == 4)
    master = 4 * trained * share if copied else 0
    if sharding.offload:
        adamw = master = 0
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=adamw + master,
        exchange=exchange(sizes, settings, sharding, processes),
        activations=activations(sizes, settings, load),
        logits=logit_bytes(sizes, settings, load),
        reference=whole * settings.weight_bytes if settings.reference else 0,
        load=load,
    )


def exchange(sizes: Sizes, settings: Settings, sharding: Sharding, processes: int) -> float:
    """What is there beside weights, gradients and optimizer, to move or to multiply them."""
    # Autocast keeps its copies for the backward pass, but where that computes them again, layer by layer.
    copies = 2 * sizes.matrices if settings.precision == "autocast" else 0
    if processes == 1:
        return copies
    if sharding.deepspeed:
        live = ZERO3_LIVE * settings.weight_bytes if sharding.weights else 0
        return copies + DEEPSPEED_BUCKET * settings.trained_bytes + min(live, sizes.weights * settings.weight_bytes)
    if sharding.weights:
        # The unit at hand and the next; and what is in no layer: adapter, table and head.
        stacks = (sizes.tower, sizes.llm)
        layer = max(stack.weights / stack.count for stack in stacks)
        rest = sizes.weights - sum(stack.weights for stack in stacks)
        return copies + (2 * layer + rest) * (settings.weight_bytes + settings.trained_bytes)
    return copies + sizes.all_trained * settings.trained_bytes  # DDP's buckets


def activations(sizes: Sizes, settings: Settings, load: Load) -> float:
    """What is kept for the backward pass, or of it the inputs of layers and one layer at a time."""
    tower = sizes.cost.parts[1].passes_gradients
    stacks = [(sizes.llm, load.tokens), *([(sizes.tower, load.patches)] if tower else [])]
    of_layer = [(layers, tokens * layer_bytes(layers, settings.precision)) for layers, tokens in stacks]
    residual = 2 if settings.precision == "bfloat16" else 4
    if settings.recompute:
        inputs = sum(tokens * layers.hidden * residual * layers.count for layers, tokens in stacks)
        kept = inputs + max(one for _, one in of_layer)
    else:
        kept = sum(layers.count * one for layers, one in of_layer)
    around = 20 * sizes.llm.hidden * load.tokens  # embeddings with pictures put in, and the last norm
    folded = sizes.tower.hidden * sizes.tile_patches / sizes.tile_tokens
    return kept + around + 12 * folded * load.picture_tokens


def layer_bytes(layers: Layers, precision: Precision) -> float:
    """Bytes that a layer keeps of each token: the inputs of norms, products, attention and the feed-forward part."""
    gates = 2 if layers.gated else 1
    if precision == "float32":
        around = 24 * layers.hidden
        attention = (16 if layers.rotated else 8) * (layers.queries + layers.keys)
        return around + attention + 8 * gates * layers.inner
    # Norms compute in float32. Autocast makes a copy of its input for every product.
    around = (16 + 2 * (3 + gates) if precision == "autocast" else 20) * layers.hidden
    attention = (10 if layers.rotated else 4) * (layers.queries + layers.keys)
    return around + attention + 4 * gates * layers.inner


def logit_bytes(sizes: Sizes, settings: Settings, load: Load) -> float:
    """Of the part of the logits that is computed at once."""
    return LOGIT_BYTES * min(load.scored * sizes.vocabulary, LOGITS_AT_ONCE[settings.device])


def cache_bytes(sizes: Sizes, precision: Precision) -> float:
    """Of a token in the key-value cache."""
    return 2 * sizes.llm.count * sizes.llm.keys * (4 if precision == "float32" else 2)
