"""Every family of models: the engine, the trainer and transformers itself see the same row the same way."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, GROUP, LENGTH, QWEN, World, make_world
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
)

import rollouts.hf
from rollouts.inputs import position_ids, stack_model_inputs, stack_prompts
from sail_rl.batch import Group, make_batch
from sail_rl.command_line import BadInput
from sail_rl.config_data import ModelSection
from sail_rl.data.example import BadRow, Example, conversation
from sail_rl.data.packing import idle_group, needs_picture
from sail_rl.data.prompting import make_prompt
from sail_rl.model.cpu_linear import OneDnnLinear, use_onednn
from sail_rl.model.cpu_passes import use_fewer_passes
from sail_rl.model.load import PARTS, TINY, freeze, load_model
from sail_rl.model.tiny_qwen3_vl import END, PICTURE, START, VIDEO
from sail_rl.policy import token_terms

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=FAMILIES)
def world(request) -> World:
    return make_world(request.param)


def plain_log_probs(world: World, example: Example, completion: list[int]) -> list[float]:
    """transformers alone, on one row without padding, with what the processor gives."""
    chat = world.processor.apply_chat_template(
        example.messages, add_generation_prompt=True, tokenize=False, enable_thinking=True
    )
    inputs = dict(world.processor(text=[chat], images=list(example.images) or None, return_tensors="pt"))
    added = torch.tensor([completion])
    fillers = {"input_ids": added, "attention_mask": torch.ones_like(added), "mm_token_type_ids": 0 * added}
    inputs |= {name: torch.cat([inputs[name], fillers[name]], 1) for name in fillers if name in inputs}
    with torch.no_grad():
        logits_CV = world.model(**inputs).logits[0, -len(completion) - 1 : -1]
    logits_CV[:, world.suppressed] = -torch.inf
    return torch.log_softmax(logits_CV, -1).gather(1, added.T)[:, 0].tolist()


def test_engine_trainer_and_transformers_agree(world):
    """In one mixed batch: text alone, one and two pictures, prompts and completions of all lengths."""
    world.log_probs(
        [Group(world.prompts[2], [[70, 71]])]
    )  # Qwen-VL keeps positions of the last batch: they must not matter
    rollouts = world.generate(world.prompts)
    groups = world.groups(rollouts)
    batched = world.log_probs(groups)
    completions = [completion for group in groups for completion in group.completions]
    for number, (rollout, completion) in enumerate(zip(rollouts, completions, strict=True)):
        plain = plain_log_probs(world, world.examples[number // GROUP], completion)
        assert batched[number] == pytest.approx(plain, abs=1e-5)
        assert rollout.log_probs[: len(completion)] == pytest.approx(plain, abs=1e-5)
        assert min(plain) < -0.5
    assert len({tuple(rollout.token_ids) for rollout in rollouts}) == len(rollouts)


def test_greedy_equals_plain_generate(world):
    for prompt, rollout in zip(world.prompts, world.generate(world.prompts, temperature=0, size=1), strict=True):
        input_ids, mask = stack_prompts([prompt], 0)
        output = world.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=LENGTH,
            do_sample=False,
            suppress_tokens=world.suppressed,
            **stack_model_inputs([prompt]),
        )
        assert rollout.token_ids == output[0, input_ids.shape[1] :].tolist()


def test_every_picture_counts(world):
    """Blank pictures change a prompt's log-probabilities, and those of no other prompt in the batch."""
    groups = world.groups(world.generate(world.prompts))
    blank = []
    for group in groups:
        pixels = {k: v * (k != "pixel_values") for k, v in group.prompt.model_inputs.items()}
        blank.append(replace(group, prompt=replace(group.prompt, model_inputs=pixels)))
    for number, (seen, unseen) in enumerate(zip(world.log_probs(groups), world.log_probs(blank), strict=True)):
        has_picture = bool(world.prompts[number // GROUP].images)
        assert (seen != pytest.approx(unseen, abs=1e-3)) == has_picture
        assert has_picture or seen == pytest.approx(unseen, abs=1e-6)


def test_positions_in_a_batch_are_those_of_a_row_alone(world, monkeypatch):
    ids_BT, mask_BT = stack_prompts(world.prompts, 0)
    together = position_ids(world.model, ids_BT, mask_BT, stack_model_inputs(world.prompts))
    assert together.ndim == (3 if world.family in QWEN else 2)
    for row, prompt in enumerate(world.prompts):
        alone = position_ids(world.model, *stack_prompts([prompt], 0), stack_model_inputs([prompt]))
        assert together[..., row, -len(prompt.token_ids) :].equal(alone[..., 0, :])
    if world.family in QWEN:
        # With positions counted along the text alone, the engine would see another row.
        right = world.generate(world.prompts)
        monkeypatch.setattr(
            rollouts.hf, "position_ids", lambda model, ids, mask, inputs: (mask.cumsum(-1) - 1).clamp(0)
        )
        wrong = world.generate(world.prompts)
        for number in (1, 2, 4):
            mine, other = right[number * GROUP], wrong[number * GROUP]
            assert mine.log_probs[0] != pytest.approx(other.log_probs[0], abs=1e-3) or mine.token_ids != other.token_ids


def test_an_idle_group_gives_the_tower_a_gradient_and_trains_nothing(world):
    idle, text = idle_group(world.processor, with_picture=True), Group(world.prompts[3], [[70, 71]])
    assert needs_picture([text], idle)
    assert not needs_picture([Group(world.prompts[1], [[70]])], idle)
    batch = make_batch([text, idle])
    terms = token_terms(world.model, batch, 1.0, world.suppressed)
    (terms.log_probs_BT * batch.mask_BC).sum().backward()
    missing = [name for name, parameter in world.model.named_parameters() if parameter.grad is None]
    moved = [
        name
        for name, parameter in world.model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    ]
    world.model.zero_grad()
    assert missing == []
    assert moved
    assert all(any(f"{key}." in name for key in PARTS["llm"]) for name in moved)
    with torch.no_grad():
        alone = token_terms(world.model, make_batch([text]), 1.0, world.suppressed)
    assert terms.log_probs_BT[0].tolist() == pytest.approx(alone.log_probs_BT[0].tolist(), abs=1e-6)


def test_each_weight_belongs_to_one_part(world):
    names = [name for name, _ in world.model.named_parameters()]
    for part in PARTS:
        freeze(world.model, part)
    parts = [[part for part, keys in PARTS.items() if any(f"{key}." in name for key in keys)] for name in names]
    assert not any(parameter.requires_grad for parameter in world.model.parameters())
    world.model.requires_grad_(True)
    assert {len(found) for found in parts} == {1}
    assert {found[0] for found in parts} == set(PARTS)


def test_tokens_of_pictures_and_videos_are_never_written(world):
    names = {
        "tiny": {"<img>", "<IMG_CONTEXT>", "</img>"},
        "tiny_internvl": {"<img>", "<IMG_CONTEXT>", "</img>", "<video>"},
    }
    expected = names.get(world.family, {START, PICTURE, VIDEO, END})
    assert set(world.processor.tokenizer.convert_ids_to_tokens(world.suppressed)) == expected


def test_a_tiny_model_survives_saving(world, tmp_path):
    world.model.save_pretrained(tmp_path)
    world.processor.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    if any(isinstance(module, OneDnnLinear) for module in world.model.modules()):
        use_onednn(model)
    if any("forward" in vars(module) for module in world.model.modules()):
        use_fewer_passes(model)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert (type(model), type(processor)) == (type(world.model), type(world.processor))
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    for example, prompt in zip(world.examples, world.prompts, strict=True):
        again = make_prompt(example, processor, "think", 1000)
        assert again.token_ids == prompt.token_ids
        assert again.token_inputs == prompt.token_inputs
    loaded = replace(world, model=model)
    groups = [Group(prompt, [[70, 71, 72]]) for prompt in world.prompts]
    for mine, other in zip(world.log_probs(groups), loaded.log_probs(groups), strict=True):
        assert mine == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize(
    ("thinking", "words"), [("think", "Think first."), ("judge", "Judge first."), ("direct", None)]
)
def test_each_answer_form_is_asked_for_in_its_words(world, thinking, words):
    prompt = make_prompt(world.examples[1], world.processor, thinking, 1000)
    text = world.processor.tokenizer.decode(prompt.token_ids)
    assert [found for found in ("Think first.", "Judge first.") if found in text] == ([words] if words else [])


def test_a_picture_of_the_built_in_task_is_a_handful_of_tokens(world):
    (image,) = world.examples[1].images
    assert image.size == (56, 56)
    count = world.prompts[1].token_ids.count(world.model.config.image_token_id)
    assert count == 4


@pytest.mark.parametrize("family", TINY)
def test_max_tiles(family):
    section = ModelSection(random_init=family, max_tiles=2)
    if family == "tiny_qwen3_vl":
        with pytest.raises(BadInput, match="this model's processor cuts no tiles"):
            load_model(section, 0)
    else:
        assert load_model(section, 0)[1].image_processor.max_patches == 2


@pytest.mark.parametrize("token", [PICTURE, VIDEO, START, END, "<IMG_CONTEXT>"])
def test_text_may_not_hold_tokens_of_pictures(token):
    with pytest.raises(BadRow, match="reserved for pictures"):
        conversation({"question": f"what is {token}?"}, 0)


def test_a_processor_with_other_inputs_is_refused():
    processor = load_model(ModelSection(random_init="tiny"), 0)[1]

    class Padded:
        """A processor that pads its pictures, and says so by a mask."""

        chat_template = processor.chat_template
        image_processor = processor.image_processor
        apply_chat_template: Callable = processor.apply_chat_template

        def __call__(self, **inputs):
            return dict(processor(**inputs)) | {"pixel_attention_mask": torch.ones(1, 4)}

    example = Example("a", conversation({"question": "hm?"}, 0), (), {}, False)
    with pytest.raises(BadInput, match="its processor gives pixel_attention_mask, which is not supported"):
        make_prompt(example, Padded(), "think", 100)
