"""Prompts and targets of the three answer forms."""

import pytest

from rewards import format_reward
from sail_rl.config import GrpoRecipe, SftSection
from sail_rl.config_data import DataSection
from sail_rl.data.example import BadRow, make_example
from sail_rl.data.pictures import picture_row
from sail_rl.data.prompting import make_prompt, make_sample, target_text
from sail_rl.model.processing_sail_vl2 import default_chat_template
from sail_rl.model.tiny import template_suffix, tiny_processor
from sail_rl.scoring import load_rewards

FORMS = ("think", "direct", "judge")
TRACES = {"reasoning": "Two ones are two.", "reasoning_hasty": "A mere guess, no more.", "answer_hasty": "7"}
# Like the templates of other models: it takes no notice of `thinking`.
FOREIGN = "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"


def example_of(**row):
    return make_example({"question": "Why?", "answer": "2"} | row, "row 1", {}, None)


def judged(kind="terse", **row):
    return target_text(example_of(**TRACES, **row), "judge", kind)


def test_the_target_of_the_judge_form():
    thought = "<judge>A sum.</judge><think>Two ones are two.</think>\n\\boxed{2}"
    assert judged(judgement="A sum.") == judged(judgement="A sum.", needs_thinking=True) == thought
    assert judged("hasty", judgement="?") == "<judge>?</judge><think>A mere guess, no more.</think>\n\\boxed{7}"
    seen = judged(judgement="At a glance.", needs_thinking=False)
    assert seen == "<judge>At a glance.</judge><think>\n\n</think>\n\\boxed{2}"
    assert format_reward([thought, seen], contract="judge") == [1.0, 1.0]


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({}, "terse", "no `judgement` to imitate"),
        (
            {"judgement": "A sum.", "needs_thinking": "no"},
            "terse",
            "`needs_thinking` is 'no'; it must be true or",
        ),
        ({"judgement": "A sum."}, "wordy", "no `reasoning_wordy` to imitate"),
    ],
)
def test_a_row_without_a_target_of_the_judge_form(row, kind, reason):
    with pytest.raises(BadRow, match=reason):
        judged(kind, **row)


@pytest.mark.parametrize("index", range(12))
def test_the_picture_task_has_well_formed_targets_of_every_form(index):
    row = picture_row("train", index)
    example = make_example(row, "-", {}, None)
    for thinking in FORMS:
        assert format_reward([target_text(example, thinking)], contract=thinking) == [1.0]
    assert ("no reasoning is needed" in target_text(example, "judge")) == (not row["needs_thinking"])


def text_of(processor, thinking):
    prompt = make_prompt(example_of(), processor, thinking, 999)
    return processor.tokenizer.decode(prompt.token_ids)


def test_a_prompt_asks_for_its_answer_form():
    processor = tiny_processor(["Why?"] * 3)
    asked = [text_of(processor, form).split("<|im_end|>")[0].removeprefix("<|im_start|>user\n") for form in FORMS]
    assert asked == ["Why? Think first.", "Why?", "Why? Judge first."]


def test_a_template_that_does_not_know_the_answer_forms_is_asked_in_the_same_words():
    processor = tiny_processor(["Why?"] * 3)
    ours, processor.chat_template = default_chat_template(), FOREIGN
    for form in ("think", "judge"):
        assert template_suffix(form) in ours
        assert text_of(processor, form) == "Why? " + template_suffix(form).replace("\\\\", "\\")
    assert text_of(processor, "direct") == "Why?"


def test_the_format_reward_checks_the_form_that_is_asked_for():
    def rewards_of(form, *entries):
        recipe = {"output_dir": "runs/x", "model": "runs/y", "data": {"train": "pictures", "thinking": form}}
        recipe |= {"rewards": list(entries), "trainer": {"max_steps": 1}}
        return load_rewards(GrpoRecipe.model_validate(recipe))

    for form in FORMS:
        rewards = rewards_of(form, {"function": "format"}, {"function": "accuracy"})
        assert [dict(reward.arguments) for reward in rewards] == [{"contract": form}, {}]
    assert rewards_of("judge", {"function": "format", "contract": "direct"})[0].arguments == {"contract": "direct"}


