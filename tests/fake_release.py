"""Folders as a release of SAIL-VL2 would have them: tiny, with random weights, spelled out name by name."""

import json

import torch
from safetensors.torch import save_file

VISION = {
    "model_type": "aimv2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": 56,
    "patch_size": 14,
    "rms_norm_eps": 1e-5,
    "qkv_bias": False,
    "use_bias": False,
}
DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
MOE = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
LANGUAGE_MODELS = {"untied": DENSE, "tied": DENSE | {"tie_word_embeddings": True}, "moe": MOE}


def released_values(llm, vocab_size):
    """config.json as the predecessor's has it, remote code named in it."""
    return {
        "architectures": ["SAILVLModel"],
        "auto_map": {
            "AutoConfig": "configuration_sailvl.SAILVLConfig",
            "AutoModel": "modeling_sailvl.SAILVLModel",
            "AutoProcessor": "processing_sailvl.SAILVLProcessor",
        },
        "model_type": "sailvl",
        "downsample_ratio": 0.5,
        "force_image_size": 56,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 4,
        "ps_version": "v2",
        "select_layer": -1,
        "torch_dtype": "float32",
        "vision_config": VISION,
        "llm_config": llm | {"vocab_size": vocab_size, "return_dict": True, "top_k": 50, "_name_or_path": "x"},
    }


def released_shapes(values):
    """Every tensor of a released checkpoint, spelled out."""
    vision, llm = values["vision_config"], values["llm_config"]
    width, inner, d = vision["hidden_size"], vision["intermediate_size"], llm["hidden_size"]
    patches = (values["force_image_size"] // vision["patch_size"]) ** 2
    shapes = {
        "vision_model.preprocessor.patchifier.proj.weight": (width, 3, vision["patch_size"], vision["patch_size"]),
        "vision_model.preprocessor.patchifier.proj.bias": (width,),
        "vision_model.preprocessor.patchifier.norm.weight": (width,),
        "vision_model.preprocessor.pos_embed": (1, patches, width),
        "vision_model.trunk.post_trunk_norm.weight": (width,),
        "mlp1.0.weight": (4 * width,),
        "mlp1.0.bias": (4 * width,),
        "mlp1.1.weight": (d, 4 * width),
        "mlp1.1.bias": (d,),
        "mlp1.3.weight": (d, d),
        "mlp1.3.bias": (d,),
        "language_model.model.embed_tokens.weight": (llm["vocab_size"], d),
        "language_model.model.norm.weight": (d,),
    }
    if not llm["tie_word_embeddings"]:
        shapes["language_model.lm_head.weight"] = (llm["vocab_size"], d)
    for layer in range(vision["num_hidden_layers"]):
        block = f"vision_model.trunk.blocks.{layer}."
        shapes |= {f"{block}norm_{n}.weight": (width,) for n in (1, 2)}
        shapes |= {f"{block}attn.qkv.weight": (3 * width, width), f"{block}attn.proj.weight": (width, width)}
        shapes |= {f"{block}mlp.{name}.weight": (inner, width) for name in ("fc1", "fc3")}
        shapes[f"{block}mlp.fc2.weight"] = (width, inner)
    for layer in range(llm["num_hidden_layers"]):
        shapes |= {f"language_model.model.layers.{layer}.{key}": value for key, value in decoder_shapes(llm).items()}
    return shapes


def decoder_shapes(llm):
    d, width = llm["hidden_size"], llm["head_dim"]
    queries, keys = llm["num_attention_heads"] * width, llm["num_key_value_heads"] * width
    shapes = {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (queries, d),
        "self_attn.k_proj.weight": (keys, d),
        "self_attn.v_proj.weight": (keys, d),
        "self_attn.o_proj.weight": (d, queries),
        "self_attn.q_norm.weight": (width,),
        "self_attn.k_norm.weight": (width,),
    }
    experts = [f"experts.{n}." for n in range(llm["num_experts"])] if "num_experts" in llm else [""]
    inner = llm["moe_intermediate_size"] if "num_experts" in llm else llm["intermediate_size"]
    for expert in experts:
        shapes |= {f"mlp.{expert}{name}_proj.weight": (inner, d) for name in ("gate", "up")}
        shapes[f"mlp.{expert}down_proj.weight"] = (d, inner)
    return shapes | ({"mlp.gate.weight": (llm["num_experts"], d)} if "num_experts" in llm else {})


def random_weights(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = {key: torch.randn(shape, generator=generator) * 0.15 for key, shape in released_shapes(values).items()}
    return {key: value + 1 if "norm" in key else value for key, value in weights.items()}


def write_release(folder, tokenizer, llm, files=1):
    """A folder as it would come from the Hub; in several files, neighbouring names lie in different ones."""
    values = released_values(llm, len(tokenizer))
    weights = random_weights(values)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    remote = {"processor_class": "SAILVLProcessor", "auto_map": {"AutoProcessor": values["auto_map"]["AutoProcessor"]}}
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        file = folder / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | remote))
    names = [f"model-{n + 1:05}-of-{files:05}.safetensors" for n in range(files)]
    for n, name in enumerate(names):
        part = dict(list(weights.items())[n::files])
        save_file(part, folder / (name if files > 1 else "model.safetensors"), metadata={"format": "pt"})
    if files > 1:
        index = {"metadata": {}, "weight_map": {key: names[n % files] for n, key in enumerate(weights)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return values, weights
