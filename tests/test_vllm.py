"""The vLLM plugin: a real engine gives the answers and log-probabilities of transformers, for every form of picture."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import BIN, ROOT, SMALL, command
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm_serving_process import vllm_serve

import sail_rl.model  # noqa: F401
from rollouts import Prompt, Sampling
from rollouts.hf import HFEngine
from sail_rl.config_data import LoraSection
from sail_rl.data.example import make_example
from sail_rl.data.pictures import picture_row
from sail_rl.data.prompting import prompt_text, show_frames
from sail_rl.model.configuration_sail_vl2 import SailVL2Config
from sail_rl.model.load import PARTS
from sail_rl.model.lora import add_adapters, save_adapters
from sail_rl.model.modeling_sail_vl2 import SailVL2ForConditionalGeneration

pytestmark = pytest.mark.vllm

LENGTH = 40
QUESTION = "What is the sum of the numbers on the cards?"
MOE = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny checkpoint that reads cards, made by the real command; then it may cut pictures into tiles."""
    run = tmp_path_factory.mktemp("runs") / "sft"
    changes = ("trainer.max_steps=120", "data.reasoning=terse", "data.eval=null")
    result = command("sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", *changes, f"output_dir={run}")
    assert result.returncode == 0, result.stderr
    processor = AutoProcessor.from_pretrained(run / "final")
    processor.image_processor.max_patches = 6
    processor.save_pretrained(run / "final")
    return run / "final"


@pytest.fixture(scope="module")
def prompts(trained, tmp_path_factory):
    """Twenty cards of one tile; then one picture of two tiles, one of four, a video, two pictures, and text alone."""
    folder = tmp_path_factory.mktemp("pictures")
    processor = AutoProcessor.from_pretrained(trained)
    rows = [picture_row("validation", i, seed=0, families=("cards",), levels=(1,), forms=("sum",)) for i in range(20)]
    cards = [row["images"][0].resize((56, 56)) for row in rows]
    wide, square = cards[0].resize((112, 56)), cards[1].resize((112, 112))
    pictures = [*([card] for card in cards), [wide], [square], cards[:4], cards[:2], []]
    made = []
    for number, images in enumerate(pictures):
        shown = {"videos": [images]} if len(images) == 4 else {"images": images}
        example = make_example({"question": rows[number % 20]["question"], "answer": "0"} | shown, "", {}, Path())
        messages, images = show_frames(example, processor)
        text = prompt_text(messages, processor, "think")
        paths = [str(folder / f"{number}_{i}.png") for i in range(len(images))]
        for image, path in zip(images, paths, strict=True):
            image.save(path)
        made.append({"text": text, "images": paths})
    return made


def blank(prompts, folder):
    """The same prompts with grey pictures of the same sizes."""
    for number, path in enumerate({path for prompt in prompts for path in prompt["images"]}):
        Image.new("RGB", Image.open(path).size, "grey").save(folder / f"{number}.png")
    sizes = {Image.open(path).size: str(path) for path in folder.glob("*.png")}
    return [prompt | {"images": [sizes[Image.open(p).size] for p in prompt["images"]]} for prompt in prompts]


def ask_vllm(folder, model, rounds, adapter=None):
    """Answers of every round, from an engine in a process of its own."""
    request = {"model": str(model), "max_tokens": LENGTH, "rounds": rounds, "adapter": adapter and str(adapter)}
    (folder / "request.json").write_text(json.dumps(request))
    result = command("tests/vllm_answers.py", folder / "request.json", folder / "answers.json")
    assert result.returncode == 0, result.stderr[-5000:]
    answers = json.loads((folder / "answers.json").read_text())
    return [[answers.pop(0) for _ in prompts] for prompts in rounds]


