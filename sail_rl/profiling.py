"""What a run spends its time on: phase times and MFU of every step as a table, and a trace of two steps.

MFU (model FLOPs utilisation) is the arithmetic that the algorithm needs, over what the devices could have done in the
time at their peak. Needed is, each counted once however often a layout repeats it:
  rollout  forward over every prompt with its pictures, and over every token written
  update   forward and backward over the prompt, pictures and completions of every trained group, for each iteration;
           with a KL term also the starting model's forward, with mini-batches the policy's before the first of them
Padding, prompts read again for each completion, and activations computed again (gradient checkpointing) are lost time.

Forward, in FLOPs: 2 W per token for the W weights that it meets (the tower's per patch, the adapter's per picture
token, the language model's per token, of a mixture those of the experts that read it, the head's per completion token),
and for attention 4 x layers x width per pair of tokens of which one sees the other: P (P + 1) / 2 in a prompt of P
tokens, C P + C (C + 1) / 2 for a completion of C, the square of its patches for a tile or picture of its own.
Backward: as much again for the gradient of the activations wherever anything at or below trains, and as much again for
the weights that train; so 6 W per token where all train, 4 W in a frozen language model over a trained tower. Pictures
themselves need no gradient: 4 W in the patch embedding.
"""

import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity

from rollouts import Prompt, Rollout
from sail_rl.batch import Group
from sail_rl.launch import Run
from sail_rl.model.load import PARTS
from sail_rl.questions import Question

# Dense bf16 FLOP/s, from NVIDIA's data sheets; the first name that the device's contains.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}
PEAK_TRIES = 5


@dataclass(frozen=True)
class Part:
    """One part of the model, as far as its arithmetic goes."""

    weights: float
    """That each of its tokens is multiplied with."""
    attention: float
    """FLOPs of a pair of tokens in all layers, forward."""
    trained_share: float
    """Of the weights."""
    passes_gradients: bool
    """Whether anything at or below it trains, so that the gradient of its inputs is needed."""

    def forward(self, tokens: float, pairs: float) -> float:
        """FLOPs over so many tokens, and pairs of which one sees the other."""
        return 2 * self.weights * tokens + self.attention * pairs

    def backward(self, tokens: float, pairs: float) -> float:
        """The same for the gradient."""
        times = self.passes_gradients + self.trained_share
        return 2 * self.weights * tokens * times + 2 * self.attention * pairs * self.passes_gradients


@dataclass(frozen=True)
class ModelCost:
    """What passes through a model cost."""

    parts: tuple[Part, ...]
    """Patch embedding, tower, adapter, language model, head."""
    patch_size: int
    image_token_id: int

    def forward(self, groups: Sequence[Group]) -> float:
        """FLOPs to read each prompt once and every completion."""
        return sum(part.forward(*work) for group in groups for part, work in self.work(group))

    def backward(self, groups: Sequence[Group]) -> float:
        """FLOPs of the gradient of the same."""
        return sum(part.backward(*work) for group in groups for part, work in self.work(group))

    def work(self, group: Group) -> list[tuple[Part, tuple[float, float]]]:
        """What each part has to do: (tokens, pairs)."""
        windows = patch_windows(group.prompt, self.patch_size)
        prompt, lengths = len(group.prompt.token_ids), [len(completion) for completion in group.completions]
        pairs = prompt * (prompt + 1) / 2 + sum(c * prompt + c * (c + 1) / 2 for c in lengths)
        tower = (sum(windows), sum(patches**2 for patches in windows))
        adapter = (group.prompt.token_ids.count(self.image_token_id), 0)
        llm, head = (prompt + sum(lengths), pairs), (sum(lengths), 0)
        return list(zip(self.parts, ((sum(windows), 0), tower, adapter, llm, head), strict=True))


