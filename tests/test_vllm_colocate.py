"""vLLM in this process, on a SAIL-VL2 with a mixture of experts: pushes, caches, pictures, the gate.

The first four tests are the traps of weight pushes and pictures: each shows what happens without the cure.
"""

import copy
import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import SMALL_GRPO, command
from families import FAMILIES, QWEN, qwen2_5_vl
from PIL import Image
from tiny_models import FILTERS, groups, mixture, processor_for_questions

import rollouts.vllm_colocate
import rollouts.vllm_compat
from rollouts import Filters, Sampling
from rollouts.hf import HFEngine
from sail_rl.batch import Group, make_batch
from sail_rl.checkpoint import full_parameters
from sail_rl.command_line import BadInput
from sail_rl.config import GrpoRecipe
from sail_rl.config_data import LoraSection
from sail_rl.data.stream import Shard
from sail_rl.engines import make_engine
from sail_rl.launch import Run
from sail_rl.model.load import PARTS, image_token_ids
from sail_rl.model.lora import add_adapters
from sail_rl.parity import check_parity
from sail_rl.policy import token_terms
from sail_rl.sharding import Whole

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(200)]

LENGTH, GROUP = 10, 3
CLOSE, FAR = 1e-4, 1e-2  # log-probabilities in float32
VALUES = {
    "model": {"random_init": "tiny"},
    "data": {"train": "pictures", "max_prompt_length": 400},
    "rollout": {"engine": "vllm_colocate", "max_completion_length": LENGTH, "batch_size": 6},
    "rewards": [{"function": "accuracy"}],
    "trainer": {"max_steps": 2},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, its engine, prompts with 0, 1 and 2 pictures, and a run around them."""
    folder = tmp_path_factory.mktemp("run")
    processor = processor_for_questions()
    model = mixture(processor)
    suppressed = image_token_ids(model, processor)
    prompts = [replace(group.prompt, seed=number) for number, group in enumerate(groups(processor))]
    run = Run(GrpoRecipe(output_dir=str(folder), **VALUES), folder, Accelerator(cpu=True), Shard())
    engine = make_engine(run, Whole(model, nullcontext), processor, suppressed)
    with pytest.raises(RuntimeError, match="lacks weights"):
        engine.generate(prompts, 1, Sampling(LENGTH))
    yield SimpleNamespace(
        model=model, processor=processor, engine=engine, prompts=prompts, suppressed=suppressed, run=run
    )
    engine.close()


@pytest.fixture
def model(world):
    """A model that a test may change, as the engine has it."""
    world.engine.load_weights(full_parameters(world.model), 0)
    return copy.deepcopy(world.model)


def gap(world, model, temperature=1.0, prompts=None, filters=Filters(), trainer=None):  # noqa: B008
    """How far the engine's log-probabilities are from the model's, at most."""
    prompts = prompts or world.prompts
    rollouts = world.engine.generate(prompts, GROUP, Sampling(LENGTH, temperature, seed=3, filters=filters))
    worst = 0.0
    for number, prompt in enumerate(prompts):
        group = rollouts[number * GROUP : (number + 1) * GROUP]
        batch = make_batch([Group(prompt, [r.token_ids for r in group], log_probs=[r.log_probs for r in group])])
        with torch.no_grad():
            terms = token_terms(model, batch, temperature or 1.0, world.suppressed, filters=trainer or filters)
        worst = max(worst, float(((terms.log_probs_BT - batch.engine_log_probs_BC) * batch.mask_BC).abs().max()))
    return worst


def change(model, part):
    """Other weights, of a part or of all."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if part in name:
            weight.data += torch.randn_like(weight) * weight.std() * 0.5


def test_trap_1_a_push_after_the_start(world, model, monkeypatch):
    """Layers have been packed for the CPU: vLLM's load_weights fails, and its reload leaves experts unpacked."""
    change(model, "")
    assert gap(world, model) > FAR
    with pytest.raises((AttributeError, AssertionError), match=r"weight_loader|into parameter"):
        world.engine.llm.apply_model(lambda engine_model: engine_model.load_weights(full_parameters(model)))
    with monkeypatch.context() as patch:
        patch.setattr(rollouts.vllm_compat, "pack_experts", lambda model: None)
        world.engine.load_weights(full_parameters(model), 1)
        assert gap(world, model) > FAR
    for version in (1, 2):
        world.engine.load_weights(full_parameters(model), version)
        assert gap(world, model) < CLOSE
        assert gap(world, model, temperature=0.7) < CLOSE
    assert world.engine.generate(world.prompts, 1, Sampling(2))[0].weight_version == 2


def test_trap_2_caches_of_old_weights(world, model, monkeypatch):
    """Prefixes, and of a picture that was seen before its features: both are the old weights' unless all is reset.

    vLLM 0.31's reload resets a part of it, which is put out of the way here.
    """
    engine = world.engine
    (runner,) = engine.llm.collective_rpc(lambda worker: worker.model_runner)
    # Longer than a block of the prefix cache.
    prompts = [replace(prompt, token_ids=prompt.token_ids + 20 * list(range(70, 78))) for prompt in world.prompts]
    for left_out in (("reset_prefix_cache",), ("reset_mm_cache", "reset_encoder_cache")):
        engine.load_weights(full_parameters(world.model), 0)
        assert gap(world, world.model, prompts=prompts) < CLOSE
        other = copy.deepcopy(model)
        change(other, "vision_tower")
        with monkeypatch.context() as patch:
            for name in left_out:
                owners = (engine.llm, engine.llm.llm_engine, runner)
                for owner in (owner for owner in owners if hasattr(owner, name)):
                    patch.setattr(owner, name, lambda: None)
            engine.load_weights(full_parameters(other), 1)
            assert gap(world, other, prompts=prompts) > FAR
        engine.load_weights(full_parameters(other), 1)
        assert gap(world, other, prompts=prompts) < CLOSE


def test_trap_3_picture_tokens_are_expanded_once(world, model, monkeypatch):
    for prompt in world.prompts:
        assert world.engine.receive(prompt).token_ids == prompt.token_ids
    with monkeypatch.context() as patch:
        patch.setattr(
            rollouts.vllm_colocate, "collapsed", lambda token_ids, _: (token_ids, len(world.prompts[1].images))
        )
        assert len(world.engine.receive(world.prompts[1]).token_ids) > len(world.prompts[1].token_ids)
        with pytest.raises(BadInput, match=r"image tokens: \d+ reached the engine, the trainer has 4"):
            gate(world, model, world.prompts[1:2])


def test_trap_4_picture_tokens_are_never_written(world, model, monkeypatch):
    """Even where the model wants nothing else."""
    likeliest = world.engine.generate(world.prompts[:1], 1, Sampling(1, temperature=0))[0].token_ids[0]
    head = model.lm_head.weight.data
    head[world.suppressed] = 3 * head[likeliest]
    world.engine.load_weights(full_parameters(model), 1)
    sampling = Sampling(LENGTH, seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(world.engine, "bias", {})
        assert written(world.engine.generate(world.prompts, 4, sampling)) & set(world.suppressed)
    assert not written(world.engine.generate(world.prompts, 4, sampling)) & set(world.suppressed)
    assert gap(world, model) < CLOSE


def written(rollouts):
    return {token for rollout in rollouts for token in rollout.token_ids}


def test_greedy_answers_are_those_of_the_reference_engine(world, model):
    reference = HFEngine(model, world.processor.tokenizer, world.suppressed)
    reference.load_weights(iter(()), 0)
    sampling = Sampling(LENGTH, temperature=0)
    expected = reference.generate(world.prompts, 2, sampling)
    for ours, theirs in zip(world.engine.generate(world.prompts, 2, sampling), expected, strict=True):
        assert replace(ours, log_probs=[]) == replace(theirs, log_probs=[])
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=CLOSE)


def test_groups_are_told_as_they_are_finished(world, model):
    """Each once, and the first of them while others are still written: they have no room at the same time."""
    told, left = {}, []

    def finished(place, group):
        assert place not in told
        told[place] = group
        left.append(world.engine.llm.llm_engine.get_num_unfinished_requests())

    sampling = Sampling(LENGTH, seed=1)
    rollouts = world.engine.generate(world.prompts, 6, sampling, finished)
    assert [told[place] for place in range(3)] == [rollouts[6 * place :][:6] for place in range(3)]
    assert left[0] > left[-1]
    assert rollouts == world.engine.generate(world.prompts, 6, sampling)


def test_a_completion_does_not_depend_on_its_batch(world, model):
    def tokens(prompts, size=GROUP, seed=1):
        return [r.token_ids for r in world.engine.generate(prompts, size, Sampling(LENGTH, seed=seed))]

    together = tokens(world.prompts)
    assert len({tuple(ids) for ids in together}) == len(together)
    assert tokens(world.prompts) == together
    assert [ids for prompt in world.prompts for ids in tokens([prompt])] == together
    assert sorted(tokens(world.prompts[::-1])) == sorted(together)
    assert tokens(world.prompts, size=2) == [ids for i, ids in enumerate(together) if i % GROUP < 2]
    for others in (tokens(world.prompts, seed=2), tokens([replace(p, seed=p.seed + 9) for p in world.prompts])):
        assert all(one != other for one, other in zip(together, others, strict=True))


def test_nothing_is_remembered_from_one_call_to_the_next(world, model):
    """A resumed run, whose gate asks other prompts first, would be rounded otherwise than one that was not stopped."""
    world.engine.load_weights(full_parameters(model), 0)
    seen = []
    for _ in range(2):
        with rollouts.vllm_compat.pixels_noted(world.engine.llm) as read:
            world.engine.generate(world.prompts, 1, Sampling(max_completion_length=2, temperature=0))
        seen.append(sum(map(len, read)))
    assert seen[0] == seen[1] > 0


@pytest.mark.parametrize("name", FILTERS)
def test_filters_are_the_trainers(world, model, name):
    """vLLM cuts off what the trainer cuts off, and its penalty falls on the same tokens."""
    for temperature in (1.0, 0.7):
        assert gap(world, model, temperature, filters=FILTERS[name]) < CLOSE
    assert gap(world, model, filters=FILTERS[name], trainer=Filters()) > FAR


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_stop_texts_end_a_completion(world, model, temperature):
    """As in the reference engine, where the draws are the same: at temperature 0."""
    sampling = Sampling(LENGTH, temperature, seed=1)
    full = world.engine.generate(world.prompts, 1, sampling)
    decode = partial(world.processor.tokenizer.decode, skip_special_tokens=True)  # no stop text has special tokens
    text = decode(full[2].token_ids[2:4])[1:]
    stopping = replace(sampling, stop=(text, "never written"))
    stopped = world.engine.generate(world.prompts, 1, stopping)
    heads = (full[2].token_ids[:n] for n in range(1, 5))
    shortest = next(head for head in heads if text in decode(head))
    assert (stopped[2].finish_reason, stopped[2].token_ids) == ("stop", shortest)
    reference = HFEngine(model, world.processor.tokenizer, world.suppressed)
    reference.load_weights(iter(()), 0)
    if temperature == 0:
        expected = reference.generate(world.prompts, 1, stopping)
        assert [replace(r, log_probs=[]) for r in stopped] == [replace(r, log_probs=[]) for r in expected]


def test_a_penalty_changes_greedy_answers_alike(world, model):
    sampling = Sampling(LENGTH, temperature=0, filters=FILTERS["repetition_penalty"])
    reference = HFEngine(model, world.processor.tokenizer, world.suppressed)
    written = [engine.generate(world.prompts, 1, sampling) for engine in (world.engine, reference)]
    for ours, theirs in zip(*written, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=CLOSE)
    assert written[0] != world.engine.generate(world.prompts, 1, Sampling(LENGTH, temperature=0))


def test_end_tokens_end_a_completion(world, model, monkeypatch):
    sampling = Sampling(LENGTH, temperature=0)
    full = world.engine.generate(world.prompts, 1, sampling)[1]
    assert full.finish_reason == "length"
    monkeypatch.setattr(world.engine, "end_token_ids", [full.token_ids[3]])
    ended = world.engine.generate(world.prompts, 1, sampling)[1]
    length = full.token_ids.index(full.token_ids[3]) + 1
    assert (ended.finish_reason, ended.token_ids) == ("stop", full.token_ids[:length])


def test_a_half_done_push(world, model):
    """An engine with weights of two steps says so instead of writing; a whole push puts it right."""

    def broken():
        for number, pair in enumerate(full_parameters(model)):
            if number == 20:
                raise OSError("the connection was lost")
            yield pair

    change(model, "")
    with pytest.raises(OSError, match="the connection was lost"):
        world.engine.load_weights(broken(), 1)
    with pytest.raises(RuntimeError, match="lacks weights: a push did not end"):
        world.engine.generate(world.prompts, 1, Sampling(LENGTH))
    world.engine.load_weights(full_parameters(model), 1)
    assert gap(world, model) < CLOSE


@pytest.mark.timeout(100)
def test_an_error_while_writing_leaves_nothing_behind(world, model, monkeypatch):
    """vLLM would go on with what is left of the requests in every later call, for ever."""
    (runner,) = world.engine.llm.collective_rpc(lambda worker: worker.model_runner)
    own, calls = runner.execute_model, []

    def out_of_memory(*arguments, **keywords):
        calls.append(None)
        if len(calls) == 4:  # some are read, some written
            raise MemoryError("no room")
        return own(*arguments, **keywords)

    sampling = Sampling(LENGTH, seed=1)
    expected = world.engine.generate(world.prompts, GROUP, sampling)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "execute_model", out_of_memory)
        with pytest.raises(MemoryError, match="no room"):
            world.engine.generate(world.prompts, GROUP, sampling)
    long = replace(world.prompts[1], token_ids=world.prompts[1].token_ids + [70] * 1000)
    with pytest.raises(Exception, match="maximum context length is 410"):
        world.engine.generate([world.prompts[0], long], GROUP, sampling)
    assert not world.engine.llm.llm_engine.has_unfinished_requests()
    assert world.engine.generate(world.prompts, GROUP, sampling) == expected
    assert world.engine.receive(world.prompts[1]).token_ids == world.prompts[1].token_ids


