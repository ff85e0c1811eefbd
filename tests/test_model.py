"""SAIL-VL2 as a transformers model: Auto classes, saving, generation, attention, checkpointing, freezing."""

import copy
from itertools import pairwise

import pytest
import torch
from tiny_models import MODELS, chats, completion_logits, dense, mixed_batch, mixture, pictures, processor_for_questions
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from sail_rl.checkpoint import save_model
from sail_rl.command_line import BadInput
from sail_rl.config import OptimSection
from sail_rl.config_data import ModelSection
from sail_rl.model import SailVL2Config, SailVL2ForConditionalGeneration, SailVL2Processor
from sail_rl.model.load import load_model, prepare_for_training
from sail_rl.optimizer import make_optimizer, set_learning_rate
from sail_rl.policy import token_terms

pytestmark = pytest.mark.usefixtures("one_thread")
PART_OF = {
    "tower": "model.vision_tower.",
    "adapter": "model.multi_modal_projector.",
}  # the rest: llm


@pytest.fixture(scope="module")
def processor():
    return processor_for_questions()


@pytest.fixture(scope="module")
def batch(processor):
    return mixed_batch(processor)


def supervised(model, batch):
    """A loss that every weight has a share in."""
    return -(token_terms(model, batch).log_probs_BT * batch.mask_BC).sum()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_auto_classes_and_a_round_trip_that_keeps_every_bit(processor, batch, tmp_path, make):
    model = make(processor)
    save_model(tmp_path / "one", model, processor)
    assert type(AutoConfig.from_pretrained(tmp_path / "one")) is SailVL2Config
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "one")
    assert type(again) is SailVL2ForConditionalGeneration
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    with torch.no_grad():
        assert torch.equal(completion_logits(model, batch), completion_logits(again, batch))

    its_processor = AutoProcessor.from_pretrained(tmp_path / "one")
    assert type(its_processor) is SailVL2Processor
    assert chats(its_processor) == chats(processor)
    for chat, images in zip(chats(processor), pictures(), strict=True):
        ours, theirs = (p(text=[chat], images=images or None, return_tensors="pt") for p in (processor, its_processor))
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in theirs.items()}

    save_model(tmp_path / "two", again, its_processor)
    for name in ("model.safetensors", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    first, second = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("one", "two"))
    assert without_dtype(first) == without_dtype(second)


