"""The one place that knows how what a processor gives becomes a prompt, and several prompts one batch.

Inputs of the pictures (`pixel_values`, grids) are joined end to end, whatever rows they belong to. Inputs of
the tokens (`mm_token_type_ids`) follow the tokens: padded where they are, 0 on completions.
Suffixes: _B rows, _T tokens of a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from rollouts import Prompt

PICTURE_INPUTS = ("pixel_values", "image_grid_thw", "image_grids")
TOKEN_INPUTS = ("mm_token_type_ids",)


def unknown_inputs(encoded: Mapping[str, Any]) -> list[str]:
    """Inputs that nobody here knows how to batch."""
    return sorted(encoded.keys() - {"input_ids", "attention_mask", *PICTURE_INPUTS, *TOKEN_INPUTS})


def encoded_prompt(
    identifier: str, encoded: Mapping[str, torch.Tensor], images: tuple[Image.Image, ...] = (), seed: int = 0
) -> Prompt:
    """The prompt that a processor has encoded as a batch of one."""
    return Prompt(
        identifier,
        encoded["input_ids"][0].tolist(),
        images,
        model_inputs={name: encoded[name] for name in PICTURE_INPUTS if name in encoded},
        token_inputs={name: encoded[name][0].tolist() for name in TOKEN_INPUTS if name in encoded},
        seed=seed,
    )


def pad_left(rows: Sequence[Sequence[int]], padding: int) -> torch.Tensor:
    """Rows of numbers as one tensor [B, T], filled up on the left."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[padding] * (longest - len(row)) + list(row) for row in rows])


def stack_prompts(prompts: Sequence[Prompt], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask [B, T] of left-padded prompts."""
    return pad_left([p.token_ids for p in prompts], padding), pad_left([[1] * len(p.token_ids) for p in prompts], 0)


def stack_model_inputs(prompts: Sequence[Prompt], completion_width: int = 0) -> dict[str, torch.Tensor]:
    """What the model reads beside the tokens of left-padded prompts and of `completion_width` tokens after them."""
    inputs = {}
    for name in dict.fromkeys(name for prompt in prompts for name in prompt.model_inputs):
        parts = [p.model_inputs[name] for p in prompts if name in p.model_inputs]
        inputs[name] = torch.cat(parts) if len(parts) > 1 else parts[0]  # pixels of one prompt are not copied
    for name in dict.fromkeys(name for prompt in prompts for name in prompt.token_inputs):
        values_BT = pad_left([p.token_inputs.get(name, [0] * len(p.token_ids)) for p in prompts], 0)
        inputs[name] = torch.nn.functional.pad(values_BT, (0, completion_width))
    return inputs


def position_ids(
    model, input_ids_BT: torch.Tensor, mask_BT: torch.Tensor, inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Positions of left-padded rows: [B, T], or [3, B, T] where the model counts time, height and width apart.

    They are always given to the model: left alone, Qwen-VL would go on from the last batch that it has seen.
    """
    with_axes = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
    if with_axes is None:
        return (mask_BT.cumsum(-1) - 1).clamp(min=0)
    return with_axes.get_rope_index(
        input_ids_BT,
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        attention_mask=mask_BT,
    )[0]
