"""How long a step takes: FLOPs of the update and of reading prompts, bytes that each written token moves.

The update's three constants are fitted to six measurements of SAIL-VL2-2B on one H200 (benchmarks/results/update_2b.md)
and hit them within a tenth. How fast completions are written has not been measured on a GPU: its constants are what is
usual. Exchange between GPUs and waiting for rewards are not counted.
"""

import math
from dataclasses import dataclass

from sail_rl.flops import Shape
from sail_rl.gpus import Gpu
from sail_rl.planning.sizes import Sizes

EFFICIENCY = 0.45  # of the GPU's peak, in products
LAUNCH = 1.4e-3  # seconds to launch a layer's kernels, for each pass of a micro-batch
READ = 0.7  # of the memory's bandwidth
STEP_BYTES = 44  # read and written of a trained weight by clipping, AdamW and autocast's copy
# Writing a token for all completions at once: vLLM's CUDA graphs, and a layer of transformers launched from Python.
VLLM_STEP, HF_LAYER = 4e-3, 8e-4


@dataclass(frozen=True)
class Writing:
    """How completions are written, on one GPU."""

    engine: str
    at_once: int
    """Completions."""
    weight_bytes: float
    """Of the weights that a token meets, read for each token."""
    cache_bytes: float
    """Of a token in the key-value cache."""


@dataclass(frozen=True)
class Update:
    """What one GPU does in a step's updates."""

    shapes: list[Shape]
    """Of its groups, or its samples."""
    micro_batches: int
    """In one pass over them."""
    optimizer_steps: int
    """In all passes."""
    passes: int
    """Over the groups, forward and backward."""
    forwards: int
    """More of them, which train nothing."""
    recompute: bool


def update_seconds(sizes: Sizes, gpu: Gpu, update: Update) -> float:
    """FLOPs at the GPU's rate, kernels that are launched one after another, and the optimizer's traffic."""
    forward = sum(sizes.cost.forward_of(shape) for shape in update.shapes)
    backward = sum(sizes.cost.backward_of(shape) for shape in update.shapes)
    forwards = update.passes * (1 + update.recompute) + update.forwards
    flops = forward * forwards + backward * update.passes
    # A backward pass launches as much as two forward ones.
    launched = update.micro_batches * (sizes.tower.count + sizes.llm.count) * (forwards + 2 * update.passes)
    moved = update.optimizer_steps * STEP_BYTES * sizes.all_trained
    return flops / (EFFICIENCY * gpu.flops) + launched * LAUNCH + moved / (READ * gpu.bandwidth * 1e9)


def rollout_seconds(sizes: Sizes, gpu: Gpu, shapes: list[Shape], writing: Writing) -> float:
    """Read the prompts, then token by token, as many completions at once as there is room for."""
    read = sum(sizes.cost.forward_of(Shape(s.windows, s.pictures, s.prompt, ())) for s in shapes)
    lengths = [length for shape in shapes for length in shape.lengths]
    rounds = math.ceil(len(lengths) / writing.at_once)
    at_once = len(lengths) / rounds
    held = at_once * (shapes[0].prompt + sum(lengths) / len(lengths) / 2) * writing.cache_bytes
    moved = (writing.weight_bytes + held) / (READ * gpu.bandwidth * 1e9)
    _, _, _, llm, head = sizes.cost.parts
    computed = at_once * (llm.forward(1, 0) + head.forward(1, 0)) / (EFFICIENCY * gpu.flops)
    launched = HF_LAYER * sizes.llm.count if writing.engine == "hf" else VLLM_STEP
    return read / (EFFICIENCY * gpu.flops) + rounds * max(lengths) * (launched + max(moved, computed))
