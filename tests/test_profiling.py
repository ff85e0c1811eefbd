"""The arithmetic behind MFU, against what torch counts; and the table and the trace of real runs."""

import gzip
import json

import pytest
import torch
from conftest import SMALL, SMALL_GRPO, command
from PIL import Image
from tiny_models import mixture, processor_for_questions
from torch.utils.flop_counter import FlopCounterMode

from rollouts import Prompt
from sail_rl.batch import Group
from sail_rl.config_data import LoraSection, ModelSection
from sail_rl.data.example import Example, conversation
from sail_rl.data.prompting import make_prompt
from sail_rl.flops import model_cost, patch_windows
from sail_rl.model.cpu_linear import use_torch
from sail_rl.model.load import PARTS, TINY, load_model
from sail_rl.model.lora import add_adapters
from sail_rl.profiling import peak_flops

SIZES = [(56, 56), (112, 56)]
COMPLETION = 12
TRAINED = {"all": {}, "frozen tower": {"freeze": ["tower"]}, "frozen llm": {"freeze": ["llm"]}}
TRAINED |= {"frozen tower and llm": {"freeze": ["tower", "llm"]}}


def counted_flops(model, prompt, backward: bool) -> float:
    """What torch counts over one unpadded row; attention written out, over all pairs of the row."""
    model.set_attn_implementation("eager")
    ids = torch.tensor([prompt.token_ids + [5] * COMPLETION])
    inputs = dict(prompt.model_inputs)
    if prompt.token_inputs:
        kinds = prompt.token_inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.tensor([kinds + [0] * COMPLETION])
    use_torch(model)  # torch counts no products of oneDNN
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, logits_to_keep=COMPLETION, use_cache=False, **inputs).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


def expected_flops(cost, prompt, backward: bool) -> float:
    """Our formula with the pairs that attention without a causal kernel computes."""
    row = len(prompt.token_ids) + COMPLETION
    total = 0.0
    for part, (tokens, pairs) in cost.work(Group(prompt, [[5] * COMPLETION])):
        pairs = row**2 if part is cost.parts[3] else pairs
        total += part.forward(tokens, pairs) + backward * part.backward(tokens, pairs)
    return total


def two_pictures(processor, sizes=SIZES) -> Prompt:
    images = tuple(Image.effect_noise(size, 50).convert("RGB") for size in sizes)
    example = Example("q", conversation({"question": "which is larger?"}, len(images)), images, {}, False)
    return make_prompt(example, processor, "think", 2000)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("family", TINY)
def test_the_formula_agrees_with_torch(family, trained):
    model, processor = load_model(ModelSection(random_init=family, **TRAINED[trained]), seed=0)
    prompt, cost = two_pictures(processor), model_cost(model)
    for backward in (False, True):
        counted = counted_flops(model, prompt, backward)
        assert expected_flops(cost, prompt, backward) == pytest.approx(counted, rel=0.02), (backward, counted)


def test_adapters_spare_the_gradient_of_the_weights():
    model, processor = load_model(ModelSection(random_init="tiny"), seed=0)
    full = model_cost(model)
    add_adapters(model, LoraSection(r=4), PARTS, "tiny", seed=0)
    prompt, cost = two_pictures(processor), model_cost(model)
    # In the first layer three of seven products need no gradient of their input: something, in a model of three layers.
    assert expected_flops(cost, prompt, True) == pytest.approx(counted_flops(model, prompt, True), rel=0.04)
    assert cost.backward([Group(prompt, [[5] * COMPLETION])]) < 0.75 * full.backward([Group(prompt, [[5]])])


def test_of_a_mixture_only_the_experts_that_read_a_token_count():
    processor = processor_for_questions()
    model, prompt = mixture(processor), two_pictures(processor)
    model.set_experts_implementation("eager")  # an expert after the other, each over its own tokens alone
    assert expected_flops(model_cost(model), prompt, True) == pytest.approx(
        counted_flops(model, prompt, True), rel=0.02
    )


