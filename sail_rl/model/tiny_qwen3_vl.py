"""A Qwen3-VL of about a million parameters: M-RoPE, DeepStack and pictures of any size, as in the released models."""

from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from sail_rl.model.tiny import INITIALIZER_RANGE, chat_template, random_model, tiny_text_config, tiny_tokenizer

PATCH_SIZE, MERGE_SIZE = 16, 2
SIDE = PATCH_SIZE * MERGE_SIZE  # of the square that becomes a token: a picture of 56x56 becomes 4
PIXELS = {"shortest_edge": SIDE**2, "longest_edge": (8 * SIDE) ** 2}  # areas, though transformers names them so
HALVES = [0.5, 0.5, 0.5]
START, PICTURE, VIDEO, END = "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"


def tiny_qwen3_vl_processor(corpus: list[str]) -> Qwen3VLProcessor:
    """Tokenizer, processors of pictures and videos, and chat template of the tiny Qwen3-VL."""
    settings = {"size": PIXELS, "patch_size": PATCH_SIZE, "merge_size": MERGE_SIZE}
    normalised = settings | {"image_mean": HALVES, "image_std": HALVES}
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(**normalised),
        tiny_tokenizer(corpus, picture_tokens=(START, PICTURE, VIDEO, END)),
        Qwen3VLVideoProcessor(**normalised),
        chat_template=chat_template(START + PICTURE + END, START + VIDEO + END),
    )


def tiny_qwen3_vl_config(processor: Qwen3VLProcessor) -> Qwen3VLConfig:
    """Sizes of the tiny Qwen3-VL, for the processor's vocabulary."""
    text = tiny_text_config(processor.tokenizer)
    # Time, height and width turn 6, 5 and 5 of the 16 pairs of each head, by turns: 24, 20 and 20 of 64 when released.
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "depth": 2,
        "num_heads": 4,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
        "initializer_range": INITIALIZER_RANGE,
    }
    return Qwen3VLConfig(
        vision_config=vision,
        text_config=text | {"rope_parameters": rope},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
    )


def tiny_qwen3_vl_model(processor: Qwen3VLProcessor, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """The tiny Qwen3-VL with random weights that depend on `seed` alone."""
    config = tiny_qwen3_vl_config(processor)
    return random_model(Qwen3VLForConditionalGeneration, config, processor.tokenizer, seed)
