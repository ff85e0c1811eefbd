"""From an example to what the model reads: the prompt's tokens, and for SFT the target's."""

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from rollouts import Prompt
from rollouts.inputs import encoded_prompt, unknown_inputs
from sail_rl.command_line import BadInput
from sail_rl.data.example import BadRow, Example

# The words by which the answer forms are asked for, as in our chat template.
SUFFIXES = {
    "think": " You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    "The reasoning process MUST BE enclosed within <think> </think> tags. "
    "The final answer MUST BE put in \\boxed{}.",
    "judge": " Judge first, within <judge> </judge> tags, whether this question calls for step-by-step reasoning or "
    "can be answered at a glance. Then reason within <think> </think> tags, or leave them empty if you judged that "
    "no reasoning is needed. End with the final answer in \\boxed{}.",
}
Message = dict[str, Any]
IMAGE = {"type": "image"}


@dataclass(frozen=True)
class Sample:
    """One SFT sample."""

    prompt: Prompt
    target_ids: list[int]
    """Tokens of the assistant's turn, the end of the turn included."""


def make_prompt(example: Example, processor, thinking: str, max_prompt_length: int, seed: int = 0) -> Prompt:
    """Apply the chat template and the processor; raises BadRow when the prompt is too long."""
    messages, images = show_frames(example, processor)
    text = prompt_text(messages, processor, thinking)
    encoded = processor(text=[text], images=list(images) or None, return_tensors="pt")
    if unknown_inputs(encoded):
        raise BadInput(
            f"model: its processor gives {', '.join(unknown_inputs(encoded))}, which is not supported; "
            "SAIL-VL2, InternVL, Qwen2.5-VL and Qwen3-VL can be used"
        )
    prompt = encoded_prompt(example.id, encoded, images, seed)
    length = len(prompt.token_ids)
    if length > max_prompt_length:
        raise BadRow(f"the prompt has {length} tokens; data.max_prompt_length = {max_prompt_length}")
    return prompt


def prompt_text(messages: list[Message], processor, thinking: str) -> str:
    """The chat template applied, the answer form asked for."""
    template = processor.chat_template or ""
    keys: dict[str, Any] = {"enable_thinking": thinking != "direct"}
    if "judge_suffix" in template:  # ours; elsewhere a `thinking` may mean something else
        keys["thinking"] = thinking
    if thinking in SUFFIXES and f"{thinking}_suffix" not in template:
        # A template that does not know our answer form: ask for it in words, as the released models are asked.
        messages = copy.deepcopy(messages)
        users = [message for message in messages if message["role"] == "user"]
        users[-1]["content"].append({"type": "text", "text": SUFFIXES[thinking]})
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **keys)


def show_frames(example: Example, processor) -> tuple[list[Message], tuple[Image.Image, ...]]:
    """The messages with each video as its frames, labelled and numbered; and all pictures in their order.

    Frames are pictures for every engine and model alike. One that would be cut into tiles is made a tile beforehand.
    """
    if not example.videos:
        return example.messages, example.images
    pictures, videos = iter(example.images), iter(example.videos)
    messages, shown = [], []
    for message in example.messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "video":
                frames = [one_tile(frame, processor.image_processor) for frame in next(videos)]
                shown += frames
                parts += [p for n in range(len(frames)) for p in ({"type": "text", "text": f"Frame{n + 1}: "}, IMAGE)]
            else:
                shown += [next(pictures)] if part["type"] == "image" else []
                parts.append(part)
        messages.append(message | {"content": parts})
    return messages, tuple(shown)


def one_tile(frame: Image.Image, image_processor) -> Image.Image:
    """A frame that the processor, or an engine of its own, makes exactly one tile of."""
    if not hasattr(image_processor, "max_patches"):
        return frame
    if image_processor.min_patches > 1:
        fewest = image_processor.min_patches
        raise BadInput(f"model.min_tiles = {fewest}: a frame of a video is one tile; set model.min_tiles=1")
    size = image_processor.size
    return frame.resize((size["width"], size["height"]), Image.Resampling.BICUBIC)


def make_sample(
    example: Example, processor, thinking: str, kind: str, max_prompt_length: int, max_length: int
) -> Sample:
    """Prompt and target; raises BadRow when the row has no reasoning to imitate or is too long."""
    prompt = make_prompt(example, processor, thinking, max_prompt_length)
    tokenizer = processor.tokenizer
    target_ids = tokenizer(target_text(example, thinking, kind), add_special_tokens=False)["input_ids"]
    target_ids.append(tokenizer.eos_token_id)
    length = len(prompt.token_ids) + len(target_ids)
    if length > max_length:
        raise BadRow(f"prompt and target have {length} tokens; sft.max_length = {max_length}")
    return Sample(prompt, target_ids)


def pick_kind(shares: Mapping[str, float], seed: int, position: int) -> str:
    """The kind of reasoning that this sample imitates: in the given shares, the same in every run."""
    return random.Random(f"{seed}/{position}").choices(list(shares), list(shares.values()))[0]


def target_text(example: Example, thinking: str, kind: str = "terse") -> str:
    """What the assistant should say."""
    if thinking == "direct":
        return f"\\boxed{{{example.columns['answer']}}}"
    answer = example.columns.get(f"answer_{kind}", example.columns["answer"])
    return f"{reasoning_text(example, thinking, kind)}\n\\boxed{{{answer}}}"


def reasoning_text(example: Example, thinking: str, kind: str) -> str:
    """What stands before the answer: for `judge` the judgement, and no reasoning where the row needs none."""
    judgement = ""
    if thinking == "judge":
        if not example.columns.get("judgement"):
            raise BadRow("no `judgement` to imitate; map one with data.columns, or set data.thinking: think")
        judgement = f"<judge>{example.columns['judgement']}</judge>"
        if not needs_thinking(example):
            return f"{judgement}<think>\n\n</think>"
    column = "reasoning" if kind == "terse" else f"reasoning_{kind}"
    trace = example.columns.get(column)
    if not trace:
        raise BadRow(f"no `{column}` to imitate; map one with data.columns, or set data.thinking: direct")
    return f"{judgement}<think>{trace}</think>"


def needs_thinking(example: Example) -> bool:
    """The row's own word; a row that has none is to be thought about."""
    needed = example.columns.get("needs_thinking", True)
    if not isinstance(needed, bool):
        raise BadRow(f"`needs_thinking` is {needed!r}; it must be true or false")
    return needed