def without_dtype(values):
    """A configuration without the types that loading notes in it."""
    inner = {key: without_dtype(value) for key, value in values.items() if isinstance(value, dict)}
    return {key: value for key, value in values.items() if key not in ("dtype", "_name_or_path")} | inner


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_left_padded_mixed_batch_generates_what_each_prompt_does_alone(processor, make):
    """Text alone, one picture and two pictures, through the processor's own padding."""
    model, texts, images = make(processor), chats(processor), pictures()
    settings = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    together_inputs = processor(text=texts, images=[one for some in images for one in some], padding=True)
    together_inputs = together_inputs.convert_to_tensors("pt")
    assert together_inputs["attention_mask"][:, 0].tolist() == [0, 0, 1]
    together = model.generate(**together_inputs, **settings)
    width = together_inputs["input_ids"].shape[1]
    answers = set()
    for row, (text, some) in enumerate(zip(texts, images, strict=True)):
        inputs = processor(text=[text], images=some or None, return_tensors="pt")
        alone = model.generate(**inputs, **settings)
        answer = alone.sequences[0, inputs["input_ids"].shape[1] :]
        answers.add(tuple(answer.tolist()))
        assert together.sequences[row, width:][: len(answer)].tolist() == answer.tolist()
        for ours, theirs in zip(together.logits, alone.logits, strict=False):
            torch.testing.assert_close(ours[row], theirs[0], atol=1e-4, rtol=0)
    assert len(answers) == 3


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_sdpa_equals_eager(processor, batch, tmp_path, make):
    save_model(tmp_path, make(processor), processor)
    logits, gradients = {}, {}
    for attention in ("eager", "sdpa"):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=attention)
        parts = (model.config, model.config.text_config, model.config.vision_config)
        assert {part._attn_implementation for part in parts} == {attention}
        supervised(model, batch).backward()
        logits[attention] = completion_logits(model, batch).detach()
        gradients[attention] = {name: parameter.grad for name, parameter in model.named_parameters()}
    mask = batch.mask_BC.bool()
    torch.testing.assert_close(logits["sdpa"][mask], logits["eager"][mask], atol=1e-5, rtol=0)
    for name, gradient in gradients["eager"].items():
        torch.testing.assert_close(gradients["sdpa"][name], gradient, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_gradient_checkpointing_changes_nothing_but_memory(processor, batch, make):
    results, passes = {}, {}
    for checkpointing in (False, True):
        model, seen = make(processor), []
        prepare_for_training(model, checkpointing)
        for layer in (model.model.language_model.layers[0].mlp, model.model.vision_tower.encoder.layers[0].ffn):
            layer.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        loss = supervised(model, batch)
        loss.backward()
        passes[checkpointing] = len(seen)
        results[checkpointing] = loss.detach(), {name: p.grad for name, p in model.named_parameters()}
    assert passes == {False: 2, True: 4}  # both parts are run again for their gradient
    (loss, gradients), (loss_again, gradients_again) = results[False], results[True]
    torch.testing.assert_close(loss_again, loss, atol=0, rtol=1e-6)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert (gradients_again[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


def two_steps(model, batch):
    """Two optimizer steps, as the trainers do them; the parameters after each."""
    prepare_for_training(model, gradient_checkpointing=False)
    optim = OptimSection(learning_rate=1e-2, lr_scheduler_type="constant", weight_decay=0.1)
    optimizer, states = make_optimizer(model, optim), [copy.deepcopy(model.state_dict())]
    for step in (1, 2):
        set_learning_rate(optimizer, optim, step, max_steps=2)
        optimizer.zero_grad()
        supervised(model, batch).backward()
        optimizer.step()
        states.append(copy.deepcopy(model.state_dict()))
    return states


def part_of(name):
    return next((part for part, prefix in PART_OF.items() if name.startswith(prefix)), "llm")


@pytest.mark.parametrize(
    "frozen", [[], ["tower"], ["adapter"], ["llm"], ["tower", "adapter"], ["tower", "llm"], ["adapter", "llm"]], ids=str
)
def test_freezing_keeps_exactly_the_frozen_parts(processor, batch, tmp_path, frozen):
    save_model(tmp_path, dense(processor), processor)
    model, _ = load_model(ModelSection(path=str(tmp_path), freeze=frozen), seed=0)
    for before, after in pairwise(two_steps(model, batch)):
        unchanged = {name for name in before if torch.equal(before[name], after[name])}
        assert unchanged == {name for name in before if part_of(name) in frozen}


def test_a_part_that_the_model_lacks_cannot_be_frozen(processor, tmp_path, monkeypatch):
    save_model(tmp_path, dense(processor), processor)
    monkeypatch.setitem(__import__("sail_rl.model.load").model.load.PARTS, "tower", ("elsewhere",))
    with pytest.raises(BadInput, match=r"model\.freeze = \[tower\]: SailVL2ForConditionalGeneration has no such part"):
        load_model(ModelSection(path=str(tmp_path), freeze=["tower"]), seed=0)


def test_each_picture_of_a_prompt_is_seen(processor):
    """The second picture replaced by the first, or both exchanged: every time other logits."""
    model, (text, images) = mixture(processor), (chats(processor)[2], pictures()[2])
    with torch.no_grad():
        one, other, third = (
            model(**processor(text=[text], images=order, return_tensors="pt")).logits[0, -1]
            for order in (images, images[:1] * 2, images[::-1])
        )
    for some, others in ((one, other), (one, third), (other, third)):
        assert not torch.allclose(some, others, atol=1e-3)
