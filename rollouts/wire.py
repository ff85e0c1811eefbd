"""What crosses between a trainer and its rollout servers: JSON and safetensors, nothing that could run code.

The body of a request is a row of frames, each eight bytes of length and a safetensors file. The first one's metadata
hold the message as JSON, its tensors pictures or files; further ones hold weights. An answer
is lines of JSON: `{"part": ...}` for each group, then `{"answer": ...}` or `{"error": ..., "status": ...}`.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import asdict, dataclass
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save, save_file

from rollouts import Filters, Prompt, Rollout, Sampling
from rollouts.picture_tokens import PictureTokens
from rollouts.vllm_colocate import Received
from rollouts.vllm_compat import EngineSettings

LENGTH_BYTES = 8
SHARD = 2**28  # bytes of weights that are held at once, beside the model


@dataclass(frozen=True)
class Setup:
    """All that a server needs to make a trainer's engine, save weights."""

    files: Mapping[str, bytes]
    """Configuration, tokenizer and processor, by their names within a folder."""
    end_token_ids: list[int]
    suppressed_token_ids: list[int]
    weight_names: list[str]
    picture: PictureTokens
    settings: EngineSettings


def pack(message: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> bytes:
    """A message as the content of a frame."""
    return save(dict(tensors or {}), metadata={"message": json.dumps(message, sort_keys=True)})


def unpack(content: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A frame's message and its tensors."""
    size = int.from_bytes(content[:LENGTH_BYTES], "little")
    header = json.loads(content[LENGTH_BYTES : LENGTH_BYTES + size])
    return json.loads(header["__metadata__"]["message"]), load(content)


def length_of(content: Sized) -> bytes:
    """What goes before a frame's content."""
    return len(content).to_bytes(LENGTH_BYTES, "little")


def frames(stream: BufferedIOBase, size: int) -> Iterator[bytes]:
    """The contents of all frames of a body of `size` bytes."""
    while size:
        length = int.from_bytes(exactly(stream, LENGTH_BYTES), "little")
        size -= LENGTH_BYTES + length
        if size < 0:
            raise ValueError("a frame is longer than its request")
        yield exactly(stream, length)


def exactly(stream: BufferedIOBase, size: int) -> bytes:
    """So many bytes; fewer are a lost connection."""
    content = stream.read(size)
    if len(content) < size:
        raise ConnectionError("the connection was lost in the middle of a request")
    return content


# ---- the engine's setup


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def pack_setup(setup: Setup) -> bytes:
    """The same setup gives the same bytes."""
    tensors = {name: torch.frombuffer(bytearray(text), dtype=torch.uint8) for name, text in setup.files.items() if text}
    message = {name: value for name, value in vars(setup).items() if name != "files"}
    return pack(message | {"picture": asdict(setup.picture), "settings": asdict(setup.settings)}, tensors)


def unpack_setup(content: bytes) -> Setup:
    """What `pack_setup` has packed."""
    message, tensors = unpack(content)
    around = message["picture"].pop("around")
    picture = PictureTokens(**message.pop("picture"), around=tuple(around) if around else None)
    files = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return Setup(files=files, picture=picture, settings=EngineSettings(**message.pop("settings")), **message)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put files into a folder, and none elsewhere."""
    for name, content in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name!r} is not the name of a file within a folder")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


# ---- weights


def write_shards(folder: Path, parameters: Iterable[tuple[str, torch.Tensor]]) -> list[Path]:
    """Files of a limited size with all weights, which only one of them is ever held of."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for shard in shards_of(parameters):
        paths.append(folder / f"{len(paths)}.safetensors")
        save_file(shard, paths[-1])
    return paths


def shards_of(parameters: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """The weights in parts of about `SHARD` bytes, in main memory."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in parameters:
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        if size >= SHARD:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


# ---- prompts and completions


def pack_prompts(prompts: Sequence[Prompt], **more: Any) -> bytes:
    """Prompts as the engine reads them: tokens and pictures, which its own processor prepares."""
    pictures = {f"{n}.{k}": image for n, prompt in enumerate(prompts) for k, image in enumerate(prompt.images)}
    told = [
        {"id": p.id, "token_ids": p.token_ids, "seed": p.seed, "images": [(i.mode, i.size) for i in p.images]}
        for p in prompts
    ]
    tensors = {name: torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8) for name, i in pictures.items()}
    return pack({"prompts": told} | more, tensors)


def unpack_prompts(message: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> list[Prompt]:
    """The prompts of a message."""
    found = []
    for n, told in enumerate(message["prompts"]):
        images = tuple(
            Image.frombytes(mode, tuple(size), tensors[f"{n}.{k}"].numpy().tobytes())
            for k, (mode, size) in enumerate(told["images"])
        )
        found.append(Prompt(told["id"], told["token_ids"], images, seed=told["seed"]))
    return found


def pack_question(prompts: Sequence[Prompt], group_size: int, sampling: Sampling, weights: str) -> bytes:
    """A request for completions, which only an engine with these weights may answer."""
    return pack_prompts(prompts, group_size=group_size, sampling=asdict(sampling), weights=weights)


def sampling_of(told: Mapping[str, Any]) -> Sampling:
    """How a request wants its tokens drawn."""
    return Sampling(**{**told, "filters": Filters(**told["filters"]), "stop": tuple(told["stop"])})


def mark(prompt: Prompt) -> int:
    """What an answer names its prompt by: an answer to another one is noticed."""
    return zlib.crc32(np.asarray([prompt.seed, *prompt.token_ids], dtype="<u8").tobytes())


def group_told(place: int, prompt: Prompt, group: Sequence[Rollout]) -> dict[str, Any]:
    """A prompt's completions as an answer has them."""
    return {"place": place, "prompt": mark(prompt), "rollouts": [asdict(rollout) for rollout in group]}


class WrongAnswer(Exception):
    """An answer that is not one to its question."""


def group_of(
    told: Any, prompts: Sequence[Prompt], group_size: int, broken: Callable[[Rollout], str | None]
) -> tuple[int, list[Rollout]]:
    """A group of an answer, with its place: it must be whole, of its prompt, and without a broken completion."""
    try:
        place, marked = int(told["place"]), told["prompt"]
        group = [Rollout(**rollout) for rollout in told["rollouts"]]
        faults = [fault for rollout in group if (fault := broken(rollout))]
    except (KeyError, TypeError, ValueError) as mistake:
        raise WrongAnswer(f"it answers in another form: {mistake!r}") from mistake
    if not 0 <= place < len(prompts) or marked != mark(prompts[place]):
        raise WrongAnswer("it answers other prompts")
    if len(group) != group_size:
        raise WrongAnswer(f"it answers with {len(group)} completions of a prompt, not {group_size}")
    if faults:
        raise WrongAnswer(f"it answers with {faults[0]}")
    return place, group


def broken(rollout: Rollout, allowed: Set[int], most: int, version: int | None) -> str | None:
    """What is wrong with a completion, in words."""
    ids = rollout.token_ids
    if not 0 < len(ids) <= most:
        return f"a completion of {len(ids)} tokens"
    if len(rollout.log_probs) != len(ids):
        return f"{len(rollout.log_probs)} log-probabilities for {len(ids)} tokens"
    if strange := set(ids) - allowed:
        return f"the token {min(strange)}, which the model cannot write"
    if rollout.finish_reason not in ("stop", "length"):
        return f"the finish reason {rollout.finish_reason!r}"
    if rollout.weight_version != version:
        return f"weights of version {rollout.weight_version}, not {version}"
    return None


def received_told(received: Received) -> dict[str, Any]:
    """What reached the engine's model, as an answer has it."""
    return asdict(received)