def model_cost(model) -> ModelCost:
    """Read off a model and its configuration. To be called before the model is wrapped or sharded."""
    text, vision = model.config.get_text_config(), model.config.vision_config
    layers = getattr(vision, "depth", None) or vision.num_hidden_layers
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = {
        "tower": 4 * layers * vision.hidden_size,
        "llm": 4 * text.num_hidden_layers * text.num_attention_heads * head_width,
    }
    convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)).weight
    parts = [Part(convolution.numel(), 0, float(convolution.requires_grad), passes_gradients=False)]
    passes = convolution.requires_grad
    for name in ("tower", "adapter", "llm"):
        weights, trained = part_weights(model, name)
        passes = passes or trained > 0
        parts.append(Part(weights, attention.get(name, 0), trained / weights, passes))
    head = model.get_output_embeddings().weight
    parts.append(Part(head.numel(), 0, float(head.requires_grad), passes))
    patch = vision.patch_size
    return ModelCost(tuple(parts), patch if isinstance(patch, int) else patch[0], model.config.image_token_id)


def part_weights(model, part: str) -> tuple[float, float]:
    """(weights that a token of the part is multiplied with, those of them that train); tables are looked up in."""
    total = trained = 0.0
    text = model.config.get_text_config()
    for owner, module in model.named_modules():
        if isinstance(module, nn.Embedding) or not any(f"{key}." in f"{owner}." for key in PARTS[part]):
            continue
        if module is model.get_output_embeddings():
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3 and parameter.shape[0] > 1:  # the experts of a mixture, stacked
                met = parameter.numel() * text.num_experts_per_tok / parameter.shape[0]
            else:  # neither biases, nor tables of shape [1, T, D], nor the patches' convolution
                met = parameter.numel() if parameter.ndim == 2 else 0
            total, trained = total + met, trained + met * parameter.requires_grad
    return total, trained