def ask_transformers(model, processor, prompts):
    """(prompt, rollout) of each prompt, greedy, with the reference engine."""
    asked = []
    for prompt in prompts:
        images = [Image.open(path) for path in prompt["images"]]
        encoded = processor(text=[prompt["text"]], images=images or None, return_tensors="pt")
        inputs = {name: value for name, value in encoded.items() if name not in ("input_ids", "attention_mask")}
        asked.append(Prompt("", encoded["input_ids"][0].tolist(), model_inputs=inputs))
    engine = HFEngine(model.eval(), processor.tokenizer)
    return list(zip(asked, engine.generate(asked, 1, Sampling(LENGTH, temperature=0)), strict=True))


def assert_equal(answers, expected):
    """The same prompt tokens, the same text, and log-probabilities within 1e-3 (float32)."""
    for answer, (prompt, rollout) in zip(answers, expected, strict=True):
        assert answer["prompt_token_ids"] == prompt.token_ids
        assert answer["token_ids"] == rollout.token_ids
        assert answer["log_probs"] == pytest.approx(rollout.log_probs, abs=1e-3)


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def test_vllm_equals_transformers(trained, prompts, tmp_path):
    """Pictures of 1, 2 + 1 and 4 + 1 tiles, a video, two pictures; blank ones; and again, from the prefix cache."""
    (tmp_path / "blank").mkdir()
    rounds = [prompts, blank(prompts, tmp_path / "blank"), prompts]
    first, grey, again = ask_vllm(tmp_path, trained, rounds)
    model, processor = load(trained)
    tokens_per_prompt = [answer["prompt_token_ids"].count(processor.image_token_id) for answer in first]
    assert tokens_per_prompt == [4] * 20 + [12, 20, 16, 8, 0]
    assert_equal(first, ask_transformers(model, processor, prompts))
    assert_equal(grey, ask_transformers(model, processor, rounds[1]))
    for prompt, seen, unseen in zip(prompts, first, grey, strict=True):
        differs = max(abs(a - b) for a, b in zip(seen["log_probs"], unseen["log_probs"], strict=False)) > 1e-2
        assert differs == bool(prompt["images"])
    assert len({tuple(answer["token_ids"]) for answer in first}) > 10
    assert [answer["token_ids"] for answer in again] == [answer["token_ids"] for answer in first]
    assert sum(answer["cached_tokens"] for answer in again) > 0


def test_released_layout(trained, prompts, tmp_path):
    """vLLM loads a folder as SAIL-VL2 is released, with no processor that it could run."""
    result = command(BIN / "sail-rl", "convert", trained, tmp_path / "released", "--to", "released", launcher=())
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "released/config.json").read_text())["model_type"] == "sailvl"
    asked = prompts[-6:]
    (answers,) = ask_vllm(tmp_path, tmp_path / "released", [asked])
    assert_equal(answers, ask_transformers(*load(trained), asked))


def test_native_sizes(trained, prompts, tmp_path):
    """AnyRes: pictures of one, two and four tiles' size, and two of different sizes in one prompt."""
    model, processor = load(trained)
    processor.image_processor.any_resolution = True
    processor.image_processor.largest_side = 224
    model.save_pretrained(tmp_path / "native")
    processor.save_pretrained(tmp_path / "native")
    asked = [*prompts[-6:-3], *prompts[-2:]]
    asked[3] = asked[3] | {"images": [asked[1]["images"][0], asked[0]["images"][0]]}
    (answers,) = ask_vllm(tmp_path, tmp_path / "native", [asked])
    tokens_per_prompt = [answer["prompt_token_ids"].count(processor.image_token_id) for answer in answers]
    assert tokens_per_prompt == [4, 8, 16, 12, 0]
    assert_equal(answers, ask_transformers(model, processor, asked))


def test_lora_on_the_language_model(trained, prompts, tmp_path):
    """Adapters as a LoRA run leaves them in `final/adapter`, on the model that they were trained for."""
    model, processor = load(trained)
    add_adapters(model, LoraSection(r=8, lora_alpha=16), PARTS, str(trained), seed=0)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # fresh ones change nothing
            weight.data.normal_(std=0.05)
    save_adapters(tmp_path / "adapter", model)
    asked = prompts[-6:]
    (answers,) = ask_vllm(tmp_path, trained, [asked], tmp_path / "adapter")
    assert_equal(answers, ask_transformers(model, processor, asked))
    plain = ask_transformers(*load(trained), asked)
    for answer, (_, rollout) in zip(answers, plain, strict=True):
        assert answer["log_probs"] != pytest.approx(rollout.log_probs, abs=1e-2)


def test_mixture_of_experts(trained, prompts, tmp_path):
    """Random weights: the experts' own answers are compared, not sense."""
    dense, processor = load(trained)
    text = {k: v for k, v in dense.config.text_config.to_dict().items() if k != "model_type"}
    values = {"vision_config": dense.config.vision_config.to_dict(), "text_config": text | MOE}
    torch.manual_seed(0)
    model = SailVL2ForConditionalGeneration(
        SailVL2Config(**values, image_token_id=processor.image_token_id, image_seq_length=processor.image_seq_length)
    )
    model.load_state_dict({k: v for k, v in dense.state_dict().items() if "mlp" not in k}, strict=False)
    model.save_pretrained(tmp_path / "moe")
    processor.save_pretrained(tmp_path / "moe")
    asked = prompts[-6:]
    (answers,) = ask_vllm(tmp_path, tmp_path / "moe", [asked])
    assert_equal(answers, ask_transformers(model, processor, asked))


def test_serve_answers_an_openai_client(trained, prompts, tmp_path):
    """`vllm serve`, its engine in processes of its own; a picture as base64, the think block apart."""
    from openai import OpenAI

    options = ["--max-model-len", "512", "--reasoning-parser", "qwen3"]
    with vllm_serve(trained, tmp_path / "server.log", *options) as url:
        picture = base64.b64encode(Path(prompts[0]["images"][0]).read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "text", "text": re.search(r"\n(What.*\?) ", prompts[0]["text"])[1]},
        ]
        reply = OpenAI(base_url=url, api_key="none").chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=LENGTH,
            extra_body={"chat_template_kwargs": {"enable_thinking": True}},
        )
    ((_, rollout),) = ask_transformers(*load(trained), prompts[:1])
    message = reply.choices[0].message
    assert rollout.text.startswith("<think>")
    assert message.reasoning
    blocks = rollout.text.removeprefix("<think>").split("</think>")
    assert [message.reasoning, *filter(None, [message.content])] == blocks


@pytest.mark.slow
def test_a_checkpoint_is_served_while_its_run_goes_on(tmp_path):
    """It answers as in transformers, and the run has gone on meanwhile."""
    from openai import OpenAI

    run = tmp_path / "run"
    changes = [*SMALL, f"output_dir={run}", "trainer.max_steps=100000", "trainer.save_every=20"]
    begin = [sys.executable, "sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", *changes]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*begin, "trainer.save_total_limit=1000"], cwd=ROOT, env=environment) as trainer:
        end = time.monotonic() + 300
        while not (run / "checkpoints/latest").exists() and time.monotonic() < end:
            time.sleep(0.1)
        checkpoint = (run / "checkpoints/latest").resolve()
        with vllm_serve(checkpoint, tmp_path / "server.log", "--max-model-len", "512") as url:
            reply = OpenAI(base_url=url, api_key="none").completions.create(
                model="tiny", prompt=QUESTION, temperature=0, max_tokens=LENGTH
            )
        assert trainer.poll() is None
        trainer.send_signal(signal.SIGTERM)
    assert trainer.returncode == 75
    ((_, rollout),) = ask_transformers(*load(checkpoint), [{"text": QUESTION, "images": []}])
    assert reply.choices[0].text == rollout.text
    assert (run / "checkpoints/latest").resolve() != checkpoint
