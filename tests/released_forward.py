"""The forward pass of a released SAIL-VL2 checkpoint in plain torch, straight from its state dict and config.json.

Written from the description of the released code, without transformers and without our own modules, so that it can
judge both. Shapes: B pictures' tiles, P patches, T tokens, H heads, D width.
"""

import torch
import torch.nn.functional as F


def forward(weights, config, input_ids, pixel_values, image_token_id):
    """Logits [1, T, V] for one sequence, its tiles put where the image tokens stand."""
    hidden = weights["language_model.model.embed_tokens.weight"][input_ids]
    if pixel_values is not None:
        tokens = adapter(weights, tower(weights, config["vision_config"], pixel_values), config["downsample_ratio"])
        hidden[input_ids == image_token_id] = tokens.flatten(0, 1)
    hidden = decoder(weights, config["llm_config"], hidden)
    head = weights.get("language_model.lm_head.weight", weights["language_model.model.embed_tokens.weight"])
    return hidden @ head.T


def rms_norm(hidden, weight, eps):
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * weight


def attention(query, key, value, causal):
    """[B, T, H, D] each; as many key heads as query heads."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)


def tower(weights, config, pixel_values):
    """AIMv2: [B, 3, size, size] -> [B, P, D]."""
    prefix, eps = "vision_model.preprocessor.", config["rms_norm_eps"]
    kernel, bias = (weights[f"{prefix}patchifier.proj.{name}"] for name in ("weight", "bias"))
    patches = F.conv2d(pixel_values, kernel, bias, stride=config["patch_size"]).flatten(2).transpose(1, 2)
    hidden = rms_norm(patches, weights[f"{prefix}patchifier.norm.weight"], eps) + weights[f"{prefix}pos_embed"]
    for layer in range(config["num_hidden_layers"]):
        block = {name: weights[f"vision_model.trunk.blocks.{layer}.{name}.weight"] for name in BLOCK}
        normed = rms_norm(hidden, block["norm_1"], eps)
        qkv = (normed @ block["attn.qkv"].T).unflatten(-1, (3, config["num_attention_heads"], -1))
        hidden = hidden + attention(*qkv.unbind(2), causal=False) @ block["attn.proj"].T
        normed = rms_norm(hidden, block["norm_2"], eps)
        gated = F.silu(normed @ block["mlp.fc1"].T) * (normed @ block["mlp.fc3"].T)
        hidden = hidden + gated @ block["mlp.fc2"].T
    return rms_norm(hidden, weights["vision_model.trunk.post_trunk_norm.weight"], eps)


BLOCK = ("norm_1", "attn.qkv", "attn.proj", "norm_2", "mlp.fc1", "mlp.fc2", "mlp.fc3")


def adapter(weights, patches, ratio):
    """Pixel shuffle (ps_version v2) and mlp1: [B, P, D] -> [B, P * ratio^2, width of the language model]."""
    side, fold = int(patches.shape[1] ** 0.5), int(1 / ratio)
    # A token is a square of patches: the upper left one, the upper right one, then the lower two.
    squares = patches.unflatten(1, (side // fold, fold, side // fold, fold))  # B, row, in row, column, in column, D
    folded = squares.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
    normed = F.layer_norm(folded, folded.shape[-1:], weights["mlp1.0.weight"], weights["mlp1.0.bias"])
    hidden = F.gelu(F.linear(normed, weights["mlp1.1.weight"], weights["mlp1.1.bias"]))
    return F.linear(hidden, weights["mlp1.3.weight"], weights["mlp1.3.bias"])


def rotate(hidden, theta):
    """Rotary position embedding: the two halves of each head are the coordinates that turn."""
    length, width = hidden.shape[1], hidden.shape[-1]
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    cos, sin = (part.to(hidden.dtype)[None, :, None, :] for part in (angle.cos(), angle.sin()))
    first, second = hidden.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def decoder(weights, config, hidden):
    """Qwen3: [1, T, D] -> [1, T, D], after the last norm."""
    prefix, eps, theta = "language_model.model.", config["rms_norm_eps"], config["rope_theta"]
    heads, key_heads, width = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    for layer in range(config["num_hidden_layers"]):
        start = f"{prefix}layers.{layer}."
        block = {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}
        normed = rms_norm(hidden, block["input_layernorm.weight"], eps)
        query, key, value = (
            (normed @ block[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (count, width))
            for name, count in (("q", heads), ("k", key_heads), ("v", key_heads))
        )
        query = rotate(rms_norm(query, block["self_attn.q_norm.weight"], eps), theta)
        key = rotate(rms_norm(key, block["self_attn.k_norm.weight"], eps), theta)
        key, value = (part.repeat_interleave(heads // key_heads, dim=2) for part in (key, value))
        hidden = hidden + attention(query, key, value, causal=True) @ block["self_attn.o_proj.weight"].T
        normed = rms_norm(hidden, block["post_attention_layernorm.weight"], eps)
        hidden = hidden + (mixture if "mlp.gate.weight" in block else swiglu)(block, "mlp.", normed, config)
    return rms_norm(hidden, weights[f"{prefix}norm.weight"], eps)


def swiglu(block, name, hidden, _config):
    gated = F.silu(hidden @ block[f"{name}gate_proj.weight"].T) * (hidden @ block[f"{name}up_proj.weight"].T)
    return gated @ block[f"{name}down_proj.weight"].T


def mixture(block, name, hidden, config):
    """Qwen3-MoE: each token's best experts, weighted by their share of the probability."""
    chance = (hidden @ block[f"{name}gate.weight"].T).softmax(-1)
    best, chosen = chance.topk(config["num_experts_per_tok"], dim=-1)
    if config["norm_topk_prob"]:
        best = best / best.sum(-1, keepdim=True)
    shares = torch.zeros_like(chance).scatter(-1, chosen, best)
    written = [swiglu(block, f"{name}experts.{expert}.", hidden, config) for expert in range(chance.shape[-1])]
    return sum(shares[..., expert, None] * part for expert, part in enumerate(written))