def test_names_that_are_missing_or_unknown(world, model):
    skipped = "model.language_model.layers.1.mlp.experts.2.up_proj.weight"
    pushed = [(name, tensor) for name, tensor in full_parameters(model) if name != skipped]
    with pytest.raises(ValueError, match=f"weights of version 4: {skipped} did not come"):
        world.engine.load_weights(iter(pushed), 4)
    with pytest.raises(RuntimeError, match="lacks weights"):
        world.engine.generate(world.prompts, 1, Sampling(LENGTH))
    with pytest.raises(ValueError, match=r"the engine's model has no weight model\.other"):
        world.engine.load_weights(iter([*pushed, ("model.other", torch.zeros(1))]), 4)


def test_adapters_are_merged_on_the_way(world, model):
    add_adapters(model, LoraSection(r=4), PARTS, "", seed=0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # fresh ones change nothing
            weight.data.normal_(std=0.1)
    assert gap(world, model) > FAR
    world.engine.load_weights(full_parameters(model), 1)
    assert gap(world, model) < CLOSE


def gate(world, model, prompts):
    """The gate of train_grpo.py on these prompts."""
    questions = [SimpleNamespace(prompt=prompt) for prompt in prompts]
    stream = SimpleNamespace(position=5, next_items=lambda count: questions)
    check_parity(world.run, Whole(model, nullcontext), world.engine, stream, world.suppressed)
    assert stream.position == 5


def test_the_gate_lets_equals_through(world, model, capsys):
    gate(world, model, world.prompts)
    assert "parity with the engine: log-probabilities" in capsys.readouterr().out


def test_the_gate_names_a_wrong_picture(world, model):
    prompt = world.prompts[1]
    grey = replace(prompt, images=(Image.new("RGB", prompt.images[0].size, "grey"),))
    with pytest.raises(BadInput, match="pictures: the engine's model reads other pixels") as caught:
        gate(world, model, [world.prompts[0], grey])
    assert "log-probabilities: engine and trainer are" in str(caught.value)
    assert "tokens:" not in str(caught.value)


def test_the_gate_names_a_wrong_chat_template(world, model, monkeypatch):
    """The engine is told the question by a template with a system turn."""
    prompt, own = world.prompts[0], rollouts.vllm_colocate.request
    turns = [{"role": "system", "content": "add them"}, {"role": "user", "content": prompt.id}]
    text = world.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    other = replace(prompt, token_ids=world.processor.tokenizer(text)["input_ids"])
    assert other.token_ids[-3:] == prompt.token_ids[-3:]
    monkeypatch.setattr(rollouts.vllm_colocate, "request", lambda _, picture: own(other, picture))
    with pytest.raises(BadInput, match=r"prompt tokens: \d+ reached the engine .* from token \d+") as caught:
        gate(world, model, [prompt])
    assert "pictures" not in str(caught.value)


def test_the_gate_names_a_stale_weight(world, model):
    """One tensor that is pushed with its old value: names and numbers of tensors are right."""
    stale = dict(full_parameters(copy.deepcopy(model)))
    change(model, "")
    one = "model.language_model.layers.0.self_attn.v_proj.weight"
    pushed = ((name, stale[name] if name == one else tensor) for name, tensor in full_parameters(model))
    world.engine.load_weights(pushed, 1)
    with pytest.raises(BadInput, match="log-probabilities: engine and trainer are") as caught:
        gate(world, model, world.prompts)
    assert "prompt" not in str(caught.value).split("log-probabilities")[0]


def test_the_quickstart_with_vllm(start, tmp_path):
    """The real command, two steps: parity in every record, also after the push of the first step's weights."""
    (tmp_path / "mine.py").write_text(
        "def spread(completions, **columns):\n    return [float(sum(map(ord, text)) % 11) for text in completions]\n"
    )
    changes = [*SMALL_GRPO, f"model={start}", "rollout.engine=vllm_colocate", "optim.learning_rate=1e-2"]
    changes += [f"rewards=[{{function: '{tmp_path / 'mine.py'}:spread'}}]", "optim.warmup_steps=0"]
    result = command("sail_rl/train_grpo.py", "recipes/quickstart.yaml", *changes, f"output_dir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr[-5000:]
    assert "parity with the engine" in result.stdout
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        assert 0 < record["parity/mean"] <= record["parity/p99"] <= record["parity/max"] < CLOSE
        assert record["parity/ratio_min"] <= 1 <= record["parity/ratio_max"]
        assert record["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    """Fresh weights of every family pass the gate, and agree at every step; more than a tile where there are tiles."""
    start = f"{{random_init: {family}}}"
    if family == "qwen2_5_vl":  # which has no built-in tiny model
        start = str(tmp_path / "start")
        for part in qwen2_5_vl():
            part.save_pretrained(start)
    changes = [*SMALL_GRPO, "rollout.engine=vllm_colocate", f"model={start}", "grpo.beta=0.1"]
    changes += [] if family in QWEN else ["model.max_tiles=4"]
    result = command("sail_rl/train_grpo.py", "recipes/quickstart.yaml", *changes, f"output_dir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr[-5000:]
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(record["parity/max"] < CLOSE for record in records)