def test_each_prompt_counts_once_and_each_completion_by_what_it_sees():
    model, processor = load_model(ModelSection(random_init="tiny"), seed=0)
    cost, prompt = model_cost(model), two_pictures(processor)
    length = len(prompt.token_ids)
    patches, tower, adapter, llm, head = (work for _, work in cost.work(Group(prompt, [[1, 1], [1, 1, 1]])))
    tiles = prompt.model_inputs["pixel_values"].shape[0]
    assert patches == (16 * tiles, 0)  # 56 pixels: 4 x 4 patches of 14
    assert tower == (16 * tiles, 256 * tiles)
    assert adapter == (4 * tiles, 0)
    assert llm == (length + 5, length * (length + 1) / 2 + 5 * length + 3 + 6)
    assert head == (5, 0)
    alone = cost.forward([Group(prompt, [[1] * 5])])
    assert alone < cost.forward([Group(prompt, [[1] * 5] * 4)]) < 4 * alone


def test_windows_of_attention_in_the_tower():
    pixels = torch.zeros(30, 3, 28, 28)
    native = {"pixel_values": pixels, "image_grids": torch.tensor([[2, 3], [4, 6]])}
    frames = {"pixel_values": torch.zeros(48, 7), "image_grid_thw": torch.tensor([[1, 4, 4], [2, 4, 4]])}
    assert patch_windows(Prompt("p", [1], model_inputs=native), 14) == [24, 96]
    assert patch_windows(Prompt("p", [1], model_inputs=frames), 14) == [16, 16, 16]
    assert patch_windows(Prompt("p", [1], model_inputs={"pixel_values": pixels}), 14) == [4] * 30
    assert patch_windows(Prompt("p", [1]), 14) == []


def test_the_peak_of_a_cpu_is_measured():
    peak, where = peak_flops(torch.device("cpu"))
    assert 1e9 < peak < 1e14
    assert "measured" in where


def trace_of(folder, steps: str) -> set[str]:
    """Names of what happened."""
    with gzip.open(folder / f"trace_steps_{steps}.json.gz", "rt") as file:
        return {event.get("name") for event in json.load(file)["traceEvents"]}


def table_of(folder) -> list[dict[str, str]]:
    """The table's rows by the names of its columns."""
    lines = [line for line in (folder / "table_from_step_1.md").read_text().splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_profile_of_a_grpo_run(start, tmp_path):
    overrides = (f"model={start}", f"output_dir={tmp_path}", "trainer.profile=true", "trainer.max_steps=3")
    result = command("sail_rl/train_grpo.py", "recipes/quickstart.yaml", *SMALL_GRPO, *overrides)
    assert result.returncode == 0, result.stderr
    rows = table_of(tmp_path / "profile")
    assert [row["step"] for row in rows] == ["1", "2*", "3*"]
    phases = ("data, s", "rollout, s", "reward, s", "update, s", "other, s")
    for row, line in zip(rows, (tmp_path / "metrics.jsonl").read_text().splitlines(), strict=True):
        assert sum(float(row[phase]) for phase in phases) == pytest.approx(float(row["step, s"]), abs=0.01)
        record = json.loads(line)
        assert 0 < record["mfu/step"] < 1
        assert row["MFU of step"] == f"{record['mfu/step']:.2%}"
        assert record["mfu/rollout"] > 0
        assert (record["mfu/update"] > 0) == (record["groups/dropped"] < record["groups/total"])
    names = trace_of(tmp_path / "profile", "2_to_3")
    assert {"data", "reward", "update", "aten::mm"} <= names
    assert (tmp_path / "profile/trace_steps_2_to_3.json.gz").stat().st_size < 20e6


def test_profile_of_an_sft_run_of_one_step(tmp_path):
    overrides = (f"output_dir={tmp_path}", "trainer.profile=true", "trainer.max_steps=1", "data.eval=null")
    result = command("sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", *SMALL, *overrides)
    assert result.returncode == 0, result.stderr
    (row,) = table_of(tmp_path / "profile")
    assert float(row["update, TFLOP"]) > 0
    assert not any("rollout" in name for name in row)
    assert "update" in trace_of(tmp_path / "profile", "1_to_1")
