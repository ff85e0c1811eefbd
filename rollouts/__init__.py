"""Who writes the completions. An engine turns prompts into rollouts and takes new weights between steps.

This package imports nothing of `sail_rl`. A new engine is a new file here that follows `RolloutEngine`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from PIL import Image


@dataclass(frozen=True)
class Prompt:
    """One question as the model reads it; its group of completions shares it."""

    id: str
    """The row it comes from."""
    token_ids: list[int]
    """Chat template applied, image placeholders expanded to one token per image feature."""
    images: tuple[Image.Image, ...] = ()
    """The pictures, decoded, in the order of their placeholders; each frame of a video is one."""
    model_inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What the processor made of the pictures: `pixel_values` [tiles, 3, height, width] and the like."""
    seed: int = 0
    """Position in the data stream: sampling depends on it, and not on how prompts are batched or sharded."""
    token_inputs: Mapping[str, list[int]] = field(default_factory=dict)
    """What it says of each token beside its id: `mm_token_type_ids`."""


@dataclass(frozen=True)
class Filters:
    """What changes the model's distribution, beside the temperature, before a token is drawn; vLLM's meanings."""

    repetition_penalty: float = 1.0
    """On tokens of the prompt and of the completion so far; comes before the temperature, all else after it."""
    min_p: float = 0.0
    """The least probability, as a share of the likeliest token's."""
    top_k: int = 0
    """So many of the likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """The likeliest tokens, of what the others leave, that together have this probability."""

    @property
    def cut(self) -> bool:
        """Whether some tokens are left out."""
        return bool(self.min_p or self.top_k or self.top_p < 1)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_completion_length: int
    temperature: float = 1.0
    """0 takes the most likely token."""
    seed: int = 0
    filters: Filters = Filters()
    stop: tuple[str, ...] = ()
    """A completion ends with the token that completes one of these texts, and keeps it."""


@dataclass(frozen=True)
class Rollout:
    """One completion of one prompt."""

    token_ids: list[int]
    """Sampled tokens, the end token included when it was reached."""
    log_probs: list[float]
    """The engine's log-probability of each sampled token, in the distribution that it was drawn from."""
    text: str
    """Decoded without special tokens."""
    finish_reason: Literal["stop", "length"]
    """`stop`: it ends with an end token or a stop text."""
    weight_version: int
    """Optimizer steps that the weights had seen."""


Finished = Callable[[int, list[Rollout]], object]
"""What is told of a group as soon as it is whole, perhaps in another thread: the place of its prompt, and the group."""


def unheard(place: int, group: list[Rollout]) -> None:
    """Nobody waits for single groups."""


class RolloutEngine(Protocol):
    """What the trainer needs of an engine."""

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling, finished: Finished = unheard
    ) -> list[Rollout]:
        """`group_size` completions of every prompt, groups together, in the order of the prompts."""
        ...

    def load_weights(self, parameters: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take the trainer's newest weights: all of them, under the names that files have."""
        ...

    def sleep(self) -> None:
        """Leave the device's memory to the trainer until `wake`; afterwards weights must be loaded."""
        ...

    def wake(self) -> None:
        """Take the memory again."""
        ...

    def close(self) -> None:
        """End whatever was started."""
        ...
