"""FSDP2, ZeRO-2 and ZeRO-3 on two processes of one CPU (gloo), by the shipped launcher configurations: the same figures
and the same final weights as one process.
"""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import BIN, ONE, ROOT, SMALL, SMALL_GRPO, command
from safetensors.torch import load_file
from tiny_models import mixture, processor_for_questions
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import AutoModelForImageTextToText

import sail_rl.model  # noqa: F401  (registers SAIL-VL2 with the Auto classes)
from sail_rl.checkpoint import full_parameters, weight_names
from sail_rl.command_line import BadInput
from sail_rl.processes import deepspeed_mistakes, fsdp_mistakes, make_accelerator
from sail_rl.sharding import empty_copy

KINDS = {
    "fsdp2": ("FSDPPolicy", "FSDP2"),
    "zero2": ("DeepSpeedEngine", "ZeRO-2"),
    "zero3": ("DeepSpeedEngine", "ZeRO-3"),
}


# Beside them: plain processes, and the optimizer's states in main memory.
MORE_KINDS = KINDS | {
    "cpu_2": ("DistributedDataParallel", None),
    "zero2_offload": KINDS["zero2"],
    "zero3_offload": KINDS["zero3"],
}


def launcher(kind, folder, processes=2):
    """The shipped configuration of this kind, for so many processes; one process by plain Python."""
    if kind == "one":
        return ONE
    shipped = ROOT / f"recipes/accelerate/{kind.replace('zero2_offload', 'zero2')}.yaml"
    configuration = yaml.safe_load(shipped.read_text()) | {"num_processes": processes}
    if kind == "zero2_offload":
        configuration["deepspeed_config"]["offload_optimizer_device"] = "cpu"
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(configuration))
    return (str(BIN / "accelerate"), "launch", "--config_file", str(file), "--main_process_port", "0")


def run(kind, folder, arguments, name=None, processes=2):
    """Run a command under a kind of sharding into a folder of its own."""
    target = folder / (name or kind)
    result = command(*arguments, f"output_dir={target}", launcher=launcher(kind, folder, processes))
    assert result.returncode == 0, result.stderr[-4000:]
    environment = json.loads((target / "environment.json").read_text())
    if kind != "one":
        assert (environment["wrapper"], environment["sharding"]) == MORE_KINDS[kind]
        assert environment["processes"] == processes
    return target


def grpo(rows, model, *overrides):
    """A small GRPO run whose loss is far from zero: a KL term, and a second update on each step's rollouts."""
    common = ["sail_rl/train_grpo.py", "recipes/quickstart.yaml", *SMALL_GRPO, f"model={model}"]
    common += [f"rewards=[{{function: '{rows / 'mine.py'}:spread'}}]", f"data.train={rows / 'rows.jsonl'}"]
    # In the order of the file, the second process has rows of text alone in every step.
    common += ["data.shuffle=false", "update.mode=shared", "update.token_budget=100", "grpo.beta=0.1"]
    common += ["grpo.num_iterations=2", "optim.warmup_steps=0", "optim.lr_scheduler_type=constant"]
    return [*common, "optim.learning_rate=1e-3", *overrides]


def sft(rows, model, *overrides):
    """A small SFT run; shuffled, one of its steps is without pictures."""
    common = ["sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", *SMALL, "sft.samples_per_step=4"]
    common += ["data.reasoning=terse"]
    return [*common, f"model={model}", f"data.train={rows / 'rows.jsonl'}", *overrides]


def figures(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[r["loss"], r["grad_norm"], r["entropy"], r.get("kl") or 0.0] for r in records]


