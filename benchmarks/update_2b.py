"""One policy update of SAIL-VL2-2B at its real sizes on one GPU: ours by form and kernel against TRL 1.16's.

    python benchmarks/update_2b.py [--short] [--json PATH]            (three minutes on an H200, 115 GiB at the most)

Random weights in float32 under bfloat16 autocast, activations computed again for the gradient, as recipes/rlvr.yaml has
it; eight completions of a prompt, evenly spread from 0.4 of the longest. All sides train the one model with the one
AdamW, whose rate is 0. Timed are log-probabilities, loss, backward, clip and step. `needed` is the MFU that
sail_rl/profiling.py tells, each prompt counted once; `done` counts what the side's own layout computes, and again.
In the first cell each side's gradient is also told by its distance from that of padded rows in float32. Where liger
is installed, its kernels then replace the model's for all sides, and the fastest of them are measured once more.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import device_name, machine, markdown, prepare_process, results_file, save

# Tokens of the prompt, of the longest completion; tiles of its picture, of 256 tokens, its thumbnail aside.
CELLS = ((800, 256, 2), (1344, 1024, 4), (3392, 512, 12))
ROUNDS, SHORT_ROUNDS = 3, 2
TILE_SIDE, TOKENS_PER_TILE, MOST_TILES = 448, 256, 12
# Name -> form (None: TRL), kernel, whether activations are computed again.
SIDES: dict[str, tuple[Any, str, bool]] = {
    "trl": (None, "sdpa", True),
    "trl, nothing recomputed": (None, "sdpa", False),
    "padded": ("padded", "sdpa", True),
    "packed, varlen": ("packed", "varlen", True),
    "shared, sdpa": ("shared", "sdpa", True),
    "shared, varlen": ("shared", "varlen", True),
    "shared, flex": ("shared", "flex", True),
    "shared, varlen, nothing recomputed": ("shared", "varlen", False),
}
WITH_LIGER = ("trl", "trl, nothing recomputed", "shared, varlen", "shared, varlen, nothing recomputed")
NOT_ON_CPU = ("varlen", "flex")
COLUMNS = {
    "prompt": "prompt",
    "completion": "completion up to",
    "liger": "liger",
    "side": "side",
    "seconds": "seconds",
    "ratio_vs_trl": "times faster than TRL",
    "theory_vs_trl": "FLOP theory",
    "peak_gib": "peak GiB",
    "needed": "MFU, needed",
    "done": "MFU, done",
    "distance": "gradient's distance from float32",
}


def main() -> None:
    """Measure the cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one cell, two rounds")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # the scaled-down model: a try on a CPU
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prepare_process()
    import torch
    from accelerate import Accelerator

    from sail_rl.model.liger import use_liger

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    accelerator = Accelerator(mixed_precision="bf16", cpu=device == "cpu")
    processor = real_processor()
    policy = real_model(processor, device, arguments.tiny)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, fused=True)
    result: dict[str, Any] = {"machine": machine() | {"device": device_name()}, "rows": []}
    cells = ((800, 24, 2),) if arguments.tiny else CELLS[:1] if arguments.short else CELLS
    for liger in (False, True) if device == "cuda" and find_spec("liger_kernel") else (False,):
        if liger:
            use_liger(policy)
        for cell in cells:
            world = make_world(processor, policy, *cell)
            sides = make_sides(world, policy, optimizer, accelerator, WITH_LIGER if liger else tuple(SIDES))
            distances = gradient_distances(world, policy, sides) if cell == CELLS[0] and not liger else {}
            rows = measure(world, sides, SHORT_ROUNDS if arguments.short else ROUNDS, distances)
            result["rows"] += [row | {"liger": "yes" if liger else "no"} for row in rows]
            save(arguments.json or results_file("update_2b", arguments.short), result, report(result))


def real_processor():
    """448 pixels a tile and 256 tokens for it; the tokenizer is a small one, whose ids the model's table holds."""
    from benchmarks.scaled_model import FILLER, QUESTION
    from sail_rl.model.processing_sail_vl2 import SailVL2Processor, tiling_image_processor
    from sail_rl.model.tiny import tiny_tokenizer

    image_processor = tiling_image_processor(TILE_SIDE, MOST_TILES)
    return SailVL2Processor(image_processor, tiny_tokenizer([QUESTION + FILLER] * 3), TOKENS_PER_TILE)


