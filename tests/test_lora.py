"""LoRA: which layers get adapters, what trains, merging, files, the starting model, resuming, both commands."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import SMALL_GRPO, command, forked
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import MODELS, completion_logits, groups, mixed_batch, processor_for_questions
from transformers import AutoModelForImageTextToText, InternVLConfig, InternVLForConditionalGeneration

from sail_rl.batch import make_batch
from sail_rl.before_update import MiniBatch
from sail_rl.checkpoint import full_parameters, save_model
from sail_rl.command_line import BadInput, load_recipe
from sail_rl.config import GrpoSection, OptimSection, RolloutSection, SftRecipe
from sail_rl.config_data import LoraSection, ModelSection
from sail_rl.data.stream import Shard
from sail_rl.launch import Run
from sail_rl.model.load import PARTS, load_model, prepare_for_training, starting_policy
from sail_rl.model.lora import adapters_off, add_adapters, load_adapters, lora_layers, merged, save_adapters
from sail_rl.optimizer import make_optimizer, set_learning_rate
from sail_rl.policy import Policy
from sail_rl.update import update_policy

pytestmark = pytest.mark.usefixtures("one_thread")
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj"}
LAYERS = {  # of the tiny models, by part: how many, and the names of the linear layers of each
    ("dense", "llm"): (3, ATTENTION | FEED_FORWARD),
    ("mixture of experts", "llm"): (3, ATTENTION),  # its experts are no linear layers, nor is its router
    ("dense", "tower"): (2, {"q_proj", "k_proj", "v_proj", "out_proj"} | FEED_FORWARD),
}
PREFIX = {"llm": "model.language_model.layers.", "tower": "model.vision_tower.encoder.layers."}


@pytest.fixture(scope="module")
def processor():
    return processor_for_questions()


@pytest.fixture(scope="module")
def batch(processor):
    return mixed_batch(processor)


@pytest.fixture(scope="module")
def base(processor, tmp_path_factory):
    """A saved model of each kind, which adapters are trained for."""
    folder = tmp_path_factory.mktemp("bases")
    for name, make in MODELS.items():
        save_model(folder / name, make(processor), processor)
    return folder


def adapted(base, kind="dense", parts=("llm",), **settings):
    lora = LoraSection(parts=list(parts), **settings)
    return load_model(ModelSection(path=str(base / kind), lora=lora), seed=0)[0].eval()


def unadapted(base, kind):
    return load_model(ModelSection(path=str(base / kind)), seed=0)[0].eval()


def trained(base, kind="dense", parts=("llm",), dtype="float32"):
    """With adapters that make a difference, as training would leave them."""
    section = ModelSection(path=str(base / kind), dtype=dtype, lora=LoraSection(r=4, lora_alpha=8, parts=list(parts)))
    model, generator = load_model(section, seed=0)[0].eval(), torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        weights = layer.lora_B["default"].weight.data
        weights.copy_(0.1 * torch.randn(weights.shape, generator=generator))
    return model


def logits_of(model, batch):
    with torch.no_grad():
        return completion_logits(model, batch)[batch.mask_BC.bool()]


def names_of_adapted(model):
    return {name for name, _ in lora_layers(model)}


@pytest.mark.parametrize(("kind", "parts"), [(kind, (part,)) for kind, part in LAYERS] + [("dense", ("tower", "llm"))])
def test_exactly_the_linear_layers_of_the_parts_get_adapters(base, batch, kind, parts):
    model, plain = adapted(base, kind, parts), unadapted(base, kind)
    assert torch.equal(logits_of(model, batch), logits_of(plain, batch))  # fresh adapters change nothing
    names = names_of_adapted(model)
    for part in parts:
        inside = {name.removeprefix(PREFIX[part]) for name in names if name.startswith(PREFIX[part])}
        count, leaves = LAYERS[kind, part]
        assert {(name.split(".")[0], name.split(".")[-1]) for name in inside} == {
            (str(number), leaf) for number in range(count) for leaf in leaves
        }
        names = {name for name in names if not name.startswith(PREFIX[part])}
    assert names == set()
    trained_names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained_names == {name for name, _ in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    assert {parameter.dtype for name, parameter in model.named_parameters()} == {torch.float32}


def test_internvl_has_the_same_parts():
    """A model of transformers' own, whose tower has other names."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "qwen3", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 99}
    config = InternVLConfig(vision_config=vision | {"image_size": [56, 56]}, text_config=text)
    for part, leaves in (("llm", 7), ("tower", 6)):
        model = InternVLForConditionalGeneration(config)
        add_adapters(model, LoraSection(parts=[part]), PARTS, "base", seed=0)
        assert len(names_of_adapted(model)) == leaves
        assert all(PARTS[part][0] in name for name in names_of_adapted(model))