def assert_same_run(one, two, start, moved_by=1e-3, rel=1e-4, loss_off=1e-6):
    """The same figures, and final weights whose distance is a small share of how far training has moved them."""
    for ours, theirs in zip(figures(one), figures(two), strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=rel, abs=loss_off)
        assert ours[1:] == pytest.approx(theirs[1:], rel=rel, abs=1e-6)
        assert ours[1] > 0
    single, sharded = (load_file(folder / "final/model.safetensors") for folder in (one, two))
    assert sharded.keys() == single.keys()
    begun = load_file(start / "model.safetensors") if start else {name: 0 * single[name] for name in single}
    assert distance(single, sharded) < moved_by * distance(begun, single)
    loaded = AutoModelForImageTextToText.from_pretrained(two / "final").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in sharded.items() if name in loaded)


def distance(one, two):
    return sum((one[name] - two[name]).square().sum() for name in one).sqrt()


def lora(start, rank=4):
    return f"{{path: {start}, lora: {{r: {rank}, lora_alpha: 8, parts: [llm]}}}}"


@pytest.fixture(scope="module")
def one_process(start, mixed_rows, tmp_path_factory):
    """What all kinds are compared with, with gradient checkpointing."""
    arguments = grpo(mixed_rows, start, "trainer.gradient_checkpointing=true")
    return run("one", tmp_path_factory.mktemp("one"), arguments)


@pytest.mark.dist
@pytest.mark.parametrize("kind", KINDS)
def test_grpo_equals_one_process(kind, one_process, start, mixed_rows, tmp_path):
    """Shared rows in several micro-batches, a KL term, two updates a step, clipping."""
    sharded = run(kind, tmp_path, grpo(mixed_rows, start, "trainer.gradient_checkpointing=true"))
    assert figures(one_process)[0][1] > 1.0  # the gradient was clipped
    assert_same_run(one_process, sharded, start)


@pytest.mark.dist
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "fsdp2" else pytest.mark.slow) for kind in KINDS]
)
def test_lora_equals_one_process(kind, start, mixed_rows, tmp_path):
    """The tower is frozen and its features are kept; the reference is the sharded model without its adapters."""
    arguments = grpo(mixed_rows, lora(start), "trainer.gradient_checkpointing=true", "optim.learning_rate=1e-2")
    one, sharded = (run(one_kind, tmp_path, arguments) for one_kind in ("one", kind))
    assert_same_run(one, sharded, start)
    adapters = [load_file(folder / "final/adapter/adapter_model.safetensors") for folder in (one, sharded)]
    assert adapters[0].keys() == adapters[1].keys()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "overrides",
    [("update.mode=packed",), ("update.mode=padded",), ("model.freeze=[tower]", "update.mode=auto"), ("grpo.beta=0",)],
    ids=lambda overrides: overrides[0],
)
def test_other_layouts_equal_one_process(kind, overrides, start, mixed_rows, tmp_path):
    one, sharded = (
        run(one_kind, tmp_path, grpo(mixed_rows, f"{{path: {start}}}", *overrides)) for one_kind in ("one", kind)
    )
    assert_same_run(one, sharded, start)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sft_equals_one_process(kind, start, mixed_rows, tmp_path):
    one, sharded = (run(one_kind, tmp_path, sft(mixed_rows, start)) for one_kind in ("one", kind))
    assert_same_run(one, sharded, start)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("kind", MORE_KINDS)
@pytest.mark.parametrize("recipe", [grpo, sft], ids=["grpo", "sft"])
def test_three_steps_of_every_kind_equal_one_process(recipe, kind, processes, start, mixed_rows, tmp_path):
    """The losses within 1e-5, of a run that was ended after two steps and went on; and the final model is the same."""
    arguments = [*recipe(mixed_rows, start), "data.eval=null", "trainer.save_every=2"]
    one = run("one", tmp_path, [*arguments, "trainer.max_steps=3"])
    for steps in (2, 3):
        many = run(kind, tmp_path, [*arguments, f"trainer.max_steps={steps}"], processes=processes)
    for ours, theirs in zip(figures(one), figures(many), strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-6)
    assert len(figures(many)) == 3
    assert_same_run(one, many, start)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["tiny_qwen3_vl", "tiny_internvl"])
