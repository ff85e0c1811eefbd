"""`sail-rl merge`: the mean of sister checkpoints (a model soup), or adapters put into the weights of their model.

The mean of checkpoints that do not come from one start is a broken model, so what is related is checked first: by what
run folders and merges have recorded, else by the distance between the weights. A soup passes tensor by tensor.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sail_rl.command_line import BadInput
from sail_rl.run_folder import read_saved
from sail_rl.weight_files import (
    WeightFile,
    new_folder,
    read_weight_files,
    refuse_occupied,
    write_index,
    write_weight_file,
)

RECORD = "merge.json"
RELATED = 0.5  # the distance of weights by their norm: sisters are far below, strangers at about 1.4
AT_ONCE = 2**20  # numbers that are averaged at once, in float64
NOT_CARRIED = (".safetensors", ".index.json", ".pt")


class Tensors:
    """A checkpoint's tensors by name, read when asked for."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder, self.files = folder, read_weight_files(folder)
        opened = {name: stack.enter_context(safe_open(folder / name, framework="pt")) for name in self.files}
        self._places = {key: opened[name] for name, file in self.files.items() for key in file.tensors}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors."""
        return {key: stored.shape for file in self.files.values() for key, stored in file.tensors.items()}

    def read(self, key: str) -> torch.Tensor:
        """One tensor."""
        return self._places[key].get_tensor(key)


@dataclass(frozen=True)
class Soup:
    """What a merge has made."""

    target: Path
    distances: list[float]
    """Of each source's weights from the first one's, by the norm of both."""
    tensors: int


def merge(target: Path, sources: Sequence[Path], weights: Sequence[float] | None = None, force: bool = False) -> Soup:
    """Write the weighted mean of checkpoints, all but the weights from the first; `target` then is whole or absent."""
    refuse_occupied(target)
    shares = shares_of(sources, weights)
    with ExitStack() as stack:
        models = [Tensors(source, stack) for source in sources]
        refuse_other_shapes(models)
        distances = [distance(models[0], model) for model in models]
        if not force:
            refuse_strangers(sources, distances)
        with new_folder(target) as folder:
            for name, file in models[0].files.items():
                write_weight_file(folder / name, file, means(models, shares, file), lambda size: None)
            if len(models[0].files) > 1:
                write_index(folder, models[0].files)
            carry_over(sources[0], folder)
            record = {"sources": [os.path.abspath(source) for source in sources], "weights": shares}
            (folder / RECORD).write_text(json.dumps(record | {"distances": distances}, indent=2) + "\n")
    return Soup(target, distances, len(models[0].shapes()))


def shares_of(sources: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    """Weights that sum to 1; equal ones when none are given."""
    weights = [1.0] * len(sources) if weights is None else list(weights)
    if len(sources) < 2:
        raise BadInput("a merge needs two checkpoints or more; for adapters name one and --adapter")
    if len(weights) != len(sources) or min(weights) <= 0:
        raise BadInput(f"--weights {weights}: give {len(sources)} numbers above 0, one for each checkpoint")
    return [weight / sum(weights) for weight in weights]


def refuse_other_shapes(models: Sequence[Tensors]) -> None:
    """All must have the same tensors."""
    first = models[0].shapes()
    for model in models[1:]:
        shapes = model.shapes()
        differing = sorted(key for key in first.keys() | shapes.keys() if first.get(key) != shapes.get(key))
        if differing:
            key = differing[0]
            raise BadInput(
                f"{model.folder} is another model than {models[0].folder}: {len(differing)} tensors differ, such as "
                f"{key}, {shapes.get(key, 'absent')} and {first.get(key, 'absent')}"
            )


def distance(first: Tensors, other: Tensors) -> float:
    """|a - b| / sqrt(|a| |b|) over all matrices: 0 for one model, about 1.4 for two that have nothing in common."""
    apart, norms = 0.0, [0.0, 0.0]
    for key, shape in first.shapes().items():
        if len(shape) < 2:
            continue  # norms and biases begin alike in all models
        ours, theirs = first.read(key).float(), other.read(key).float()
        apart += float((ours - theirs).square().sum(dtype=torch.float64))
        norms = [n + float(t.square().sum(dtype=torch.float64)) for n, t in zip(norms, (ours, theirs), strict=True)]
    return (apart / max((norms[0] * norms[1]) ** 0.5, 1e-30)) ** 0.5


def refuse_strangers(sources: Sequence[Path], distances: Sequence[float]) -> None:
    """Each must share an ancestor with the first, as recorded, or have weights close to it."""
    family = ancestors(str(sources[0]))
    for source, far in zip(sources, distances, strict=True):
        if far > RELATED and not family & ancestors(str(source)):
            raise BadInput(
                f"{source} and {sources[0]} share no ancestor: none is recorded, and their weights are {far:.2f} of "
                f"their norm apart (sisters: below {RELATED}). The mean would be a broken model; --force makes it"
            )


def ancestors(checkpoint: str) -> set[str]:
    """The checkpoint and all that it is recorded to come from."""
    folder = Path(checkpoint)
    found = {os.path.abspath(folder) if folder.is_dir() else checkpoint}
    for parent in parents(folder):
        found |= ancestors(parent)
    return found


def parents(folder: Path) -> list[str]:
    """What a merge has recorded, or the recipe of the run that wrote `final` or `checkpoints/step_N`."""
    if (folder / RECORD).is_file():
        return json.loads((folder / RECORD).read_text())["sources"]
    run = folder.parent if folder.name == "final" else folder.parent.parent
    if not (run / "config.yaml").is_file():
        return []
    recipe: dict[str, Any] = read_saved(run)
    model = recipe["model"]
    # A run from fresh weights: these follow from kind and seed.
    return [model["path"] or f"fresh weights: {model['random_init']}, seed {recipe['seed']}"]


def means(models: Sequence[Tensors], shares: Sequence[float], file: WeightFile) -> Iterator[torch.Tensor]:
    """The tensors of an output file, in its order."""
    for key in file.tensors:
        tensors = [model.read(key) for model in models]
        yield mean(tensors, shares) if tensors[0].is_floating_point() else tensors[0]


def mean(tensors: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    """The weighted mean, rounded once."""
    result = torch.empty_like(tensors[0])
    parts = zip(result.view(-1).split(AT_ONCE), *(tensor.view(-1).split(AT_ONCE) for tensor in tensors), strict=True)
    for written, *read in parts:
        written.copy_(sum(share * part.double() for share, part in zip(shares, read, strict=True)))
    return result


def carry_over(source: Path, folder: Path) -> None:
    """Configuration, tokenizer, processor: every file that holds no weights or optimizer."""
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(NOT_CARRIED) and file.name != RECORD:
            shutil.copyfile(file, folder / file.name)


def merge_adapter(target: Path, base: Path, adapter: Path) -> None:
    """Write a model with peft's adapters in its weights. The model is loaded whole."""
    import transformers
    from peft import PeftModel

    import sail_rl.model  # noqa: F401

    refuse_occupied(target)
    if not (adapter / "adapter_config.json").is_file():
        raise BadInput(f"--adapter {adapter}: there is no adapter_config.json")
    model = transformers.AutoModelForImageTextToText.from_pretrained(base, dtype="auto", trust_remote_code=False)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    with new_folder(target) as folder:
        carry_over(base, folder)
        merged.save_pretrained(folder)
        (folder / RECORD).write_text(
            json.dumps({"sources": [os.path.abspath(base)], "adapter": os.path.abspath(adapter)}) + "\n"
        )


