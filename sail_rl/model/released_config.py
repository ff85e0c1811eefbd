"""config.json of the released SAIL-VL2 models in our terms, and back.

It follows InternVL-chat's keys: `vision_config`, `llm_config`, tiling beside them. What is left out has the published
value; what would change the computation in a way that we do not compute is refused (ValueError).
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

from sail_rl.model.configuration_sail_vl2 import SailVL2Config
from sail_rl.model.processing_sail_vl2 import (
    END_IMAGE,
    IMAGE_CONTEXT,
    START_IMAGE,
    SailVL2Processor,
    tiling_image_processor,
)
from sail_rl.model.sizes import AIMV2_HUGE

MODEL_TYPE, ARCHITECTURE = "sailvl", "SAILVLModel"
LANGUAGE_MODELS = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
# Released -> ours.
VISION_KEYS = {key: key for key in AIMV2_HUGE if key != "use_head"}
VISION_KEYS |= {"num_channels": "num_channels", "attention_dropout": "attention_dropout"}
VISION_KEYS |= {"qkv_bias": "qkv_bias", "use_bias": "mlp_bias"}
# Keys that we cannot honour, with the one value that we compute.
FIXED = {"select_layer": -1, "ps_version": "v2", "pad2square": False, "use_thumbnail": True, "dynamic_image_size": True}
TILES = {"min_dynamic_patch": 1, "max_dynamic_patch": 12}


class SailVLConfig(PreTrainedConfig):
    """What AutoConfig finds for `model_type: sailvl`: it reads a released config.json as a SailVL2Config."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        token_id = added_token_id(kwargs.get("name_or_path") or config_dict.get("_name_or_path"), IMAGE_CONTEXT)
        return SailVL2Config.from_dict(native_config(config_dict, token_id).to_dict(), **kwargs)


def is_released(values: dict[str, Any]) -> bool:
    """Whether a config.json is that of a released model."""
    return values.get("model_type") == MODEL_TYPE or ARCHITECTURE in (values.get("architectures") or [])


def released_values(name_or_path: str | Path) -> dict[str, Any] | None:
    """The config.json of a folder or Hub id if it is a released model's, else None."""
    file = cached_file(name_or_path, "config.json", _raise_exceptions_for_missing_entries=False)
    values = json.loads(Path(file).read_text()) if file else {}
    return values if is_released(values) else None


def added_token_id(name_or_path: str | Path | None, token: str) -> int:
    """A special token's id by its name, from the tokenizer.json of a folder or Hub id."""
    file = name_or_path and cached_file(name_or_path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    added = json.loads(Path(file).read_text())["added_tokens"] if file else []
    ids = [entry["id"] for entry in added if entry["content"] == token]
    if not ids:
        raise ValueError(f"{name_or_path}: no tokenizer.json names the token {token}")
    return ids[0]


def native_config(released: dict[str, Any], image_token_id: int) -> SailVL2Config:
    """The configuration that computes what the released one describes."""
    for key, value in FIXED.items():
        if released.get(key, value) != value:
            raise ValueError(f"config.json: {key} = {released[key]!r}; only {value!r} is supported")
    vision, text, ratio = vision_values(released), text_values(released), released.get("downsample_ratio", 0.5)
    tied = bool(text.get("tie_word_embeddings") or released.get("tie_word_embeddings"))
    return SailVL2Config(
        vision_config=vision,
        text_config=text | {"tie_word_embeddings": tied},
        tie_word_embeddings=tied,
        downsample_ratio=ratio,
        image_token_id=image_token_id,
        image_seq_length=int(vision["image_size"] // vision["patch_size"] * ratio) ** 2,
        architectures=["SailVL2ForConditionalGeneration"],
        dtype=released.get("dtype") or released.get("torch_dtype"),
    )


def vision_values(released: dict[str, Any]) -> dict[str, Any]:
    """The tower's configuration as Aimv2VisionConfig takes it."""
    given = released.get("vision_config") or {}
    values = AIMV2_HUGE | {ours: given[key] for key, ours in VISION_KEYS.items() if key in given}
    if "num_attention_heads" not in given:
        values["num_attention_heads"] = values["hidden_size"] // 128  # AIMv2's head size at every width
    return values | {"image_size": released.get("force_image_size") or values["image_size"], "use_head": False}


def text_values(released: dict[str, Any]) -> dict[str, Any]:
    """The language model's configuration as AutoConfig takes it."""
    given = released.get("llm_config") or released.get("text_config") or {}
    named = [kind for kind, architecture in LANGUAGE_MODELS.items() if architecture in given.get("architectures", [])]
    model_type = named[0] if named else given.get("model_type")
    if model_type not in LANGUAGE_MODELS:
        known = " or ".join(LANGUAGE_MODELS)
        raise ValueError(f"config.json: llm_config.model_type = {model_type!r}; expected {known}")
    if not any(given.get(key) for key in ("rope_theta", "rope_parameters")):
        raise ValueError("config.json: llm_config has no rope_theta")
    return {key: given[key] for key in text_keys(model_type) if given.get(key) is not None} | {"model_type": model_type}


def text_keys(model_type: str) -> list[str]:
    """Keys that describe a language model, without those that every configuration has for other reasons."""
    own = CONFIG_MAPPING[model_type].__annotations__
    return [*own, *(key for key in ("head_dim", "rope_theta", "rope_scaling") if key not in own)]


def released_config(config: SailVL2Config, tiles: dict[str, int]) -> dict[str, Any]:
    """A released config.json for ours; `tiles` is the processor's range, under the names of TILES."""
    vision = config.vision_config.to_dict()
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "downsample_ratio": config.downsample_ratio,
        "force_image_size": vision["image_size"],
        **FIXED,
        **TILES,
        **tiles,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.to_dict().get("dtype"),
        "vision_config": {key: vision[ours] for key, ours in VISION_KEYS.items()},
        "llm_config": released_text(config.text_config),
    }


def released_text(text: Any) -> dict[str, Any]:
    """`llm_config`, with the rotary embedding under the names that transformers 4 knows."""
    # Attributes and not to_dict(), which tells the number of experts under another name than the class takes.
    values = {key: getattr(text, key) for key in text_keys(text.model_type) if hasattr(text, key)}
    rope = dict(values.pop("rope_parameters"))
    theta = rope.pop("rope_theta")
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    heading = {"architectures": [LANGUAGE_MODELS[text.model_type]], "model_type": text.model_type}
    return heading | values | {"rope_theta": theta, "rope_scaling": scaling}


def released_processor(name_or_path: str | Path, released: dict[str, Any]) -> SailVL2Processor:
    """Our processor for a released folder or Hub id: its tokenizer, its tiling, our chat template."""
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left", trust_remote_code=False)
    lacking = sorted({START_IMAGE, IMAGE_CONTEXT, END_IMAGE} - set(tokenizer.get_vocab()))
    if lacking:
        raise ValueError(f"{name_or_path}: the tokenizer lacks {', '.join(lacking)}")
    config = native_config(released, tokenizer.get_vocab()[IMAGE_CONTEXT])
    tiles = TILES | {key: released[key] for key in TILES if key in released}
    image_processor = tiling_image_processor(
        vision_values(released)["image_size"], tiles["max_dynamic_patch"], tiles["min_dynamic_patch"]
    )
    return SailVL2Processor(image_processor, tokenizer, config.image_seq_length)
