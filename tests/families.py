"""Tiny models of every family with prompts of all kinds, for the tests that hold of each of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from rollouts import Prompt, Rollout, Sampling
from rollouts.hf import HFEngine
from sail_rl.batch import Group, make_batch
from sail_rl.config_data import ModelSection
from sail_rl.data.example import Example, conversation
from sail_rl.data.prompting import make_prompt
from sail_rl.model.load import TINY, image_token_ids, load_model
from sail_rl.model.tiny import chat_template, random_model, tiny_text_config, tiny_tokenizer
from sail_rl.model.tiny_qwen3_vl import END, PICTURE, START, VIDEO
from sail_rl.policy import token_terms

FAMILIES = (*TINY, "qwen2_5_vl")
LENGTH = 10
GROUP = 3
# Text and sizes of its pictures: none, one, and two of different shapes.
QUESTIONS = [
    ("what is four plus five? say nothing else, and do not explain anything at all", []),
    ("how many red cards?", [(56, 56)]),
    ("add the numbers of <image> and of <image>", [(150, 60), (56, 90)]),
    ("hm?", []),
    ("which bar of the chart is the tallest one?", [(40, 128)]),
]
QWEN = ("tiny_qwen3_vl", "qwen2_5_vl")


@dataclass(frozen=True)
class World:
    """A tiny model of a family with prompts of all kinds, as recipes make them."""

    family: str
    model: Any
    processor: Any
    examples: list[Example]
    prompts: list[Prompt]
    suppressed: list[int]

    def generate(self, prompts: list[Prompt], temperature: float = 1.0, size: int = GROUP) -> list[Rollout]:
        engine = HFEngine(self.model, self.processor.tokenizer, self.suppressed)
        return engine.generate(prompts, size, Sampling(LENGTH, temperature, seed=3))

    def log_probs(self, groups: list[Group]) -> list[list[float]]:
        """What the trainer computes for the completions of one batch."""
        with torch.no_grad():
            terms = token_terms(self.model, make_batch(groups), 1.0, self.suppressed)
        completions = [completion for group in groups for completion in group.completions]
        return [row[: len(c)].tolist() for row, c in zip(terms.log_probs_BT, completions, strict=True)]

    def groups(self, rollouts: list[Rollout]) -> list[Group]:
        """A group for every prompt, its completions cut to different lengths."""
        cut = [rollout.token_ids[: LENGTH - i % GROUP] for i, rollout in enumerate(rollouts)]
        return [Group(prompt, cut[i * GROUP : (i + 1) * GROUP]) for i, prompt in enumerate(self.prompts)]


def qwen2_5_vl() -> tuple[Any, Any]:
    """A tiny Qwen2.5-VL: patches of 14 pixels, attention in windows, M-RoPE in blocks."""
    tokenizer = tiny_tokenizer([text for text, _ in QUESTIONS] * 3, picture_tokens=(START, PICTURE, VIDEO, END))
    pictures = Qwen2VLImageProcessor(size={"shortest_edge": 28**2, "longest_edge": 8 * 28**2})
    template = chat_template(START + PICTURE + END, START + VIDEO + END)
    processor = Qwen2_5_VLProcessor(pictures, tokenizer, Qwen2VLVideoProcessor(), chat_template=template)
    vision = {"depth": 2, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4, "out_hidden_size": 128}
    vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    text = tiny_text_config(tokenizer) | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}}
    names = {"image_token_id": PICTURE, "video_token_id": VIDEO, "vision_start_token_id": START}
    ids = {
        name: tokenizer.convert_tokens_to_ids(token) for name, token in (names | {"vision_end_token_id": END}).items()
    }
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids)
    return random_model(Qwen2_5_VLForConditionalGeneration, config, tokenizer, 0), processor


def make_world(family: str) -> World:
    """The family's tiny model with random weights."""
    section = ModelSection(random_init=family if family in TINY else "tiny", max_tiles=None if family in QWEN else 4)
    model, processor = qwen2_5_vl() if family == "qwen2_5_vl" else load_model(section, seed=0)
    model.lm_head.weight.data *= 2  # far from uniform, as a trained model is
    rng, examples = np.random.default_rng(0), []
    for text, sizes in QUESTIONS:
        images = tuple(Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for size in sizes)
        examples.append(Example(text, conversation({"question": text}, len(images)), images, {}, False))
    prompts = [make_prompt(example, processor, "think", 1000, seed) for seed, example in enumerate(examples)]
    assert len({len(prompt.token_ids) for prompt in prompts}) >= 4  # so that rows are padded
    return World(family, model.eval(), processor, examples, prompts, image_token_ids(model, processor))
