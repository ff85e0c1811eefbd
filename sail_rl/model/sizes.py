"""Configurations of the SAIL-VL2 models at full size: AIMv2-huge at 448 pixels and a Qwen3."""

from typing import Any

from sail_rl.model.configuration_sail_vl2 import SailVL2Config

AIMV2_HUGE: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 12,
    "image_size": 448,
    "patch_size": 14,
    "rms_norm_eps": 1e-5,
    "use_head": False,
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
QWEN3_1_7B = QWEN3 | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
}
QWEN3_8B = QWEN3 | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
}
QWEN3_30B_A3B = QWEN3 | {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
LANGUAGE_MODELS = {"2b": QWEN3_1_7B, "8b": QWEN3_8B, "a3b": QWEN3_30B_A3B}


def sail_vl2_config(size: str, image_token_id: int = 151671) -> SailVL2Config:
    """The configuration of SAIL-VL2-2B, -8B or -A3B (`2b`, `8b`, `a3b`).

    Pass the `<IMG_CONTEXT>` token's id of the tokenizer at hand: it differs between releases.
    """
    return SailVL2Config(
        vision_config=dict(AIMV2_HUGE), text_config=dict(LANGUAGE_MODELS[size]), image_token_id=image_token_id
    )
