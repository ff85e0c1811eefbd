"""From an example to what the model reads: the prompt's tokens, and for SFT the target's."""

import copy
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from rollouts import Prompt
from rollouts.inputs import encoded_prompt, unknown_inputs
from sail_rl.command_line import BadInput
from sail_rl.config import SftSection
from sail_rl.config_data import DataSection, Kind
from sail_rl.data.example import Example, check_reserved
from sail_rl.data.images import BadRow

# The words by which the answer forms are asked for, as in our chat template.
SUFFIXES = {
    "think": " You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    "The reasoning process MUST BE enclosed within <think> </think> tags. "
    "The final answer MUST BE put in \\boxed{}.",
    "judge": " Judge first, within <judge> </judge> tags, whether this question calls for step-by-step reasoning or "
    "can be answered at a glance. Then reason within <think> </think> tags, or leave them empty if you judged that "
    "no reasoning is needed. End with the final answer in \\boxed{}.",
}
FORMS: dict[str, str] = {"cot": "think", "direct": "direct"}  # the answer form of each kind of row
# How some templates (Qwen3's) begin the answer of a model that is not to think.
EMPTY_THINK = re.compile(r"<think>\s*</think>\s*\Z")
Message = dict[str, Any]
IMAGE = {"type": "image"}


@dataclass(frozen=True)
class Sample:
    """One SFT sample."""

    prompt: Prompt
    target_ids: list[int]
    """Tokens of the assistant's turn, the end of the turn included."""
    kind: Kind
    """Whether the target reasons."""


def answer_form(example: Example, thinking: str) -> str:
    """How this example is to be answered: as `data.thinking` says, or as the row's `kind` does."""
    if thinking != "by_kind":
        return thinking
    kind = example.columns.get("kind")
    if str(kind) not in FORMS:
        raise BadRow(f"`kind` is {kind!r}; with data.thinking: by_kind it must be cot or direct")
    return FORMS[str(kind)]


def make_prompt(example: Example, processor, form: str, max_prompt_length: int, seed: int = 0) -> Prompt:
    """Apply the chat template and the processor; raises BadRow when the prompt is too long."""
    messages, images = show_frames(example, processor)
    text = prompt_text(messages, processor, form)
    return encode_prompt(example.id, text, images, processor, max_prompt_length, seed)


def encode_prompt(
    identifier: str, text: str, images: tuple[Image.Image, ...], processor, max_prompt_length: int, seed: int = 0
) -> Prompt:
    """A templated text as tokens, with its pictures."""
    encoded = processor(text=[text], images=list(images) or None, return_tensors="pt")
    if unknown_inputs(encoded):
        raise BadInput(
            f"model: its processor gives {', '.join(unknown_inputs(encoded))}, which is not supported; "
            "SAIL-VL2, InternVL, Qwen2.5-VL and Qwen3-VL can be used"
        )
    prompt = encoded_prompt(identifier, encoded, images, seed)
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


def make_sample(example: Example, processor, data: DataSection, sft: SftSection, trace: str) -> Sample:
    """Prompt and target; raises BadRow when there is nothing to imitate, it is malformed, or both are too long."""
    form = answer_form(example, data.thinking)
    messages, images = show_frames(example, processor)
    text, target = prompt_text(messages, processor, form), target_text(example, form, trace)
    if sft.train_empty_think:
        text, block = cut_empty_think(text)
        target = block + target
    prompt = encode_prompt(example.id, text, images, processor, data.max_prompt_length)
    tokenizer = processor.tokenizer
    target_ids = [*tokenizer(target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    length = len(prompt.token_ids) + len(target_ids)
    if length > sft.max_length:
        raise BadRow(f"prompt and target have {length} tokens; sft.max_length = {sft.max_length}")
    return Sample(prompt, target_ids, "direct" if form == "direct" else "cot")


def cut_empty_think(text: str) -> tuple[str, str]:
    """A prompt's text without the empty think block that it may end with, and that block."""
    found = EMPTY_THINK.search(text)
    return (text[: found.start()], found[0]) if found else (text, "")


def pick_trace(shares: Mapping[str, float], seed: int, position: int) -> str:
    """The reasoning trace that this sample imitates: in the given shares, the same in every run."""
    return random.Random(f"{seed}/{position}").choices(list(shares), list(shares.values()))[0]


def target_text(example: Example, form: str, trace: str = "terse") -> str:
    """What the assistant should say; raises BadRow where its think block is not what the form asks for."""
    text = example.target if example.target is not None else written_target(example, form, trace)
    check_think_block(text, form)
    check_reserved(text, "the target")
    return text


def written_target(example: Example, form: str, trace: str) -> str:
    """The target put together from the row's columns."""
    if example.columns["answer"] is None:
        raise BadRow("no `answer` (or `solution`) to imitate; map one with data.columns")
    if form == "direct":
        return f"\\boxed{{{example.columns['answer']}}}"
    answer = example.columns.get(f"answer_{trace}", example.columns["answer"])
    return f"{reasoning_text(example, form, trace)}\n\\boxed{{{answer}}}"


def check_think_block(text: str, form: str) -> None:
    """One think block, opened and closed in order; none in a direct answer."""
    tags = re.findall(r"</?think>", text)
    if tags not in ([], ["<think>", "</think>"]):
        raise BadRow(f"the target's think tags are {', '.join(tags)}; one block must be opened and closed, in order")
    if bool(tags) == (form == "direct"):
        has = "a think block" if tags else "no think block"
        raise BadRow(f"the target has {has}, and the answer form is {form}; see data.thinking")


def reasoning_text(example: Example, form: str, trace: str) -> str:
    """What stands before the answer: for `judge` the judgement, and no reasoning where the row needs none."""
    judgement = ""
    if form == "judge":
        if not example.columns.get("judgement"):
            raise BadRow("no `judgement` to imitate; map one with data.columns, or set data.thinking: think")
        judgement = f"<judge>{example.columns['judgement']}</judge>"
        if not needs_thinking(example):
            return f"{judgement}<think>\n\n</think>"
    column = "reasoning" if trace == "terse" else f"reasoning_{trace}"
    reasoning = example.columns.get(column)
    if not reasoning:
        raise BadRow(f"no `{column}` to imitate; map one with data.columns, or set data.thinking: direct")
    return f"{judgement}<think>{reasoning}</think>"


def needs_thinking(example: Example) -> bool:
    """The row's own word; a row that has none is to be thought about."""
    needed = example.columns.get("needs_thinking", True)
    if not isinstance(needed, bool):
        raise BadRow(f"`needs_thinking` is {needed!r}; it must be true or false")
    return needed
