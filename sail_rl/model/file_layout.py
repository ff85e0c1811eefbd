"""Weights as files have them, without writing files: names, and experts one by one.

transformers keeps the experts of a layer in one tensor and renames some others; `save_pretrained` undoes that for the
whole model at once. Here it is undone for one layer after another, so that no second copy of the model is made.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

LAYER = re.compile(r".*?\.\d+\.")  # up to the first number


def in_file_layout(model: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Named tensors of the model, in its order, under the names and in the shapes of a saved checkpoint."""
    for _, layer in groupby(tensors, key=lambda pair: layer_of(pair[0])):
        yield from revert_weight_conversion(model, dict(layer)).items()


def layer_of(name: str) -> str:
    """What the tensors of a layer share; the name itself outside layers."""
    found = LAYER.match(name)
    return found.group() if found else name