def real_model(processor, device: str, tiny: bool):
    """SAIL-VL2-2B with random weights."""
    import torch

    from benchmarks.scaled_model import TEXT, VISION
    from sail_rl.model.modeling_sail_vl2 import SailVL2ForConditionalGeneration
    from sail_rl.model.sizes import sail_vl2_config

    config = sail_vl2_config("2b", processor.image_token_id)
    if tiny:
        config.text_config = type(config.text_config)(**TEXT | {"vocab_size": config.text_config.vocab_size})
        config.vision_config = type(config.vision_config)(**VISION | {"image_size": TILE_SIDE, "use_head": False})
    for name in ("eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(processor.tokenizer, name))
    torch.manual_seed(0)
    with torch.device(device):
        model = SailVL2ForConditionalGeneration(config).float()
    model.lm_head.weight.data *= 3  # far from uniform, as a trained model is
    return model


def make_world(processor, policy, prompt: int, completion: int, tiles: int):
    """One group for the model."""
    import numpy as np
    import torch

    from benchmarks.scaled_model import Cell, World, exact_prompt, random_rollouts

    cell, rng = Cell(prompt, completion, tiles=tiles), np.random.default_rng(0)
    first, question = exact_prompt(processor, cell, rng, TILE_SIDE)
    rollouts = random_rollouts(cell, processor, rng)
    rewards_N = torch.from_numpy(rng.random(cell.size, dtype=np.float32))
    return World(cell, processor, policy, [first], [question], rollouts, rewards_N)


def make_sides(world, policy, optimizer, accelerator, names: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Every side as a call that computes one update, and returns when the device has."""
    from sail_rl.model.segment_kernels import IMPLEMENTATIONS

    steps: dict[tuple, Callable[[], Any]] = {}
    sides = {}
    for name in names:
        form, kernel, recomputed = SIDES[name]
        if accelerator.device.type == "cpu" and kernel in NOT_ON_CPU:
            continue
        if (form, kernel) not in steps:
            steps[form, kernel] = make_step(world, policy, optimizer, accelerator, form, kernel)
        attention = IMPLEMENTATIONS[kernel] if form in ("packed", "shared") else "sdpa"
        sides[name] = ready(policy, attention, recomputed, steps[form, kernel])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return sides


def make_step(world, policy, optimizer, accelerator, form, kernel: str) -> Callable[[], Any]:
    """The update of TRL, or ours in a form."""
    from benchmarks.contestants import our_contestant, trl_contestant

    if form is None:
        on_cpu = accelerator.device.type == "cpu"
        return trl_contestant(world, policy, optimizer, use_cpu=on_cpu, bf16=True, learning_rate=0.0).step
    ours = our_contestant(
        world,
        form,
        optimizer_of=lambda *unused: optimizer,
        accelerator=accelerator,
        policy=policy,
        attention=kernel,  # type: ignore[arg-type]
        trainer={"mixed_precision": "bf16"},
    )
    return ours.step


def ready(policy, attention: str, recomputed: bool, step: Callable[[], Any]) -> Callable[[bool], Any]:
    """A side's step on the model that all share: told `False` it only makes the model its own."""

    def call(run: bool = True) -> Any:
        if not run:
            policy.set_attn_implementation({"text_config": attention})
            policy.gradient_checkpointing_disable()
            if recomputed:
                policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return None
        outcome = step()
        synchronize()
        return outcome

    return call


def synchronize() -> None:
    """Wait for the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gradient_distances(world, policy, sides: Mapping[str, Callable[..., Any]]) -> dict[str, float]:
    """How far each side's gradient points from that of padded rows in float32."""
    expected, distances = float32_gradient(world, policy, "padded"), {}
    distances["shared, sdpa, float32"] = distance(float32_gradient(world, policy, "shared"), expected)
    for name, side in sides.items():
        side(False)
        side()
        distances[name] = distance(gradient_of(policy), expected)
    print(f"gradients, by their distance from padded rows in float32: {distances}", flush=True)
    return distances


def float32_gradient(world, policy, form) -> list:
    """On-policy it is that of the log-probabilities, weighted by the advantages."""
    from sail_rl.advantage import group_advantages
    from sail_rl.batch import Group, make_batch
    from sail_rl.model.load import prepare_for_training
    from sail_rl.policy import Policy

    prepare_for_training(policy, gradient_checkpointing=True)
    advantages = group_advantages(world.rewards_N, world.cell.size, "group").values_N.tolist()
    members = [Group(world.prompts[0], [rollout.token_ids for rollout in world.rollouts], advantages)]
    batch = make_batch(members, form).to(policy.device)
    policy.zero_grad()
    terms = Policy(policy)(batch)
    (-terms.log_probs_BT * batch.mask_BC * batch.advantages_B[:, None]).sum().backward()
    return gradient_of(policy)


def gradient_of(policy) -> list:
    """Of length 1: sides clip it."""
    from torch.nn.utils import get_total_norm

    gradients = [weight.grad for weight in policy.parameters()]
    length = get_total_norm(gradients)
    return [gradient / length for gradient in gradients]


def distance(gradient: list, expected: list) -> float:
    """Between two of length 1."""
    return sum(float((a - b).square().sum()) for a, b in zip(gradient, expected, strict=True)) ** 0.5


def measure(world, sides: Mapping[str, Callable[..., Any]], rounds: int, distances: Mapping[str, float]) -> list[dict]:
    """A row for each side."""
    print(f"{world.cell}: {', '.join(sides)}; {rounds} rounds after one for warming up", flush=True)
    peaks = {name: peak_of(world.model, side) for name, side in sides.items()}
    sides = {name: side for name, side in sides.items() if peaks[name] is not None}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            side(False)
            started = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - started)
    print({name: [round(one, 3) for one in runs] for name, runs in seconds.items()}, flush=True)
    wall = {name: median(runs) for name, runs in seconds.items()}
    shape = {"prompt": world.cell.prompt, "completion": world.cell.completion}
    rows = [
        shape
        | {"side": name, "seconds": wall[name], "ratio_vs_trl": wall["trl"] / wall[name], "peak_gib": peaks[name]}
        | flops_of(name, world, wall[name])
        | {"distance": f"{distances[name]:.1e}" if name in distances else None}
        for name in sides
    ]
    return rows + [
        shape | dict.fromkeys(COLUMNS) | shape | {"side": name, "distance": f"{value:.1e}"}
        for name, value in distances.items()
        if name not in sides
    ]


def peak_of(policy, side: Callable[..., Any]) -> float | None:
    """GiB in all; the step warms up, too. None where the GPU has too few."""
    import torch

    side(False)
    policy.zero_grad()
    if not torch.cuda.is_available():
        side()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        side()
    except torch.OutOfMemoryError:
        policy.zero_grad()
        return None
    return torch.cuda.max_memory_allocated() / 2**30


def flops_of(name: str, world, seconds: float) -> dict[str, float | None]:
    """What theory says of the ratio, and shares of the device's peak."""
    import torch

    from benchmarks.flops import costs_of, work_of
    from sail_rl.profiling import peak_flops

    costs, shape = costs_of(world.model.config), (world.cell.prompt, world.lengths, world.tiles)
    layouts = {layout: work_of(layout, *shape) for layout in ("trl", "padded", "packed", "shared")}
    # On a GPU TRL's head scores the completions alone, as ours does.
    layouts["trl"] = layouts["padded"]
    flops = {layout: work.flops(costs) for layout, work in layouts.items()}
    own = name.split(",")[0]
    passes = 4 if SIDES[name][2] else 3
    peak = peak_flops(torch.device("cuda"))[0] if torch.cuda.is_available() else float("nan")
    return {
        "theory_vs_trl": flops["trl"] / flops[own],
        "needed": 3 * flops["shared"] / seconds / peak,
        "done": passes * flops[own] / seconds / peak,
    }


def report(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    text = (
        "One update of SAIL-VL2-2B with eight completions of a prompt, bfloat16 autocast over float32 weights; medians."
    )
    return f"{text}\n\n{markdown(result['rows'], COLUMNS)}\nMachine: {result['machine']}\n"


if __name__ == "__main__":
    main()
