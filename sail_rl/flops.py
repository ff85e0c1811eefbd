"""What passing through a model costs, in FLOPs, from its sizes and what it reads.

Forward: 2 W per token for the W weights that it meets (the tower's per patch, the adapter's per picture token, the
language model's per token, of a mixture those of the experts that read it, the head's per completion token), and for
attention 4 x layers x width per pair of tokens of which one sees the other: P (P + 1) / 2 in a prompt of P tokens,
C P + C (C + 1) / 2 for a completion of C, the square of its patches for a tile or picture of its own.
Backward: as much again for the gradient of the activations wherever anything at or below trains, and as much again for
the weights that train; so 6 W per token where all train, 4 W in a frozen language model over a trained tower. Pictures
themselves need no gradient: 4 W in the patch embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from rollouts import Prompt
from sail_rl.batch import Group
from sail_rl.model.parts import PARTS


@dataclass(frozen=True)
class Part:
    """One part of the model, as far as its arithmetic goes."""

    weights: float
    """That each of its tokens is multiplied with."""
    attention: float
    """FLOPs of a pair of tokens in all layers, forward."""
    trained_share: float
    """Of the weights."""
    passes_gradients: bool
    """Whether anything at or below it trains, so that the gradient of its inputs is needed."""

    def forward(self, tokens: float, pairs: float) -> float:
        """FLOPs over so many tokens, and pairs of which one sees the other."""
        return 2 * self.weights * tokens + self.attention * pairs

    def backward(self, tokens: float, pairs: float) -> float:
        """The same for the gradient."""
        times = self.passes_gradients + self.trained_share
        return 2 * self.weights * tokens * times + 2 * self.attention * pairs * self.passes_gradients


@dataclass(frozen=True)
class Shape:
    """A prompt and its completions, as far as their cost goes."""

    windows: tuple[int, ...]
    """Patches of each tile or picture, which see each other."""
    pictures: int
    """Tokens of the prompt that stand for pictures."""
    prompt: int
    """All of its tokens."""
    lengths: tuple[int, ...]
    """Tokens of each completion."""


@dataclass(frozen=True)
class ModelCost:
    """What passes through a model cost."""

    parts: tuple[Part, ...]
    """Patch embedding, tower, adapter, language model, head."""
    patch_size: int
    image_token_id: int

    def forward(self, groups: Sequence[Group]) -> float:
        """FLOPs to read each prompt once and every completion."""
        return sum(self.forward_of(self.shape_of(group)) for group in groups)

    def backward(self, groups: Sequence[Group]) -> float:
        """FLOPs of the gradient of the same."""
        return sum(self.backward_of(self.shape_of(group)) for group in groups)

    def forward_of(self, shape: Shape) -> float:
        """The same of one group, of which only the shape is known."""
        return sum(part.forward(*work) for part, work in self.work_of(shape))

    def backward_of(self, shape: Shape) -> float:
        return sum(part.backward(*work) for part, work in self.work_of(shape))

    def shape_of(self, group: Group) -> Shape:
        """What a group costs depends on this alone."""
        ids = group.prompt.token_ids
        windows = tuple(patch_windows(group.prompt, self.patch_size))
        lengths = tuple(len(completion) for completion in group.completions)
        return Shape(windows, ids.count(self.image_token_id), len(ids), lengths)

    def work(self, group: Group) -> list[tuple[Part, tuple[float, float]]]:
        """What each part has to do: (tokens, pairs)."""
        return self.work_of(self.shape_of(group))

    def work_of(self, shape: Shape) -> list[tuple[Part, tuple[float, float]]]:
        patches, prompt, lengths = sum(shape.windows), shape.prompt, shape.lengths
        pairs = prompt * (prompt + 1) / 2 + sum(c * prompt + c * (c + 1) / 2 for c in lengths)
        tower = (patches, sum(window**2 for window in shape.windows))
        llm, head = (prompt + sum(lengths), pairs), (sum(lengths), 0)
        return list(zip(self.parts, ((patches, 0), tower, (shape.pictures, 0), llm, head), strict=True))


def model_cost(model) -> ModelCost:
    """Read off a model and its configuration. To be called before the model is wrapped or sharded."""
    text, vision = model.config.get_text_config(), model.config.vision_config
    layers = getattr(vision, "depth", None) or vision.num_hidden_layers
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = {
        "tower": 4 * layers * vision.hidden_size,
        "llm": 4 * text.num_hidden_layers * text.num_attention_heads * head_width,
    }
    convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)).weight
    parts = [Part(convolution.numel(), 0, float(convolution.requires_grad), passes_gradients=False)]
    passes = convolution.requires_grad
    for name in ("tower", "adapter", "llm"):
        weights, trained = part_weights(model, name)
        passes = passes or trained > 0
        parts.append(Part(weights, attention.get(name, 0), trained / weights, passes))
    head = model.get_output_embeddings().weight
    parts.append(Part(head.numel(), 0, float(head.requires_grad), passes))
    patch = vision.patch_size
    return ModelCost(tuple(parts), patch if isinstance(patch, int) else patch[0], model.config.image_token_id)


def part_weights(model, part: str) -> tuple[float, float]:
    """(weights that a token of the part is multiplied with, those of them that train); tables are looked up in."""
    total = trained = 0.0
    text = model.config.get_text_config()
    for owner, module in model.named_modules():
        if isinstance(module, nn.Embedding) or not any(f"{key}." in f"{owner}." for key in PARTS[part]):
            continue
        if module is model.get_output_embeddings():
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3 and parameter.shape[0] > 1:  # the experts of a mixture, stacked
                met = parameter.numel() * text.num_experts_per_tok / parameter.shape[0]
            else:  # neither biases, nor tables of shape [1, T, D], nor the patches' convolution
                met = parameter.numel() if parameter.ndim == 2 else 0
            total, trained = total + met, trained + met * parameter.requires_grad
    return total, trained


def patch_windows(prompt: Prompt, patch_size: int) -> list[int]:
    """Patches of each tile, of each picture at its native size, or of each frame: what sees itself in the tower."""
    inputs = prompt.model_inputs
    if "image_grid_thw" in inputs:
        return [rows * columns for frames, rows, columns in inputs["image_grid_thw"].tolist() for _ in range(frames)]
    if "pixel_values" not in inputs:
        return []
    count, _, height, width = inputs["pixel_values"].shape
    patches = (height // patch_size) * (width // patch_size)
    if "image_grids" in inputs:
        return [rows * columns * patches for rows, columns in inputs["image_grids"].tolist()]
    return [patches] * count
