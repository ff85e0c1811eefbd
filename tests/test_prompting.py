"""Prompts and targets of the three answer forms."""

import pytest

from rewards import format_reward
from sail_rl.config import GrpoRecipe
from sail_rl.data.example import BadRow, make_example
from sail_rl.data.pictures import picture_row
from sail_rl.data.prompting import make_prompt, target_text
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
