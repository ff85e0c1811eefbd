"""Attention within a row of one group at the sizes of SAIL-VL2-2B: forward and backward of each kernel.

    python benchmarks/attention.py [--short] [--json PATH]      (minutes; --short less than one on two quiet cores)

On a GPU the kernels of `update.attention` in bfloat16, on a CPU a call per segment in float32; both against `masked`,
one SDPA call with a mask for the whole square. All get the same outputs and gradients before they are timed in turn.
`ratio` is the seconds of a call per segment by the kernel's (more is better). Completions are evenly spread from 0.4 of
the longest.
"""

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import (
    device_name,
    interleave,
    machine,
    markdown,
    medians,
    prepare_process,
    results_file,
    save,
    timed,
)

SHAPES = ((320, 256, 8), (1344, 256, 8), (1344, 1024, 8), (1344, 1024, 16), (320, 4096, 8))
SHORT_SHAPES = ((320, 64, 4), (512, 128, 4))  # prompt, longest completion, completions
ROUNDS, SHORT_ROUNDS = 9, 3
HEADS, KEY_HEADS, WIDTH = 16, 8, 128  # of the 2B's language model
SHORTEST = 0.4
BASELINE = "sdpa"
CPU_KERNELS, GPU_KERNELS = (BASELINE, "masked"), (BASELINE, "varlen", "flex", "masked")
CALLS = {"cpu": 1, "cuda": 10}  # timed together
COLUMNS = {
    "prompt": "prompt",
    "completion": "completion up to",
    "size": "completions",
    "kernel": "kernel",
    "milliseconds": "ms",
    "ratio": "times faster than sdpa",
    "peak_mb": "peak MB",
    "first_seconds": "first call, s",
    "difference": "difference",
}


def main() -> None:
    """Measure all shapes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two small shapes, three rounds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prepare_process()
    result: dict[str, Any] = {"machine": machine() | {"device": device_name()}, "rows": []}
    for shape in SHORT_SHAPES if arguments.short else SHAPES:
        result["rows"] += measure(shape, SHORT_ROUNDS if arguments.short else ROUNDS)
    save(arguments.json or results_file("attention", arguments.short), result, report(result))


def measure(shape: tuple[int, int, int], rounds: int) -> list[dict[str, Any]]:
    """A row for each kernel."""
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"prompt, completion, completions: {shape}; {rounds} rounds after one for warming up", flush=True)
    layout, tensors = one_group(shape, kind)
    names = GPU_KERNELS if kind == "cuda" else CPU_KERNELS
    calls = {name: forward_and_backward(name, layout, tensors) for name in names}
    first = {name: timed(call).wall for name, call in calls.items()}  # compiles what is compiled
    found = {name: call() for name, call in calls.items()}
    differences = {name: difference(found[name], found[BASELINE], name) for name in names}
    peaks = {name: peak(call) for name, call in calls.items()}
    repeats = CALLS[kind]
    steps = {name: repeated(call, repeats) for name, call in calls.items()}
    interleave(steps, 1)
    wall = medians(interleave(steps, rounds), "wall")
    sizes = dict(zip(("prompt", "completion", "size"), shape, strict=True))
    return [
        sizes
        | {"kernel": name, "milliseconds": 1e3 * wall[name] / repeats, "ratio": wall[BASELINE] / wall[name]}
        | {"peak_mb": peaks[name], "first_seconds": first[name], "difference": f"{differences[name]:.0e}"}
        for name in names
    ]


def one_group(shape: tuple[int, int, int], kind: str):
    """(layout, queries and keys and values with room for a gradient) of a prompt and its completions."""
    import numpy as np
    import torch

    from sail_rl.model.prefix_sharing import Layout

    prompt, longest, size = shape
    completions = np.linspace(SHORTEST * longest, longest, size).astype(int).tolist()
    layout = Layout((prompt, *completions), (None, *([0] * size)))
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    torch.manual_seed(0)
    tensors = [
        torch.randn(1, heads, sum(layout.lengths), WIDTH, device=kind, dtype=dtype, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    return layout, tensors


def forward_and_backward(name: str, layout, tensors) -> Callable[[], list]:
    """One call: output and gradients, finished."""
    import torch

    attend = attention_of(name, layout, tensors[0].device)
    weights = torch.linspace(-1, 1, tensors[0].numel(), device=tensors[0].device).view_as(tensors[0]).transpose(1, 2)

    def call() -> list:
        output = attend(*tensors)
        gradients = torch.autograd.grad(output, tensors, weights.to(output.dtype))
        if output.is_cuda:
            torch.cuda.synchronize()
        return [output.detach(), *gradients]

    return call


def attention_of(name: str, layout, device) -> Callable[..., Any]:
    """From queries, keys and values to outputs."""
    from torch.nn.functional import scaled_dot_product_attention
    from transformers import AttentionInterface

    from sail_rl.model.segment_kernels import IMPLEMENTATIONS

    if name == "masked":
        sees = whole_square(layout, device)

        def masked(query, key, value):
            return scaled_dot_product_attention(query, key, value, attn_mask=sees, enable_gqa=True).transpose(1, 2)

        return masked
    attention = AttentionInterface()[IMPLEMENTATIONS[name]]
    return lambda *tensors: attention(None, *tensors, None, layout=layout)[0]


def whole_square(layout, device):
    """Who reads whom, spelled out: [T, T]."""
    import torch

    bounds = torch.tensor([0, *layout.lengths]).cumsum(0).tolist()
    sees = torch.zeros(bounds[-1], bounds[-1], dtype=torch.bool, device=device)
    for start, end in pairwise(bounds):
        sees[start:end, : layout.lengths[0]] = True
        sees[start:end, start:end] = True
    return sees.tril()


def difference(ours: list, expected: list, name: str) -> float:
    """The largest distance of output and gradients, each by the length of the expected one."""
    found = max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(ours, expected, strict=True))
    allowed = 1e-5 if expected[0].dtype.itemsize == 4 else 2e-2
    if not found <= allowed:
        raise RuntimeError(f"{name} computes something else: {found:.1e}")
    return found


def peak(call: Callable[[], Any]) -> float | None:
    """Megabytes that a call needs on a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    """Several calls as one."""

    def calls() -> None:
        for _ in range(times):
            call()

    return calls


def report(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    sizes = f"{HEADS} heads of queries, {KEY_HEADS} of keys, {WIDTH} wide"
    text = f"Forward and backward of attention within one row, {sizes}; medians."
    return f"{text}\n\n{markdown(result['rows'], COLUMNS)}\nMachine: {result['machine']}\n"


if __name__ == "__main__":
    main()