def patch_windows(prompt: Prompt, patch_size: int) -> list[int]:
    """Patches of each tile, of each picture at its native size, or of each frame: what sees itself in the tower."""
    inputs = prompt.model_inputs
    if "image_grid_thw" in inputs:
        return [rows * columns for frames, rows, columns in inputs["image_grid_thw"].tolist() for _ in range(frames)]
    if "pixel_values" not in inputs:
        return []
    count, _, height, width = inputs["pixel_values"].shape
    patches = (height // patch_size) * (width // patch_size)
    if "image_grids" in inputs:
        return [rows * columns * patches for rows, columns in inputs["image_grids"].tolist()]
    return [patches] * count


def written_groups(questions: Sequence[Question], rollouts: Sequence[Rollout]) -> list[Group]:
    """All that was written in a step, trained or not."""
    size = len(rollouts) // len(questions)
    return [
        Group(question.prompt, [rollout.token_ids for rollout in rollouts[number * size : (number + 1) * size]])
        for number, question in enumerate(questions)
    ]


class Profile:
    """The table and the trace of a run; does nothing unless `trainer.profile` is set."""

    def __init__(self, run: Run, model):
        self.active = run.recipe.trainer.profile
        if not self.active:
            return
        self.run, self.cost = run, model_cost(model)
        self.folder = run.folder / "profile"
        self.folder.mkdir(exist_ok=True)
        self.peak, self.peak_text = peak_flops(run.accelerator.device)
        on_gpu = run.accelerator.device.type == "cuda"
        self.activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self.traced: range | None = None
        self.trace: torch.profiler.profile | None = None
        self.table = self.folder / "unnamed.md"
        self.started = 0.0

    def begin(self, step: int) -> None:
        """A step begins; the second of this launch is the first to be traced, since the first one warms up."""
        if not self.active:
            return
        if self.traced is None:
            last = self.run.recipe.trainer.max_steps
            self.traced = range(min(step + 1, last), min(step + 2, last) + 1)
            self.table = self.folder / f"table_from_step_{step}.md"
        if self.run.is_main and step == self.traced[0]:
            self.trace = torch.profiler.profile(activities=self.activities)
            self.trace.start()
        self.started = time.perf_counter()

    @contextmanager
    def untraced(self):
        """Leave a block out of the trace: thousands of equal decoding steps would make it gigabytes."""
        trace = self.trace if self.active else None
        if trace:
            trace.toggle_collection_dynamic(False, self.activities)
        yield
        if trace:
            trace.toggle_collection_dynamic(True, self.activities)

    def end(
        self, step: int, seconds: dict[str, float], trained: Sequence[Group], written: Sequence[Group] = ()
    ) -> dict[str, float]:
        """The step's line in the table, and its MFU for the log."""
        if not self.active:
            return {}
        assert self.traced is not None
        whole = time.perf_counter() - self.started
        if self.trace and step == self.traced[-1]:
            self.trace.stop()
            self.trace.export_chrome_trace(str(self.folder / f"trace_steps_{self.traced[0]}_to_{step}.json.gz"))
            self.trace = None
        flops = self.run.sum({"rollout": self.cost.forward(written), "update": self.update_flops(trained)})
        phases = {name.removeprefix("seconds/"): value for name, value in seconds.items()}
        figures = self.utilisation(flops, phases | {"step": whole})
        if self.run.is_main:
            self.write_line(step, phases | {"other": whole - sum(phases.values()), "step": whole}, flops, figures)
        return figures

    def update_flops(self, trained: Sequence[Group]) -> float:
        """FLOPs of all the updates on these groups."""
        grpo = getattr(self.run.recipe, "grpo", None)
        forward, backward = self.cost.forward(trained), self.cost.backward(trained)
        if grpo is None:
            return forward + backward
        return (forward + backward) * grpo.num_iterations + forward * (bool(grpo.beta) + grpo.looks_ahead)

    def utilisation(self, flops: dict[str, float], seconds: dict[str, float]) -> dict[str, float]:
        """MFU of the phases that compute and of the whole step."""
        peak = self.peak * self.run.shard.world_size
        phases = {f"mfu/{name}": flops[name] / seconds[name] / peak for name in flops if name in seconds}
        return phases | {"mfu/step": sum(flops.values()) / seconds["step"] / peak}

    def write_line(self, step: int, seconds: dict[str, float], flops: dict[str, float], figures: dict) -> None:
        """Add a step to the table."""
        assert self.traced is not None
        traced = "*" if step in self.traced else ""
        times = {f"{name}, s": f"{value:.3f}" for name, value in seconds.items()}
        work = {f"{name}, TFLOP": f"{value / 1e12:.4g}" for name, value in flops.items() if f"mfu/{name}" in figures}
        shares = {name.replace("mfu/", "MFU of "): f"{value:.2%}" for name, value in figures.items()}
        cells = {"step": f"{step}{traced}"} | times | work | shares
        with self.table.open("a") as file:
            if not self.table.stat().st_size:
                head = f"Phases and MFU; the peak is {self.peak_text}. Steps with * are slowed by the trace.\n"
                file.write("\n".join([head, row(cells), row(["---"] * len(cells))]) + "\n")
            file.write(row(cells.values()) + "\n")


def row(cells) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def peak_flops(device: torch.device) -> tuple[float, str]:
    """FLOP/s of one process's device, and where the figure is from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name:
                return peak, f"{peak / 1e12:.0f} TFLOP/s of each {name} (data sheet, dense bf16)"
    dtype, size = (torch.float32, 1024) if device.type == "cpu" else (torch.bfloat16, 8192)
    peak = measured_peak(device, dtype, size)
    what = f"{torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    return peak, f"{peak / 1e12:.3g} TFLOP/s of {what} (measured: a {size} x {size} {dtype} product)"


def measured_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a matrix product, at its fastest."""
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    fastest = float("inf")
    for _ in range(PEAK_TRIES):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # reading a number waits for the device
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest
