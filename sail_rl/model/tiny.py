"""A SAIL-VL2 of about two million parameters, with a tokenizer of its own, for laptops and tests.

The architecture, special tokens, template and tiling are the real ones; only the sizes are small.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.aimv2.modeling_aimv2 import build_2d_sinusoidal_position_embedding

from sail_rl.model.configuration_sail_vl2 import SailVL2Config
from sail_rl.model.modeling_sail_vl2 import SailVL2ForConditionalGeneration
from sail_rl.model.processing_sail_vl2 import (
    END_IMAGE,
    IMAGE_CONTEXT,
    START_IMAGE,
    SailVL2Processor,
    default_chat_template,
    tiling_image_processor,
)

IMAGE_SIZE = 56  # 4x4 patches of 14 pixels: 4 tokens a tile after the pixel shuffle
TOKENS_PER_TILE = (IMAGE_SIZE // 14 // 2) ** 2
INITIALIZER_RANGE = 0.05  # 0.02 suits widths of thousands; at 128 it starts the layers too near to zero
THINK_TOKENS = ("<think>", "</think>")
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PICTURE_TOKENS = (START_IMAGE, IMAGE_CONTEXT, END_IMAGE)
# Words and single digits stay whole, as in Qwen's tokenizer: a number is read digit by digit.
WORD_PATTERN = r"\\boxed\{| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s+"

Model = TypeVar("Model", bound=PreTrainedModel)


def tiny_tokenizer(
    corpus: list[str], vocab_size: int = 640, picture_tokens: Sequence[str] = PICTURE_TOKENS, **attributes
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `corpus`; any other text still encodes, byte by byte.

    `attributes` are those by which a family's processor asks the tokenizer for its tokens.
    """
    special_tokens = (*CHAT_TOKENS, *picture_tokens)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_tokens) - len(THINK_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    # As in Qwen3, the think tags are single tokens but not special ones: they stay in decoded text.
    tokenizer.add_tokens([AddedToken(token, special=False) for token in THINK_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        **attributes,
    )


def tiny_processor(corpus: list[str], max_tiles: int = 1) -> SailVL2Processor:
    """Tokenizer, tiling image processor and chat template of the tiny model."""
    # The released suffix would cost the tiny model more tokens than question, picture and answer together.
    template = default_chat_template().replace(template_suffix("think"), "Think first.")
    template = template.replace(template_suffix("judge"), "Judge first.")
    image_processor = tiling_image_processor(IMAGE_SIZE, max_tiles)
    return SailVL2Processor(image_processor, tiny_tokenizer(corpus), TOKENS_PER_TILE, chat_template=template)


def template_suffix(thinking: str) -> str:
    """The sentences by which an answer form is asked for, read from the template."""
    return default_chat_template().split(f'{thinking}_suffix = "', 1)[1].split('" -%}', 1)[0]


def chat_template(image: str, video: str) -> str:
    """The chat template of the tiny models of other families, with what stands for a picture and for a video."""
    text = (Path(__file__).parent / "tiny_chat_template.jinja").read_text()
    return text.replace("IMAGE", image).replace("VIDEO", video)


def tiny_text_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Sizes of the language model, a Qwen3, for the tokenizer's vocabulary."""
    return {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": len(tokenizer),
        "initializer_range": INITIALIZER_RANGE,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def tiny_config(processor: SailVL2Processor) -> SailVL2Config:
    """Sizes of the tiny model, for the processor's vocabulary."""
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "initializer_range": INITIALIZER_RANGE,
    }
    return SailVL2Config(
        vision_config=vision,
        text_config={"model_type": "qwen3"} | tiny_text_config(processor.tokenizer),
        image_token_id=processor.image_token_id,
        image_seq_length=TOKENS_PER_TILE,
    )


def tiny_model(processor: SailVL2Processor, seed: int = 0) -> SailVL2ForConditionalGeneration:
    """The tiny model with random weights that depend on `seed` alone."""
    model = random_model(SailVL2ForConditionalGeneration, tiny_config(processor), processor.tokenizer, seed)
    # Learned position embeddings start too small for a few hundred steps to tell places apart; these start distinct.
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    side = IMAGE_SIZE // 14
    positions.data.copy_(build_2d_sinusoidal_position_embedding(side, side, positions.shape[1]))
    return model


def random_model(model_class: type[Model], config: PreTrainedConfig, tokenizer, seed: int) -> Model:
    """A fresh model that ends its answers with the tokenizer's end of a turn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
