"""The three parts of a vision-language model, by the names that transformers gives them (InternVL's, Qwen-VL's)."""

PARTS = {
    "tower": ("vision_tower", "visual.blocks", "visual.patch_embed", "visual.pos_embed"),
    "adapter": ("multi_modal_projector", "visual.merger", "visual.deepstack_merger_list"),
    "llm": ("language_model", "lm_head"),
}


def part_of(name: str) -> str:
    """The part that a weight of this name belongs to."""
    return next(part for part, keys in PARTS.items() if any(f"{key}." in f"{name}." for key in keys))