def test_the_seed_decides_how_adapters_start(base):
    one, same = adapted(base).state_dict(), adapted(base).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    lora = LoraSection()
    other = load_model(ModelSection(path=str(base / "dense"), lora=lora), seed=1)[0].state_dict()
    assert all(torch.equal(one[name], other[name]) != (".lora_A." in name) for name in one)


@pytest.mark.parametrize("kind", MODELS)
def test_merged_weights_are_the_same_model(base, batch, kind):
    """What an engine is given, before it is laid out as in files: the base model's names, the adapted function."""
    model = trained(base, kind, ("llm",) if kind != "dense" else ("tower", "llm"))
    before, logits = copy.deepcopy(model.state_dict()), logits_of(model, batch)
    plain = AutoModelForImageTextToText.from_pretrained(base / kind)
    assert (logits - logits_of(plain, batch)).abs().max() > 0.1
    parameters = dict(merged(model, model.named_parameters()))
    assert parameters.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(parameters)
    torch.testing.assert_close(logits_of(plain, batch), logits, atol=1e-5, rtol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits_of(model, batch), logits)


def test_a_push_of_weights_makes_one_layer_at_a_time(base):
    """Merged layers are new tensors that nobody keeps; all the others are the model's own memory."""
    model = trained(base)
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    new = [name for name, tensor in full_parameters(model) if tensor.data_ptr() not in own]
    assert set(new) == {f"{name}.weight" for name in names_of_adapted(model)}
    assert iter(stream := full_parameters(model)) is stream


def test_weights_in_bfloat16_have_adapters_in_float32_and_are_rounded_once(base, batch):
    model = trained(base, dtype="bfloat16")
    layers = {f"{name}.weight": layer for name, layer in lora_layers(model)}
    weights = {name: tensor.bfloat16() for name, tensor in dense_weights(base).items()}
    rounded = {}
    for name, layer in layers.items():
        a, b = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
        assert a.dtype == b.dtype == torch.float32
        rounded[name] = (weights[name].float() + 2.0 * (b @ a).detach()).bfloat16()
    for name, tensor in full_parameters(model):
        torch.testing.assert_close(tensor, (weights | rounded)[name], atol=0, rtol=0, msg=name)
    assert logits_of(model, batch).dtype == torch.bfloat16


def dense_weights(base):
    return load_file(base / "dense/model.safetensors")