def test_other_families_equal_one_process(kind, family, mixed_rows, tmp_path):
    arguments = grpo(mixed_rows, f"{{random_init: {family}}}", "trainer.gradient_checkpointing=true")
    one, sharded = (run(one_kind, tmp_path, arguments) for one_kind in ("one", kind))
    assert_same_run(one, sharded, None, moved_by=1e-5)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_the_autocast_of_plain_processes(kind, start, mixed_rows, tmp_path):
    """Compared with two plain processes, whose micro-batches are the same; ZeRO-3 has linear layers that round anew."""
    (tmp_path / "ddp.yaml").write_text((ROOT / "recipes/accelerate/cpu_2.yaml").read_text())
    plain = (str(BIN / "accelerate"), "launch", "--config_file", str(tmp_path / "ddp.yaml"))
    arguments = grpo(mixed_rows, start, "trainer.mixed_precision=bf16", "trainer.max_steps=1", "grpo.num_iterations=1")
    result = command(*arguments, f"output_dir={tmp_path / 'ddp'}", launcher=plain)
    assert result.returncode == 0, result.stderr[-4000:]
    sharded = run(kind, tmp_path, arguments)
    (ours,), (theirs,) = figures(tmp_path / "ddp"), figures(sharded)
    assert ours == pytest.approx(theirs, rel=1e-4 if kind == "zero3" else 1e-6, abs=1e-6)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapters", [False, True])
def test_a_run_goes_on(kind, adapters, start, mixed_rows, tmp_path):
    """Halves equal a whole run. One process goes on with a checkpoint of FSDP2's and refuses DeepSpeed's."""
    arguments = grpo(mixed_rows, lora(start) if adapters else start, "data.eval=null")
    whole = run(kind, tmp_path, arguments)
    for steps in (1, 2):
        halves = run(kind, tmp_path, [*arguments, f"trainer.max_steps={steps}"], name="halves")
    assert_same_run(whole, halves, start, moved_by=1e-4, rel=1e-6)
    result = command(*arguments, "trainer.max_steps=3", f"output_dir={halves}", launcher=launcher("one", tmp_path))
    if kind == "fsdp2":
        assert result.returncode == 0, result.stderr[-4000:]
    else:
        assert result.returncode == 2
        assert f"was written by 2 processes with {KINDS[kind][1]}" in result.stderr


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapters", [False, True])
def test_weights_for_an_engine_are_whole(kind, adapters, start, tmp_path):
    """`full_parameters` on every process: the names and values that the model had before it was wrapped."""
    script = ROOT / "tests/sharded_process.py"
    result = command(script, start, adapters, tmp_path / "run", launcher=launcher(kind, tmp_path))
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("all weights are whole") == 2


def test_an_empty_copy_has_the_names_of_all_weights():
    """Those of a mixture's experts too, of which the model has one tensor a layer."""
    model = mixture(processor_for_questions())
    names = weight_names(model)
    assert names == {name for name, _ in full_parameters(model)}
    assert any("experts.2." in name for name in names)
    assert weight_names(empty_copy(model)) == names


def test_settings_that_do_not_fit_are_named():
    """The launcher's mistakes, each with its mending."""
    fsdp = {"cpu_ram_efficient_loading": True, "activation_checkpointing": True, "cpu_offload": CPUOffloadPolicy()}
    told = [mistake.split(":")[0] for mistake in fsdp_mistakes(SimpleNamespace(**fsdp))]
    assert told == ["fsdp_cpu_ram_efficient_loading", "fsdp_activation_checkpointing", "fsdp_offload_params"]
    config = {"bf16": {"enabled": True}, "fp16": {"enabled": "auto"}, "optimizer": {}}
    plugin = SimpleNamespace(zero_stage=1, offload_param_device="cpu", deepspeed_config=config)
    told = [mistake.split(":")[0] for mistake in deepspeed_mistakes(plugin)]
    assert told == ["zero_stage", "offload_param_device", "bf16", "optimizer"]


def test_the_first_fsdp_is_refused(monkeypatch):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match="fsdp_version: 2"):
        make_accelerator(None)
