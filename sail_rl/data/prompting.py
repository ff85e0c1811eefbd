"""From an example to what the model reads: the prompt's tokens, and for SFT the target's."""

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass

from rollouts import Prompt
from sail_rl.command_line import BadInput
from sail_rl.data.example import BadRow, Example

THINK_SUFFIX = (
    " You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    "The reasoning process MUST BE enclosed within <think> </think> tags. "
    "The final answer MUST BE put in \\boxed{}."
)


@dataclass(frozen=True)
class Sample:
    """One SFT sample."""

    prompt: Prompt
    target_ids: list[int]
    """Tokens of the assistant's turn, the end of the turn included."""


def make_prompt(example: Example, processor, thinking: str, max_prompt_length: int, seed: int = 0) -> Prompt:
    """Apply the chat template and the processor; raises BadRow when the prompt is too long."""
    messages = example.messages
    think = thinking == "think"
    if think and "think_suffix" not in (processor.chat_template or ""):
        # A template that does not know our answer form: ask for it in words, as the released models are asked.
        messages = copy.deepcopy(messages)
        [m for m in messages if m["role"] == "user"][-1]["content"].append({"type": "text", "text": THINK_SUFFIX})
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=think)
    encoded = processor(text=[text], images=list(example.images) or None, return_tensors="pt")
    token_ids = encoded["input_ids"][0].tolist()
    if len(token_ids) > max_prompt_length:
        raise BadRow(f"the prompt has {len(token_ids)} tokens; data.max_prompt_length = {max_prompt_length}")
    model_inputs = {key: value for key, value in encoded.items() if key not in ("input_ids", "attention_mask")}
    if model_inputs.keys() - {"pixel_values"}:
        given = ", ".join(model_inputs)
        raise BadInput(
            f"model: its processor gives {given}; SAIL-VL2 and InternVL, which give pixel_values, can be used"
        )
    return Prompt(example.id, token_ids, example.images, model_inputs, seed)


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
    column = "reasoning" if kind == "terse" else f"reasoning_{kind}"
    trace = example.columns.get(column)
    if not trace:
        raise BadRow(f"no `{column}` to imitate; map one with data.columns, or set data.thinking: direct")
    answer = example.columns.get(f"answer_{kind}", example.columns["answer"])
    return f"<think>{trace}</think>\n\\boxed{{{answer}}}"