# Like Qwen3's: a direct answer begins after an empty think block.
WITH_BLOCK = (
    "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"
    "<|im_start|>{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


def sample_text(row, thinking="by_kind", template=None, **sft):
    """Prompt, target and kind of the sample that a row becomes."""
    processor = tiny_processor(["Why? <think>Two ones are two.</think>\n\n\\boxed{2}"] * 3)
    processor.chat_template = template or processor.chat_template
    data = DataSection.model_validate({"train": "pictures", "thinking": thinking})
    sample = make_sample(example_of(**row), processor, data, SftSection(**sft), "terse")
    decode = processor.tokenizer.decode
    return decode(sample.prompt.token_ids), decode(sample.target_ids).removesuffix("<|im_end|>"), sample.kind


def test_the_kind_of_a_row_chooses_prompt_and_target():
    prompt, target, kind = sample_text({"kind": "cot"} | TRACES)
    assert "Think first." in prompt
    assert (target, kind) == ("<think>Two ones are two.</think>\n\\boxed{2}", "cot")
    prompt, target, kind = sample_text({"kind": "direct"} | TRACES)
    assert "Think first." not in prompt
    assert (target, kind) == ("\\boxed{2}", "direct")
    assert sample_text({"kind": "cot"} | TRACES, thinking="direct")[1:] == ("\\boxed{2}", "direct")


@pytest.mark.parametrize("trained", [False, True])
def test_the_empty_think_block_of_a_template(trained):
    prompt, target, _ = sample_text({"kind": "direct"}, template=WITH_BLOCK, train_empty_think=trained)
    block = "<think>\n\n</think>\n\n"
    assert prompt == "Why?<|im_start|>" + ("" if trained else block)
    assert target == (block if trained else "") + "\\boxed{2}"
    thought = sample_text({"kind": "cot"} | TRACES, template=WITH_BLOCK, train_empty_think=trained)
    assert thought[0].endswith("<|im_start|>")
    assert thought[1] == "<think>Two ones are two.</think>\n\\boxed{2}"


def test_a_whole_conversation_is_imitated_to_the_letter():
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Since two is two."}]
    for row in ({"messages": turns, "question": None}, {"completion": "Since two is two."}):
        assert sample_text({"kind": "direct"} | row)[1] == "Since two is two."
    assert "Why?" in sample_text({"kind": "direct", "messages": turns, "question": None})[0]
    thought = [turns[0], {"role": "assistant", "content": "<think>Two ones are two.</think>\n2"}]
    assert sample_text({"messages": thought, "question": None}, "think")[1] == "<think>Two ones are two.</think>\n2"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "`kind` is None; with data.thinking: by_kind it must be cot or direct"),
        ({"kind": "quick"}, "`kind` is 'quick'"),
        ({"kind": "cot", "reasoning": "One <think> more."}, "the target's think tags are <think>, <think>, </think>"),
        ({"kind": "cot", "completion": "<think>Two"}, "the target's think tags are <think>; one block must be opened"),
        ({"kind": "cot", "completion": "</think>Two<think>"}, "the target's think tags are </think>, <think>;"),
        ({"kind": "cot", "completion": "Two."}, "the target has no think block, and the answer form is think"),
        ({"kind": "direct", "completion": "<think>a</think>2"}, "the target has a think block, and the answer form is"),
        ({"kind": "direct", "answer": "2<|im_end|>"}, "the target contains <|im_end|>, which is reserved"),
        ({"kind": "direct", "answer": "Two ones " * 99}, r"prompt and target have \d+ tokens; sft.max_length = 80"),
    ],
)
def test_a_row_that_cannot_be_imitated(row, reason):
    with pytest.raises(BadRow, match=reason.replace("|", r"\|")):
        sample_text(row, max_length=80)
