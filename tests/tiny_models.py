"""Tiny models and inputs that several test files share: dense and mixture of experts, text with 0, 1 and 2 pictures."""

import numpy as np
import torch
from PIL import Image

from rollouts import Filters, Prompt
from sail_rl.batch import Group, TrainingBatch, make_batch
from sail_rl.model import SailVL2Config, SailVL2ForConditionalGeneration
from sail_rl.model.tiny import tiny_config, tiny_model, tiny_processor

# Text, sizes of its pictures (the wide one becomes two tiles and a thumbnail), a completion.
QUESTIONS = [
    ("what is four plus five? say nothing else, and do not explain", [], [70, 71, 72]),
    ("how many red cards?", [(56, 56)], [80, 81, 82, 83, 84]),
    ("add the two numbers", [(112, 56), (56, 56)], [90]),
]
MIXTURE = {
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
# Each of what changes the distribution, and all together.
FILTERS = {
    "top_p": Filters(top_p=0.7),
    "top_k": Filters(top_k=4),
    "min_p": Filters(min_p=0.1),
    "repetition_penalty": Filters(repetition_penalty=1.7),
    "all": Filters(repetition_penalty=0.8, min_p=0.05, top_k=6, top_p=0.8),
}


def processor_for_questions():
    """A tokenizer that knows the questions' words; up to four tiles a picture."""
    return tiny_processor([text for text, *_ in QUESTIONS] * 3, max_tiles=4)


def pictures() -> list[list[Image.Image]]:
    """Noise of the given sizes, for each question."""
    rng = np.random.default_rng(0)
    return [
        [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for size in sizes]
        for _, sizes, _ in QUESTIONS
    ]


def chats(processor) -> list[str]:
    """The questions through the chat template."""
    contents = [[{"type": "image"}] * len(sizes) + [{"type": "text", "text": text}] for text, sizes, _ in QUESTIONS]
    turns = [[{"role": "user", "content": content}] for content in contents]
    return [processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]


def groups(processor) -> list[Group]:
    """A group of one completion for each question."""
    found = []
    for chat, images, (text, _, completion) in zip(chats(processor), pictures(), QUESTIONS, strict=True):
        encoded = processor(text=[chat], images=images or None, return_tensors="pt")
        pixels = {"pixel_values": encoded["pixel_values"]} if images else {}
        found.append(Group(Prompt(text, encoded["input_ids"][0].tolist(), tuple(images), pixels), [completion], [1.0]))
    return found


def mixed_batch(processor) -> TrainingBatch:
    """All the questions in one batch, of different lengths."""
    return make_batch(groups(processor))


def completion_logits(model, batch: TrainingBatch) -> torch.Tensor:
    """Logits [B, C, V] that predict each token of a padded batch's completions, by the model's own forward pass."""
    inputs = {"input_ids": batch.input_ids_RT, "attention_mask": batch.attention_mask_RT, **batch.model_inputs}
    return model(**inputs, logits_to_keep=batch.completion_ids_BC.shape[1] + 1, use_cache=False).logits[:, :-1]


def dense(processor) -> SailVL2ForConditionalGeneration:
    """The tiny model, its output as far from uniform as a trained model's."""
    model = tiny_model(processor, seed=0)
    model.lm_head.weight.data *= 3
    return model.eval()


def mixture(processor) -> SailVL2ForConditionalGeneration:
    """The same with a Qwen3-MoE of four experts, whose routers have clear preferences."""
    config = tiny_config(processor)
    text_config = config.text_config.to_dict() | MIXTURE
    config = SailVL2Config(
        vision_config=config.vision_config.to_dict(),
        text_config=text_config,
        image_token_id=config.image_token_id,
        image_seq_length=config.image_seq_length,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SailVL2ForConditionalGeneration(config)
        for layer in model.model.language_model.layers:
            layer.mlp.gate.weight.data.normal_(0, 0.3)
    model.lm_head.weight.data *= 3
    return model.eval()


MODELS = {"dense": dense, "mixture of experts": mixture}