@contextmanager
def evaluated(recipe_file: Path | None, target: Path, sources: Sequence[Path], weights: Sequence[float] | None):
    """Around a merge: the accuracies of its sources before and of its result after, told and kept in its record."""
    if recipe_file is None:
        yield
        return
    from sail_rl.checkpoint_accuracy import checkpoint_accuracy, read_eval_recipe

    recipe, shares = read_eval_recipe(recipe_file), shares_of(sources, weights) if len(sources) > 1 else [1.0]
    refuse_occupied(target)
    before = {os.path.abspath(source): checkpoint_accuracy(recipe, source) for source in sources}
    yield
    after = checkpoint_accuracy(recipe, target)
    record = json.loads((target / RECORD).read_text()) | {"before": before, "after": after}
    (target / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    for source, found in (before | {str(target): after}).items():
        print(f"accuracy {found['accuracy']:.3f} {found.get('kinds', '')} {source}", flush=True)
    accuracies = [before[os.path.abspath(source)]["accuracy"] for source in sources]
    if warning := loss_by_merging(accuracies, shares, after["accuracy"]):
        print(f"warning: {target} {warning}", file=sys.stderr, flush=True)


def loss_by_merging(sources: Sequence[float], shares: Sequence[float], merged: float) -> str | None:
    """How far a merge is below the mean of what it was made of; None where it is not."""
    expected = sum(share * accuracy for share, accuracy in zip(shares, sources, strict=True))
    return f"is worse than the mean of its sources: {merged:.3f} by {expected:.3f}" if merged < expected else None


def result_line(soup: Soup) -> str:
    """What was written, in one line."""
    far = ", ".join(f"{value:.3f}" for value in soup.distances[1:])
    return f"{soup.target}: the mean of {soup.tensors} tensors; distance of the others from the first: {far}"
