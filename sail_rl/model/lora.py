"""LoRA: peft's low-rank adapters inside the model that is trained, and the weights that come of merging them.

The model keeps its class and its names: peft replaces a linear layer `name` by one that holds the old weights as
`name.base_layer` and the adapters as `name.lora_A` and `name.lora_B`. A merged weight is W + scaling * B A.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn

from sail_rl.command_line import BadInput
from sail_rl.config_data import LoraSection
from sail_rl.sharding import full, gathered

ADAPTER = "default"  # peft's name for the only adapter of a model
SERIALIZED_PREFIX = "base_model.model."  # before every name in peft's files


def add_adapters(model: Any, lora: LoraSection, parts: Mapping[str, Iterable[str]], base: str, seed: int) -> None:
    """Put fresh adapters, which change nothing yet, into the linear layers of some parts; freeze all other weights.

    `parts` says of every part what its names contain.
    """
    targets = [name for part in lora.parts for name in linear_layers(model, part, parts[part])]
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    # Adapters take the small steps that weights in bfloat16 cannot.
    cast_adapter_dtype(model, ADAPTER)


def linear_layers(model: Any, part: str, keys: Iterable[str]) -> list[str]:
    """Names of the linear layers of a part, without the head that writes tokens."""
    head = model.get_output_embeddings()
    found = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and any(f"{key}." in f"{name}." for key in keys)
    ]
    if not found:
        raise BadInput(f"model.lora.parts = [{part}]: {type(model).__name__} has no linear layers in such a part")
    return found


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters are what is trained."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


def merged(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's named tensors as the base model has them, adapters merged; one layer at a time, nothing changed."""
    layers = {f"{name}.base_layer.weight": layer for name, layer in lora_layers(model)}
    for name, tensor in tensors:
        if name in layers:
            # Added in float32, so that weights of lower precision are rounded once.
            tensor = (tensor.detach().float() + delta_weight(layers[name]).float()).to(tensor.dtype)
        if (base := base_name(name)) is not None:
            yield base, tensor.detach()


def base_name(name: str) -> str | None:
    """A tensor's name in the model without adapters; None for what it has not."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


def delta_weight(layer: Any) -> torch.Tensor:
    """What a layer's adapter adds to its weight; whole, also where processes hold the adapter in parts."""
    with gathered(layer.lora_A[ADAPTER]), gathered(layer.lora_B[ADAPTER]):
        return full(layer.get_delta_weight(ADAPTER).detach())


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that have adapters, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def save_adapters(folder: Path, model: Any) -> None:
    """The adapters in peft's format, under the base model's names."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    named = {SERIALIZED_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(named, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    model.peft_config[ADAPTER].save_pretrained(str(folder))


def load_adapters(folder: Path, model: Any) -> None:
    """Put saved adapters back into a model that has fresh ones of the same form."""
    weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    bare = {name.removeprefix(SERIALIZED_PREFIX): tensor for name, tensor in weights.items()}
    expected = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False).keys()
    if bare.keys() != expected:
        name = min(bare.keys() ^ expected)
        raise BadInput(
            f"{folder}: its adapters are not those of the recipe's model.lora; {name} is in one of them alone"
        )
    set_peft_model_state_dict(model, bare, adapter_name=ADAPTER)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before its adapters were trained, within the block; any other model as it is."""
    for _, layer in lora_layers(model):
        layer.enable_adapters(False)
    yield
    for _, layer in lora_layers(model):
        layer.enable_adapters(True)
