"""What `sail-rl convert` is going to do, worked out and checked from configuration and weight headers alone."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError

from sail_rl.command_line import BadInput
from sail_rl.model import SailVL2Config, SailVL2Processor
from sail_rl.model.expected import native_weights
from sail_rl.model.processing_sail_vl2 import IMAGE_CONTEXT
from sail_rl.model.released import native_keys, released_key, to_native, to_released
from sail_rl.model.released_config import added_token_id, is_released, native_config, released_processor
from sail_rl.weight_files import Stored, WeightFile, read_weight_files

Layout = Literal["released", "native"]
OTHER: dict[Layout, Layout] = {"released": "native", "native": "released"}
MANIFEST = "conversion.json"
LISTED = 20


@dataclass(frozen=True)
class Conversion:
    """A checked conversion, ready to be written."""

    source: Path
    layout: Layout
    """Of the source."""
    config: SailVL2Config
    """The model, in our terms; its embeddings are tied when no file holds a head."""
    processor: SailVL2Processor | None
    """To be written with our layout."""
    earlier: dict[str, Any]
    """The manifest of the conversion that made the source; empty when none did."""
    inputs: dict[str, WeightFile]
    outputs: dict[str, WeightFile]


def plan_conversion(source: Path, to: Layout | None) -> Conversion:
    """Read what there is to read beside the tensors' data, and refuse what does not fit."""
    values = read_json(source / "config.json")
    layout = layout_of(values, source)
    if to == layout:
        raise BadInput(f"{source} has the {to} layout already")
    inputs = read_weight_files(source)
    stored = all_tensors(inputs)
    head = "language_model.lm_head.weight" if layout == "released" else "lm_head.weight"
    config = read_config(source, values, tied=head not in stored)
    refuse_misfits(source, expected_shapes(config, layout), stored)
    earlier = read_json(source / MANIFEST) if (source / MANIFEST).is_file() else {}
    outputs = restored_form(output_files(inputs, layout), earlier, source / MANIFEST)
    processor = read_processor(source, values) if layout == "released" else None
    return Conversion(source, layout, config, processor, earlier, inputs, outputs)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise BadInput(f"{path} holds {type(values).__name__}, not a mapping")
    return values


def layout_of(values: dict[str, Any], source: Path) -> Layout:
    """Which layout a checkpoint has, by its config.json."""
    if is_released(values):
        return "released"
    if values.get("model_type") == SailVL2Config.model_type:
        return "native"
    kind = values.get("model_type")
    raise BadInput(f"{source} is no SAIL-VL2: config.json has model_type = {kind!r}; expected 'sailvl' or 'sail_vl2'")


def read_config(source: Path, values: dict[str, Any], tied: bool) -> SailVL2Config:
    """The model in our terms. A head that is stored is a head of its own, whatever config.json says."""
    try:
        if is_released(values):
            config = native_config(values, added_token_id(source, IMAGE_CONTEXT))
        else:
            config = SailVL2Config.from_dict(values)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise BadInput(f"{source}: {' '.join(str(error).split())}") from error
    if config.tie_word_embeddings:  # else a head that lacks is told with all other names that lack
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    return config


def read_processor(source: Path, values: dict[str, Any]) -> SailVL2Processor:
    """Our processor for a released source, made before the long part begins."""
    try:
        return released_processor(source, values)
    except (OSError, ValueError) as error:
        raise BadInput(f"{source}: the tokenizer cannot be used: {error}") from error


def all_tensors(files: dict[str, WeightFile]) -> dict[str, Stored]:
    """Every tensor of a checkpoint; one that two files hold is refused."""
    tensors: dict[str, Stored] = {}
    for name, file in files.items():
        twice = sorted(tensors.keys() & file.tensors.keys())
        if twice:
            raise BadInput(f"{name} holds tensors that another file holds too:{listing(twice)}")
        tensors |= file.tensors
    return tensors


def expected_shapes(config: SailVL2Config, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model holds."""
    weights = native_weights(config)
    if layout == "released":
        groups = {name: native_keys(name) for name in map(released_key, weights)}
        weights = {name: to_released(name, [weights[key] for key in keys]) for name, keys in groups.items()}
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def refuse_misfits(source: Path, expected: dict[str, tuple[int, ...]], found: dict[str, Stored]) -> None:
    """All that does not fit, at once: names that lack, names that nothing knows, other shapes."""
    pairs = {key: (list(found[key].shape), list(shape)) for key, shape in expected.items() if key in found}
    wrong = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    problems = {
        "missing": [key for key in expected if key not in found],
        "unknown": [key for key in found if key not in expected],
        "of another shape": [f"{key}: {here}, expected {right}" for key, (here, right) in wrong.items()],
    }
    told = [f"\n  {len(lines)} {kind}:{listing(lines)}" for kind, lines in problems.items() if lines]
    if told:
        raise BadInput(f"{source}: the tensors are not those of the model that config.json describes:{''.join(told)}")


def listing(lines: list[str]) -> str:
    """Indented lines, the first of many."""
    more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "".join(f"\n    {line}" for line in [*lines[:LISTED], *more])


def output_keys(key: str, layout: Layout) -> list[str]:
    """What an input tensor becomes, or becomes a part of."""
    return native_keys(key) if layout == "released" else [released_key(key)]


def input_keys(key: str, layout: Layout) -> list[str]:
    """The input tensors that an output tensor is made of."""
    return [released_key(key)] if layout == "released" else native_keys(key)


def make_output(key: str, layout: Layout, tensors: list[torch.Tensor]) -> torch.Tensor:
    """An output tensor from its `input_keys`."""
    if layout == "native":
        return to_released(key, tensors)
    source = released_key(key)
    return to_native(source, tensors[0])[native_keys(source).index(key)]


def output_files(inputs: dict[str, WeightFile], layout: Layout) -> dict[str, WeightFile]:
    """The files to write: the input's, file by file and in its order; a fused tensor where its first part was."""
    stored = all_tensors(inputs)
    home = {key: name for name in reversed(inputs) for old in inputs[name].tensors for key in output_keys(old, layout)}
    outputs = {}
    for name, file in inputs.items():
        keys = dict.fromkeys(key for old in file.tensors for key in output_keys(old, layout) if home[key] == name)
        metadata = file.metadata or {"format": "pt"}  # transformers refuses files without it
        outputs[name] = WeightFile(metadata, {key: describe_output(key, layout, stored) for key in keys})
    return outputs


def describe_output(key: str, layout: Layout, stored: dict[str, Stored]) -> Stored:
    """Type and shape of an output tensor; parts of several types cannot be fused."""
    names = input_keys(key, layout)
    types = [stored[name].dtype for name in names]
    if len(set(types)) > 1:
        raise BadInput(f"{', '.join(names)} have the types {', '.join(types)}: they cannot be fused into {key}")
    empty = [torch.empty(stored[name].shape, device="meta") for name in names]
    return Stored(types[0], tuple(make_output(key, layout, empty).shape))


def restored_form(outputs: dict[str, WeightFile], earlier: dict[str, Any], manifest: Path) -> dict[str, WeightFile]:
    """The same tensors in the files, order and metadata that an earlier conversion began with."""
    tensors = all_tensors(outputs)
    try:
        files = earlier.get("files", {}).items()
        form = {name: (dict(file["metadata"]), list(file["tensors"])) for name, file in files}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{manifest} is no manifest of `sail-rl convert`; remove it") from error
    if sorted(key for _, keys in form.values() for key in keys) != sorted(tensors):
        return outputs
    strange = [name for name in form if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    if strange:
        raise BadInput(f"{manifest} names weight files that cannot be: {', '.join(strange)}; remove it")
    return {name: WeightFile(metadata, {key: tensors[key] for key in keys}) for name, (metadata, keys) in form.items()}
