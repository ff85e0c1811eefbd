"""A scaled-down SAIL-VL2-2B and groups of completions for it, shared by all variants of a benchmark.

Everything that a cost ratio depends on is as in the 2B: the tower's share of the FLOPs, patches and tokens of a tile
(scaled by the same factor), the depth of the pixel shuffle, grouped queries. Weights and completions are random.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from rollouts import Prompt, Rollout
from rollouts.inputs import encoded_prompt
from sail_rl.model.configuration_sail_vl2 import SailVL2Config
from sail_rl.model.modeling_sail_vl2 import SailVL2ForConditionalGeneration
from sail_rl.model.processing_sail_vl2 import SailVL2Processor, tiling_image_processor
from sail_rl.model.tiny import INITIALIZER_RANGE, random_model, tiny_tokenizer

TILE_SIDE, TOKENS_PER_TILE, MOST_TILES = 224, 64, 14  # 16 x 16 patches of 14 pixels, four of them a token
VOCABULARY = 2560  # the head's share of the FLOPs is then that of the 2B
GROUP = 8
SHORTEST = 0.4  # of the longest completion
QUESTION = "Look at the picture and count"
FILLER = " count"
VISION: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 592,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": TILE_SIDE,
    "initializer_range": INITIALIZER_RANGE,
}
TEXT: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "initializer_range": INITIALIZER_RANGE,
}


@dataclass(frozen=True)
class Cell:
    """The shape of one update."""

    prompt: int
    """Tokens, pictures included."""
    completion: int
    """Tokens of the longest completion; the others are evenly spread from 0.4 of it."""
    groups: int = 1
    size: int = GROUP
    """Completions of a prompt."""
    tiles: int | None = None
    """Of a picture, its thumbnail aside; None: as many as the prompt has room for."""
    depth: int = 1
    """Times as many layers, in tower and language model."""


@dataclass(frozen=True)
class World:
    """What all variants start from."""

    cell: Cell
    processor: SailVL2Processor
    model: SailVL2ForConditionalGeneration
    prompts: list[Prompt]
    questions: list[str]
    """Their text, for TRL's rows."""
    rollouts: list[Rollout]
    """Groups together."""
    rewards_N: torch.Tensor

    @property
    def tiles(self) -> int:
        """Of one prompt."""
        return len(self.prompts[0].model_inputs["pixel_values"])

    @property
    def lengths(self) -> list[int]:
        return [len(rollout.token_ids) for rollout in self.rollouts]


def make_world(cell: Cell) -> World:
    """The model and `cell.groups` groups, the same for the same cell."""
    rng = np.random.default_rng(0)
    processor = scaled_processor()
    config = scaled_config(processor, cell.depth)
    model = random_model(SailVL2ForConditionalGeneration, config, processor.tokenizer, seed=0)
    model.lm_head.weight.data *= 3  # far from uniform, as a trained model is
    pairs = [exact_prompt(processor, cell, rng) for _ in range(cell.groups)]
    return World(
        cell,
        processor,
        model,
        prompts=[prompt for prompt, _ in pairs],
        questions=[question for _, question in pairs],
        rollouts=[rollout for _ in pairs for rollout in random_rollouts(cell, processor, rng)],
        rewards_N=torch.from_numpy(rng.random(cell.groups * cell.size, dtype=np.float32)),
    )


def scaled_processor() -> SailVL2Processor:
    """The real tiling and template, with smaller tiles and a tokenizer that knows the filler."""
    image_processor = tiling_image_processor(TILE_SIDE, MOST_TILES)
    return SailVL2Processor(image_processor, tiny_tokenizer([QUESTION + FILLER] * 3), TOKENS_PER_TILE)


def scaled_config(processor: SailVL2Processor, depth: int = 1) -> SailVL2Config:
    """Sizes of the model, with `depth` times as many layers."""
    layers = [{"num_hidden_layers": depth * part["num_hidden_layers"]} for part in (VISION, TEXT)]
    ends = {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id}
    return SailVL2Config(
        vision_config=VISION | layers[0],
        text_config=TEXT | ends | layers[1],
        image_token_id=processor.image_token_id,
        image_seq_length=TOKENS_PER_TILE,
    )


def exact_prompt(
    processor: SailVL2Processor, cell: Cell, rng: np.random.Generator, side: int = TILE_SIDE
) -> tuple[Prompt, str]:
    """A prompt of exactly as many tokens, a picture with the cell's tiles and then text; and its question."""
    length = cell.prompt
    picture = noise_picture(cell.tiles or length // TOKENS_PER_TILE - 2, rng, side)
    missing = length - len(encode(processor, picture, QUESTION).token_ids)
    question = QUESTION + FILLER * missing
    prompt = encode(processor, picture, question)
    if len(prompt.token_ids) != length:
        raise ValueError(f"a prompt of {length} tokens cannot be made: {len(prompt.token_ids)}")
    return prompt, question


def noise_picture(tiles: int, rng: np.random.Generator, side: int = TILE_SIDE) -> Image.Image:
    """A picture that is cut into `tiles` tiles, in two rows; the processor adds a thumbnail."""
    shape = (2 * side, tiles // 2 * side, 3)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def encode(processor: SailVL2Processor, picture: Image.Image, question: str) -> Prompt:
    """Picture and question as one user turn."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    chat = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    return encoded_prompt("benchmark", processor(text=[chat], images=[picture], return_tensors="pt"), (picture,))


def random_rollouts(cell: Cell, processor: SailVL2Processor, rng: np.random.Generator) -> list[Rollout]:
    """One group of ragged completions, without tokens that stand for pictures."""
    allowed = np.setdiff1d(np.arange(VOCABULARY), picture_tokens(processor))
    lengths = np.linspace(SHORTEST * cell.completion, cell.completion, cell.size).astype(int)
    completions = [rng.choice(allowed, length).tolist() for length in rng.permutation(lengths)]
    return [Rollout(ids, [0.0] * len(ids), "", "stop", 0) for ids in completions]


def picture_tokens(processor: SailVL2Processor) -> Sequence[int]:
    """Ids that must not be in a completion."""
    return processor.start_image_token_id, processor.image_token_id, processor.end_image_token_id