@pytest.mark.parametrize("kind", MODELS)
def test_the_final_folder_is_a_whole_model_with_its_adapters_beside_it(base, processor, batch, tmp_path, kind):
    model = trained(base, kind)
    save_model(tmp_path / "final", model, processor)
    logits = logits_of(model, batch)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "final")
    assert type(whole) is type(MODELS[kind](processor))
    torch.testing.assert_close(logits_of(whole, batch), logits, atol=3e-5, rtol=0)
    names = [load_file(folder / "model.safetensors").keys() for folder in (tmp_path / "final", base / kind)]
    assert names[0] == names[1]

    plain = unadapted(base, kind)
    peft_model = PeftModel.from_pretrained(plain, tmp_path / "final/adapter").eval()
    assert torch.equal(logits_of(peft_model, batch), logits)
    stored = load_file(tmp_path / "final/adapter/adapter_model.safetensors")
    layers = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in stored}
    assert {f"{name}.weight" for name in layers} <= dict(full_parameters(model)).keys()
    config = json.loads((tmp_path / "final/adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(base / kind), 4, 8)


def test_adapters_come_back_to_the_bit_and_others_are_refused(base, tmp_path):
    model = trained(base, parts=("tower", "llm"))
    save_adapters(tmp_path, model)
    again = load_model(
        ModelSection(path=str(base / "dense"), lora=LoraSection(r=4, lora_alpha=8, parts=["tower", "llm"])), 3
    )[0]
    load_adapters(tmp_path, again)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(BadInput, match=r"not those of the recipe's model\.lora; model\.vision_tower"):
        load_adapters(tmp_path, adapted(base))


def test_the_reference_is_the_starting_policy(base, batch):
    section = ModelSection(path=str(base / "dense"), lora=LoraSection(r=4, lora_alpha=8))
    policy, plain = trained(base), unadapted(base, "dense")
    before = logits_of(policy, batch)
    reference, start = starting_policy(section, 0, Policy(policy)), Policy(plain)(batch).log_probs_BT
    with adapters_off(reference):
        assert torch.equal(reference(batch).log_probs_BT, start)
    assert torch.equal(logits_of(policy, batch), before)
    assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in policy.named_parameters())
    copied = starting_policy(ModelSection(path=str(base / "dense")), 0, policy)
    assert torch.equal(copied(batch).log_probs_BT, start)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_trains_the_adapters_alone_and_the_kl_is_to_the_start(base, processor, checkpointing):
    """Two updates of train_grpo.py with a KL term, compared with a reference that is a model of its own."""
    grpo, optim = GrpoSection(beta=0.5), OptimSection(learning_rate=1e-2, lr_scheduler_type="constant")
    recipe = SimpleNamespace(grpo=grpo, optim=optim, rollout=RolloutSection())
    run, batches, figures = Run(recipe, None, Accelerator(cpu=True), Shard()), [make_batch(groups(processor))], {}
    section = ModelSection(path=str(base / "dense"), lora=LoraSection(parts=["tower", "llm"]))
    for how in ("adapters off", "a model of its own"):
        policy, _ = load_model(section, seed=0)
        prepare_for_training(policy, checkpointing)
        start, optimizer = copy.deepcopy(policy.state_dict()), make_optimizer(policy, optim)
        start_section = section if how == "adapters off" else ModelSection(path=section.path)
        reference = starting_policy(start_section, 0, Policy(policy))
        figures[how] = []
        for step in (1, 2, 3):
            set_learning_rate(optimizer, optim, step, 3)
            figures[how].append(update_policy(run, Policy(policy), reference, optimizer, [MiniBatch(batches, 9.0)], ()))
        unchanged = {name for name, tensor in policy.state_dict().items() if torch.equal(tensor, start[name])}
        assert unchanged == {name for name in start if ".lora_" not in name}
    assert figures["adapters off"] == figures["a model of its own"]
    kl = [one["kl"] for one in figures["adapters off"]]
    assert kl[0] == pytest.approx(0, abs=1e-9)
    assert kl[2] > 1e-4


REFUSED = {
    "frozen and adapted": ("{path: x, lora: {parts: [llm]}, freeze: [llm]}", "`freeze` and `lora.parts` both name llm"),
    "no checkpoint": ("{random_init: tiny, lora: {}}", "give `path` instead of `random_init`"),
    "no part": ("{path: x, lora: {parts: []}}", "model.lora.parts"),
    "another part": ("{path: x, lora: {parts: [adapter]}}", "model.lora.parts.0"),
    "peft's name missed": ("{path: x, lora: {alpha: 3}}", "did you mean"),
}


@pytest.mark.parametrize(("model", "told"), REFUSED.values(), ids=REFUSED)
def test_recipes_that_make_no_sense(model, told):
    with pytest.raises(BadInput, match="1 mistake") as mistake:
        load_recipe(SftRecipe, "recipes/quickstart_sft.yaml", [f"model={model}"])
    assert told in str(mistake.value)


def records(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in one.items() if "second" not in name} for one in found]


