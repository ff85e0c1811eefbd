"""What a run spends its time on: phase times and MFU of every step as a table, and a trace of two steps.

MFU (model FLOPs utilisation) is the arithmetic that the algorithm needs, over what the devices could have done in the
time at their peak. Needed is, each counted once however often a layout repeats it:
  rollout  forward over every prompt with its pictures, and over every token written
  update   forward and backward over the prompt, pictures and completions of every trained group, for each iteration;
           with a KL term also the starting model's forward, with mini-batches the policy's before the first of them
Padding, prompts read again for each completion, and activations computed again (gradient checkpointing) are lost time.
sail_rl/flops.py has the formulas.
"""

import time
from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity

from rollouts import Rollout
from sail_rl.batch import Group
from sail_rl.flops import model_cost
from sail_rl.gpus import named_in
from sail_rl.launch import Run
from sail_rl.questions import Question

PEAK_TRIES = 5


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
        if gpu := named_in(name):
            return gpu.flops, f"{gpu.flops / 1e12:.0f} TFLOP/s of each {name} (data sheet, dense bf16)"
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
