"""SAIL-VL2 at its real sizes with random weights: forward, backward, generation; time, memory, tokens per second.

    .venv/bin/python benchmarks/real_sizes.py --size 2b --tiles 4 --completion 256        # one GPU, bfloat16
    .venv/bin/python benchmarks/real_sizes.py --size tiny                                 # any machine: a try

One prompt with a picture of that many tiles and a thumbnail; `--rows` completions are trained (each with its own copy
of the prompt, as the padded update has them) and as many are generated, greedily. Medians of `--rounds` after one more.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch import nn

from sail_rl.model.load import picture_corpus
from sail_rl.model.modeling_sail_vl2 import SailVL2ForConditionalGeneration
from sail_rl.model.sizes import LANGUAGE_MODELS, sail_vl2_config
from sail_rl.model.tiny import tiny_config, tiny_processor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    config = (
        tiny_config(tiny_processor(picture_corpus())) if arguments.size == "tiny" else sail_vl2_config(arguments.size)
    )
    with torch.device(DEVICE):
        model = SailVL2ForConditionalGeneration(config).to(getattr(torch, arguments.dtype))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = one_prompt(config, arguments.tiles + (arguments.tiles > 1), arguments.rows, model.dtype)
    figures = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "prompt_tokens": inputs["input_ids"].shape[1],
    }
    figures |= measured("train", lambda: train(model, inputs, arguments.completion), arguments.rounds)
    trained_tokens = arguments.rows * (figures["prompt_tokens"] + arguments.completion)
    figures["train/tokens_per_second"] = trained_tokens / figures["train/seconds"]
    model.gradient_checkpointing_disable()
    figures |= measured("generate", lambda: generate(model.eval(), inputs, arguments.completion), arguments.rounds)
    figures["generate/tokens_per_second"] = arguments.rows * arguments.completion / figures["generate/seconds"]
    print(json.dumps(vars(arguments) | machine() | figures, indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", *LANGUAGE_MODELS], default="2b")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16" if DEVICE.type == "cuda" else "float32"
    )
    parser.add_argument("--tiles", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--completion", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def one_prompt(config, tiles: int, rows: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same prompt in every row: a picture and a short question."""
    side = config.vision_config.image_size
    picture = torch.full((tiles * config.image_seq_length,), config.image_token_id)
    question = torch.randint(0, min(500, config.image_token_id), (64,))
    input_ids = torch.cat([picture, question]).expand(rows, -1).contiguous()
    pixel_values = torch.randn(tiles, 3, side, side, dtype=dtype).repeat(rows, 1, 1, 1)
    return {"input_ids": input_ids.to(DEVICE), "pixel_values": pixel_values.to(DEVICE)}


def train(model: nn.Module, inputs: dict[str, torch.Tensor], completion: int) -> None:
    """Forward and backward over prompt and completion."""
    written = torch.randint(0, 500, (inputs["input_ids"].shape[0], completion), device=DEVICE)
    row = inputs | {"input_ids": torch.cat([inputs["input_ids"], written], dim=1)}
    logits = model(**row, logits_to_keep=completion + 1, use_cache=False).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1).float(), written.flatten()).backward()
    model.zero_grad(set_to_none=True)


def generate(model, inputs: dict[str, torch.Tensor], completion: int) -> None:
    """Greedy completions of full length."""
    mask = torch.ones_like(inputs["input_ids"])
    length = {"max_new_tokens": completion, "min_new_tokens": completion}
    model.generate(**inputs, attention_mask=mask, **length, do_sample=False, pad_token_id=0)


def measured(name: str, work: Callable[[], None], rounds: int) -> dict[str, float]:
    """Median seconds after a first round that warms up, and the highest memory on a GPU."""
    seconds = []
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    figures = {f"{name}/seconds": statistics.median(seconds[1:])}
    if DEVICE.type == "cuda":
        figures[f"{name}/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return figures


def machine() -> dict[str, str]:
    """What it ran on."""
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()
