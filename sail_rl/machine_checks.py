"""What a recipe needs of the machine: packages, devices, files, room on the disk. Each check tells what it found.

Mistakes are raised as BadInput with what to do. Imports no torch at the top.
"""

import importlib.metadata
import os
import shutil
from dataclasses import replace
from pathlib import Path

from packaging.requirements import Requirement

from sail_rl.command_line import BadInput
from sail_rl.config import CommonRecipe, GrpoRecipe
from sail_rl.device_exchange import exchange_between
from sail_rl.gpus import Gpu, named_in
from sail_rl.run_folder import check_run, installed

GIB = 2**30


def check_packages(recipe: CommonRecipe) -> str:
    """The installed versions are within the ranges that this package asks for."""
    from sail_rl.processes import asked_for

    extras = ["", "deepspeed"] if asked_for() == "DEEPSPEED" else [""]
    if isinstance(recipe, GrpoRecipe) and recipe.rollout.engine != "hf":
        extras.append("vllm")
    wanted = [Requirement(text) for text in importlib.metadata.requires("sail-rl") or []]
    needed = [r for r in wanted if any(r.marker is None or r.marker.evaluate({"extra": extra}) for extra in extras)]
    wrong = [
        f"{r.name} {installed(r.name) or 'is missing'}, {r.specifier or 'any version'} is needed"
        for r in needed
        if not r.specifier.contains(installed(r.name) or "", prereleases=True)
    ]
    if wrong:
        raise BadInput(f"{'; '.join(wrong)}: run make install, or install these versions")
    shown = ("torch", "transformers", "accelerate", *(["vllm"] if "vllm" in extras else []))
    return ", ".join(f"{name} {installed(name)}" for name in shown) + f" and {len(needed) - len(shown)} more"


def check_device(recipe: CommonRecipe) -> str:
    """What trains: GPUs with NCCL between them, or the cores of a CPU."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            raise BadInput(f"there is an NVIDIA driver, but torch {torch.__version__} cannot use it: update the driver")
        return f"no GPU, {len(os.sched_getaffinity(0))} cores"
    if recipe.trainer.mixed_precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise BadInput(f"trainer.mixed_precision = bf16: {torch.cuda.get_device_name()} cannot; set it to 'no'")
    count = torch.cuda.device_count()
    if count > 1 and not torch.distributed.is_nccl_available():
        raise BadInput(f"{count} GPUs, but torch {torch.__version__} comes without NCCL: install a CUDA build of torch")
    free, memory = (value / GIB for value in torch.cuda.mem_get_info())
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "missing"
    return f"{count} x {torch.cuda.get_device_name()}, {free:.0f} of {memory:.0f} GiB free, NCCL {nccl}"


def check_exchange(recipe: CommonRecipe) -> str:
    """The GPUs of this machine reach each other."""
    import torch

    count = torch.cuda.device_count()
    return exchange_between("nccl", count) if count > 1 else "at most one GPU, there is nothing to exchange"


def check_memory(recipe: CommonRecipe) -> str:
    """What `sail-rl plan` says of the GPUs that are here."""
    found = gpus_here()
    if found is None:
        return "no GPU; sail-rl plan RECIPE --gpus 8xH100 tells what some would hold"
    from sail_rl.planning.command import advice, ways
    from sail_rl.planning.sizes import sizes_of
    from sail_rl.planning.task import Task, expected_of

    count, gpu = found
    sizes = sizes_of(recipe.model)
    tasks = ways(Task(recipe, sizes, gpu, count, expected_of(recipe, sizes)))
    fitting = [task for task in tasks if task.fits]
    if not fitting:
        raise BadInput(f"on {count} {gpu.name} {'; '.join(line.strip() for line in advice(tasks[0]))}")
    least = f"{fitting[0].peak:.0f} of {gpu.memory_gib:.0f} GiB on each {gpu.name}"
    return least if count == 1 else f"{least} with recipes/accelerate/{fitting[0].sharding.file}"


def gpus_here() -> tuple[int, Gpu] | None:
    """How many, and what the first one is; one that is not in the table is told by the driver, but for its speed."""
    import torch

    if not torch.cuda.is_available():
        return None
    name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1] / GIB
    return torch.cuda.device_count(), replace(named_in(name) or Gpu(name, 0, 1, 1), memory_gib=memory)


def check_files(recipe: CommonRecipe) -> str:
    """What the recipe names is there, and its folder may be written to."""
    check_run(recipe)
    place = existing_parent(Path(recipe.output_dir))
    if not os.access(place, os.W_OK):
        raise BadInput(f"output_dir = {recipe.output_dir}: {place} cannot be written to; name another folder")
    return f"all are there; output_dir = {recipe.output_dir} can be written"


def existing_parent(folder: Path) -> Path:
    """The folder, or what there is of the way to it."""
    return next(place for place in (folder.resolve(), *folder.resolve().parents) if place.exists())


def room(needed: int, folder: Path) -> str:
    """Whether there is so much on the folder's disk."""
    free = shutil.disk_usage(existing_parent(folder)).free
    told = f"{needed / GIB:.2f} GiB are needed for checkpoints and the final model, {free / GIB:.1f} GiB are free"
    if needed > free:
        raise BadInput(f"output_dir = {folder}: {told}; name another folder, or lower trainer.save_total_limit")
    return told