def run_command(script, *overrides, launcher=(sys.executable,)):
    result = command(script, *overrides, launcher=launcher)
    assert result.returncode == 0, result.stderr


SPREAD = "def spread(completions, **columns):\n    return [float(sum(map(ord, text)) % 11) for text in completions]\n"


def lora_run(script, recipe, start, folder, dropout):
    """Arguments of a small run with adapters in both parts, whose rewards differ within a group."""
    (folder / "mine.py").write_text(SPREAD)
    lora = f"{{r: 4, lora_alpha: 8, lora_dropout: {dropout}, parts: [llm, tower]}}"
    arguments = [f"sail_rl/{script}", f"recipes/{recipe}", f"model={{path: {start}, lora: {lora}}}", "data.eval=null"]
    arguments += ["optim.learning_rate=1e-2", "optim.lr_scheduler_type=constant", "optim.warmup_steps=0"]
    if script == "train_sft.py":
        return [*arguments, "trainer.max_steps=2", "sft.samples_per_step=4"]
    rewards = f"rewards=[{{function: '{folder / 'mine.py'}:spread'}}]"
    return [*arguments, *(part for part in SMALL_GRPO if "data.eval" not in part), rewards, "grpo.beta=0.1"]


def test_grpo_resumed_equals_an_uninterrupted_run(start, tmp_path):
    """With dropout and a KL term. Checkpoints hold adapters alone; the finished run holds the merged model."""
    common = lora_run("train_grpo.py", "quickstart.yaml", start, tmp_path, dropout=0.1)
    run_command(*common, f"output_dir={tmp_path / 'whole'}")
    run_command(*common, f"output_dir={tmp_path / 'halves'}", "trainer.max_steps=1")
    run_command(*common, f"output_dir={tmp_path / 'halves'}")
    assert records(tmp_path / "whole") == records(tmp_path / "halves")
    assert records(tmp_path / "whole")[1]["kl"] > 1e-5
    files = {file.name for file in (tmp_path / "halves/checkpoints/step_2").glob("*.safetensors")}
    assert files == {"adapter_model.safetensors"}
    one, two = (load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    before = load_file(start / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], one[name])}
    stored = load_file(tmp_path / "whole/final/adapter/adapter_model.safetensors")
    assert changed == {f"{name.removeprefix('base_model.model.').rsplit('.lora_', 1)[0]}.weight" for name in stored}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("script", "recipe"),
    [
        pytest.param("train_sft.py", "quickstart_sft.yaml", marks=pytest.mark.slow),
        ("train_grpo.py", "quickstart.yaml"),
    ],
)
def test_two_processes_equal_one(start, tmp_path, script, recipe):
    """SFT with gradient checkpointing; GRPO with a KL term, whose reference switches the adapters off and on."""
    common = lora_run(script, recipe, start, tmp_path, dropout=0.0)
    common += ["trainer.gradient_checkpointing=true"] if script == "train_sft.py" else []
    for processes, launcher in (("one", (sys.executable,)), ("two", forked(2))):
        run_command(*common, f"output_dir={tmp_path / processes}", launcher=launcher)
    assert json.loads((tmp_path / "two/environment.json").read_text())["wrapper"] == "DistributedDataParallel"
    for one, two in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        figures = [(record["loss"], record["grad_norm"], record["entropy"]) for record in (one, two)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-4, abs=1e-6)
        assert one["grad_norm"] > 0
