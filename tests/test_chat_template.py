"""The chat template: turns, pictures in their place, the three answer forms."""

import jinja2
import pytest

from sail_rl.model.processing_sail_vl2 import SailVL2Processor, tiling_image_processor
from sail_rl.model.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def processor():
    return SailVL2Processor(tiling_image_processor(448, 12), tiny_tokenizer(["Why? user assistant"] * 3))


SUFFIX = (
    " You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    "The reasoning process MUST BE enclosed within <think> </think> tags. "
    "The final answer MUST BE put in \\boxed{}."
)
IMAGE = {"type": "image"}


def say(text):
    return {"type": "text", "text": text}


def render(processor, *content, **keys):
    messages = [{"role": "user", "content": list(content)}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **keys)


def turn(text):
    return f"<|im_start|>user\n{text}<|im_end|><|im_start|>assistant\n"


def test_parts_keep_their_order(processor):
    assert render(processor, IMAGE, IMAGE, say("Why?")) == turn("<IMG_CONTEXT>\n<IMG_CONTEXT>\nWhy?")
    assert render(processor, say("A: "), IMAGE, say("B: "), IMAGE, say("Same?")) == turn(
        "A: <IMG_CONTEXT>\nB: <IMG_CONTEXT>\nSame?"
    )


def test_turns_follow_each_other_without_a_newline(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, say("What?")]},
        {"role": "assistant", "content": [say("\\boxed{3}")]},
        {"role": "user", "content": "And twice that?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, thinking="think")
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|>"
        "<|im_start|>assistant\n\\boxed{3}<|im_end|>"
        f"<|im_start|>user\nAnd twice that?{SUFFIX}<|im_end|><|im_start|>assistant\n"
    )


def test_the_answer_forms(processor):
    plain = render(processor, say("Why?"))
    assert plain == turn("Why?")
    thinking = render(processor, say("Why?"), thinking="think")
    assert thinking == render(processor, say("Why?"), enable_thinking=True) == turn("Why?" + SUFFIX)
    assert render(processor, say("Why?"), thinking="think", enable_thinking=True) == thinking
    direct = render(processor, say("Why?"), thinking="direct")
    assert direct == render(processor, say("Why?"), enable_thinking=False) == plain
    judge = render(processor, say("Why?"), thinking="judge")
    tags = ["<judge>", "</judge>", "<think>", "</think>", "\\boxed{}"]
    assert [judge.index(tag) for tag in tags] == sorted(judge.index(tag) for tag in tags)
    assert judge == render(processor, say("Why?"), thinking="judge", enable_thinking=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"thinking": "thinks"}, "thinking is think, direct or judge, not thinks"),
        ({"thinking": "direct", "enable_thinking": True}, "enable_thinking = True contradicts thinking = direct"),
        ({"thinking": "think", "enable_thinking": False}, "enable_thinking = False contradicts thinking = think"),
        ({"thinking": "judge", "enable_thinking": False}, "enable_thinking = False contradicts thinking = judge"),
    ],
)
def test_contradictions_are_errors(processor, keys, message):
    with pytest.raises(jinja2.TemplateError, match=message):
        render(processor, say("Why?"), **keys)


def test_a_part_that_cannot_be_shown_is_an_error(processor):
    with pytest.raises(jinja2.TemplateError, match="a part of type video"):
        render(processor, {"type": "video"}, say("Why?"))
