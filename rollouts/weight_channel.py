"""Weights from device to device, past HTTP: a process group of two, a trainer and one of its servers.

NCCL between GPUs; gloo between CPUs, where it is tested. What crosses are the data of the trainer's safetensors files,
one after another, so that a server that was started anew gets the same again while the model trains on. Names and
shapes come before, with the request. Nothing waits for ever: whoever sees the other end closes the group.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

TRAINER, SERVER = 0, 1
LENGTH_BYTES = 8  # before the header of a safetensors file
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "U8": "uint8"}
Header = dict[str, Any]


def device() -> torch.device:
    """Where the other one's tensors go."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def group_of_two(store: Any, rank: int, limit: float) -> Any:
    """A process group that is none of torch's default one."""
    timeout = timedelta(seconds=limit)
    if not torch.cuda.is_available():
        return ProcessGroupGloo(store, rank, 2, timeout)
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return ProcessGroupNCCL(store, rank, 2, options)


class Sender:
    """The trainer's end."""

    def __init__(self, host: str, limit: float):
        self.limit = limit
        self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=limit))
        self.address = [host, self.store.port]
        self.group: Any = None

    def told(self, files: Sequence[Path]) -> dict[str, Any]:
        """What the server must know of a push."""
        return {"address": self.address, "limit": self.limit, "headers": [header_of(file)[0] for file in files]}

    def send(self, files: Sequence[Path]) -> None:
        """All files' data, one file in the device's memory at a time."""
        if self.group is None:
            self.group = group_of_two(PrefixStore("weights", self.store), TRAINER, self.limit)
        for file in files:
            _, start = header_of(file)
            content = torch.from_numpy(np.fromfile(file, dtype=np.uint8, offset=start)).to(device())
            exchanged(self.group.send([content], SERVER, 0), self.limit)

    def close(self) -> None:
        """Nobody waits in it any longer."""
        if self.group is not None:
            self.group.abort()
        self.group = None


class Receiver:
    """The server's end."""

    def __init__(self, address: Sequence[Any], limit: float):
        self.address, self.limit = list(address), limit
        host, port = address
        store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=limit))
        self.group = group_of_two(PrefixStore("weights", store), SERVER, limit)

    def receive(self, headers: Sequence[Mapping[str, Header]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors; those of a file are gone when the next one comes."""
        for header in headers:
            size = max(told["data_offsets"][1] for told in header.values())
            content = torch.empty(size, dtype=torch.uint8, device=device())
            exchanged(self.group.recv([content], TRAINER, 0), self.limit)
            for name, told in sorted(header.items()):
                start, end = told["data_offsets"]
                yield name, content[start:end].view(getattr(torch, DTYPES[told["dtype"]])).view(told["shape"])

    def close(self) -> None:
        """The trainer is gone, or has made another one."""
        self.group.abort()


def exchanged(work: Any, limit: float) -> None:
    """Wait until the tensor has crossed."""
    work.wait(timedelta(seconds=limit))
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # NCCL's `wait` is for the stream alone


def header_of(file: Path) -> tuple[dict[str, Header], int]:
    """A safetensors file's names with types, shapes and places, and where its data begin."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return header, LENGTH_BYTES + length
