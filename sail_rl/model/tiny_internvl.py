"""An InternVL3.5 of about a million parameters, as transformers has it: InternViT, pixel shuffle, adapter, Qwen3."""

from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
)

from sail_rl.model.processing_sail_vl2 import END_IMAGE, IMAGE_CONTEXT, IMAGENET_MEAN, IMAGENET_STD, START_IMAGE
from sail_rl.model.tiny import (
    IMAGE_SIZE,
    INITIALIZER_RANGE,
    TOKENS_PER_TILE,
    chat_template,
    random_model,
    tiny_text_config,
    tiny_tokenizer,
)

VIDEO = "<video>"
# Attributes of the tokenizer that InternVL's processor reads.
NAMED_TOKENS = {
    "start_image_token": START_IMAGE,
    "context_image_token": IMAGE_CONTEXT,
    "end_image_token": END_IMAGE,
    "video_token": VIDEO,
}


def tiny_internvl_processor(corpus: list[str]) -> InternVLProcessor:
    """Tokenizer, processors of pictures and videos, and chat template of the tiny InternVL."""
    tile = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    settings = {"size": tile, "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
    names = tuple(NAMED_TOKENS.values())
    return InternVLProcessor(
        GotOcr2ImageProcessor(crop_to_patches=True, min_patches=1, max_patches=1, **settings),
        tiny_tokenizer(corpus, picture_tokens=names, extra_special_tokens=NAMED_TOKENS),
        InternVLVideoProcessor(**settings),
        image_seq_length=TOKENS_PER_TILE,
        chat_template=chat_template(f"{IMAGE_CONTEXT}\\n", f"{VIDEO}\\n"),
    )


def tiny_internvl_config(processor: InternVLProcessor) -> InternVLConfig:
    """Sizes of the tiny InternVL, for the processor's vocabulary."""
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 14,
        "attention_bias": True,
        "initializer_range": INITIALIZER_RANGE,
    }
    return InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen3"} | tiny_text_config(processor.tokenizer),
        image_token_id=processor.image_token_id,
        image_seq_length=TOKENS_PER_TILE,
        tie_word_embeddings=False,
    )


def tiny_internvl_model(processor: InternVLProcessor, seed: int = 0) -> InternVLForConditionalGeneration:
    """The tiny InternVL with random weights that depend on `seed` alone."""
    config = tiny_internvl_config(processor)
    return random_model(InternVLForConditionalGeneration, config, processor.tokenizer, seed)
