"""`sail-rl convert`: a SAIL-VL2 checkpoint from the released layout to ours and back.

Everything is checked before a byte is written; then the tensors pass one by one, so that memory does not grow with the
model. `conversion.json` in the target tells what became of every tensor, and lets the way back restore the files.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open

from sail_rl.convert_plan import (
    MANIFEST,
    OTHER,
    Conversion,
    Layout,
    input_keys,
    make_output,
    output_keys,
    plan_conversion,
    read_config,
    read_json,
)
from sail_rl.model.released_config import TILES, is_released, released_config
from sail_rl.weight_files import Stored, WeightFile, new_folder, refuse_occupied, write_index, write_weight_file

# Carried over as they are: transformers 4, which the released code needs, does not read all that transformers 5 writes.
CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
# Read by the released code alone, and so kept in the manifest for the way back.
KEPT = ("config.json", "preprocessor_config.json")


def convert(source: Path, target: Path, to: Layout | None = None, dry_run: bool = False) -> Conversion:
    """Check a conversion and, unless it is a dry run, write it; `target` then is whole or does not exist."""
    refuse_occupied(target)
    plan = plan_conversion(source, to)
    if not dry_run:
        with new_folder(target) as folder:
            write_conversion(plan, folder)
    return plan


def result_line(plan: Conversion, target: Path) -> str:
    """What a conversion writes, in one line."""
    files = plan.outputs.values()
    tensors, size = sum(len(file.tensors) for file in files), sum(file.size for file in files) / 1e9
    head = "tied head" if plan.config.tie_word_embeddings else "head of its own"
    return f"{target}: {OTHER[plan.layout]} layout, {head}, {tensors} tensors, {size:.2f} GB in {len(files)} file(s)"


def write_conversion(plan: Conversion, folder: Path) -> None:
    """Configuration, processor, tokenizer, manifest, weights and index."""
    if plan.layout == "released":
        write_native_settings(plan, folder)
    else:
        write_released_settings(plan, folder)
    for name in CARRIED:
        if (plan.source / name).is_file():
            shutil.copyfile(plan.source / name, folder / name)
    (folder / MANIFEST).write_text(json.dumps(manifest(plan), indent=1, ensure_ascii=False) + "\n")
    write_weights(plan, folder)


def write_native_settings(plan: Conversion, folder: Path) -> None:
    """config.json, the processor, and where answers end when the source does not say."""
    assert plan.processor is not None
    plan.config.save_pretrained(folder)
    plan.processor.save_pretrained(folder)
    tokenizer = plan.processor.tokenizer
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")


def write_released_settings(plan: Conversion, folder: Path) -> None:
    """config.json and the released processor's settings, as they once were where known; and the chat template."""
    earlier = {name: values for name, values in plan.earlier.get("settings", {}).items() if name in KEPT}
    if not still_describes(earlier.get("config.json", {}), plan):
        earlier["config.json"] = released_config(plan.config, read_tiles(plan.source))
    for name, values in earlier.items():
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    template = plan.source / "chat_template.jinja"
    if template.is_file():
        shutil.copyfile(template, folder / template.name)


def still_describes(earlier: dict[str, Any], plan: Conversion) -> bool:
    """Whether the config.json that a source was made from is that of the source as it is now."""
    if not is_released(earlier):
        return False
    then, now = (
        read_config(plan.source, earlier, bool(plan.config.tie_word_embeddings)).to_dict(),
        plan.config.to_dict(),
    )
    incidental = dict.fromkeys(("transformers_version", "_name_or_path"))
    return then | incidental == now | incidental


def read_tiles(source: Path) -> dict[str, int]:
    """The processor's range of tiles under the released names."""
    file = source / "processor_config.json"
    tiling = read_json(file).get("image_processor", {}) if file.is_file() else {}
    names = dict(zip(TILES, ("min_patches", "max_patches"), strict=True))
    return {released: tiling[ours] for released, ours in names.items() if ours in tiling}


def write_weights(plan: Conversion, folder: Path) -> None:
    """Every weight file, and the index when there are several."""
    total = sum(file.size for file in plan.outputs.values())
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(f"to the {OTHER[plan.layout]} layout", total=total)
        for name, file in plan.outputs.items():
            tensors = read_outputs(plan, file)
            write_weight_file(folder / name, file, tensors, lambda size: progress.advance(task, size))
    if len(plan.outputs) > 1:
        write_index(folder, plan.outputs)


def read_outputs(plan: Conversion, file: WeightFile) -> Iterator[torch.Tensor]:
    """The tensors of an output file in its order, each read when it is asked for."""
    places = {key: name for name, source in plan.inputs.items() for key in source.tensors}
    opened: dict[str, Any] = {}
    with ExitStack() as stack:
        for key in file.tensors:
            parts = input_keys(key, plan.layout)
            for name in {places[part] for part in parts} - opened.keys():
                opened[name] = stack.enter_context(safe_open(plan.source / name, framework="pt"))
            yield make_output(key, plan.layout, [opened[places[part]].get_tensor(part) for part in parts])


def manifest(plan: Conversion) -> dict[str, Any]:
    """What became of every tensor. `files` keeps the input's form, for the way back."""
    files = {
        name: {
            "metadata": file.metadata,
            "tensors": {key: describe_fate(plan, key, stored) for key, stored in file.tensors.items()},
        }
        for name, file in plan.inputs.items()
    }
    return {
        "source": str(plan.source.resolve()),
        "direction": f"{plan.layout} -> {OTHER[plan.layout]}",
        "tied_lm_head": bool(plan.config.tie_word_embeddings),
        "settings": {name: read_json(plan.source / name) for name in KEPT if (plan.source / name).is_file()},
        "files": files,
    }


def describe_fate(plan: Conversion, key: str, stored: Stored) -> dict[str, Any]:
    """An input tensor in the manifest, with what it became or became a part of."""
    new = output_keys(key, plan.layout)
    found = {name: file.tensors[name] for file in plan.outputs.values() for name in new if name in file.tensors}
    became = [{"key": name, "dtype": found[name].dtype, "shape": found[name].shape} for name in new]
    return {"dtype": stored.dtype, "shape": stored.shape, "to": became}
