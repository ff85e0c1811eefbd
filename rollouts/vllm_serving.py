"""The process of a rollout server: the in-process engine of vllm_colocate.py behind HTTP.

It starts empty. A trainer sends the engine's setup (`/start`), then weights (`/push`) and prompts (`/generate`).
Threads read requests; the engine belongs to the main thread, which answers one request after another. There is no
authentication: it is for one machine, or for a network whose members trust each other.
"""

import argparse
import ctypes
import hashlib
import json
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from safetensors.torch import load

from rollouts import Prompt, Rollout, Sampling, wire
from rollouts.vllm_colocate import VLLMEngine
from rollouts.vllm_compat import refused
from rollouts.weight_channel import Receiver

PR_SET_PDEATHSIG = 1
LISTENING = "waiting for a trainer"


class NotReady(Exception):
    """The engine lacks what the request needs; the trainer is to send it first."""


@dataclass
class Job:
    """A request on its way to the main thread."""

    path: str
    content: bytes
    """The first frame."""
    more: Iterator[bytes]
    told: "queue.SimpleQueue[dict[str, Any] | Exception]" = field(default_factory=queue.SimpleQueue)
    """Lines of the answer; the last one has `answer`, or is an error."""


class Host:
    """The engine, once a trainer has sent its setup, and which weights it has."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.setup: str | None = None
        self.engine: VLLMEngine | None = None
        self.weights: str | None = None
        self.channel: Receiver | None = None

    def work(self, job: Job) -> dict[str, Any]:
        """The answer to a request."""
        if job.path == "/start":
            return self.start(job.content)
        if self.engine is None:
            raise NotReady("the server has no model yet")
        message, tensors = wire.unpack(job.content)
        if job.path == "/push":
            return self.push(self.engine, message, job.more)
        prompts = wire.unpack_prompts(message, tensors)
        if job.path == "/receive":
            return wire.received_told(self.engine.receive(prompts[0]))
        if job.path != "/generate":
            raise ValueError(f"there is no {job.path}")
        if self.weights != message["weights"]:
            raise NotReady(f"the server has the weights {self.weights}, not {message['weights']}")
        return self.generate(self.engine, prompts, message["group_size"], wire.sampling_of(message["sampling"]), job)

    def start(self, content: bytes) -> dict[str, Any]:
        """Make the engine, unless it is there already."""
        digest = hashlib.sha256(content).hexdigest()
        if self.setup not in (None, digest):
            raise ValueError("the server already has the engine of another model or recipe: start it anew")
        if self.engine is None:
            setup = wire.unpack_setup(content)
            wire.write_files(self.folder, setup.files)
            print("starting vLLM", flush=True)
            try:
                self.engine, self.setup = make_engine(self.folder, setup), digest
            except ValueError as mistake:  # such as too little memory: not the request's fault, and it may pass
                raise RuntimeError(str(mistake)) from mistake
            print("vLLM has started", flush=True)
        return {}

    def generate(
        self, engine: VLLMEngine, prompts: list[Prompt], group_size: int, sampling: Sampling, job: Job
    ) -> dict[str, Any]:
        """Tell each group as soon as it is whole; a prompt that is too long is the request's fault."""

        def finished(place: int, group: list[Rollout]) -> None:
            job.told.put({"part": wire.group_told(place, prompts[place], group)})

        try:
            engine.generate(prompts, group_size, sampling, finished)
        except refused() as mistake:
            raise ValueError(str(mistake)) from mistake
        return {}

    def push(self, engine: VLLMEngine, message: dict[str, Any], more: Iterator[bytes]) -> dict[str, Any]:
        """Take weights; none are left if they do not all come."""
        self.weights = None
        if told := message.get("channel"):
            weights = self.channel_to(told["address"], told["limit"]).receive(told["headers"])
        else:
            weights = (pair for content in more for pair in sorted(load(content).items()))
        engine.load_weights(weights, message["version"])
        self.weights = message["weights"]
        return {}

    def channel_to(self, address: list[Any], limit: float) -> Receiver:
        """The one to a trainer, which makes another one after a fault."""
        if self.channel is None or self.channel.address != address:
            if self.channel is not None:
                self.channel.close()
            self.channel = None
            self.channel = Receiver(address, limit)
        return self.channel


def make_engine(folder: Path, setup: wire.Setup) -> VLLMEngine:
    """The engine of a setup whose files are in the folder."""
    from transformers import PreTrainedTokenizerFast

    return VLLMEngine(
        folder,
        PreTrainedTokenizerFast.from_pretrained(folder),
        setup.end_token_ids,
        setup.suppressed_token_ids,
        setup.weight_names,
        setup.picture,
        setup.settings,
    )


class Handler(BaseHTTPRequestHandler):
    """Hands requests to the main thread and sends its answers back."""

    server: "Server"

    def do_POST(self) -> None:
        """Any request; an error is answered with its text, and a status that says whose it is."""
        self.connection.settimeout(float(self.headers["X-Limit"]))  # a trainer that hangs must not hold the engine
        frames = wire.frames(self.rfile, int(self.headers["Content-Length"]))
        job = Job(self.path, next(frames), frames)
        self.server.jobs.put(job)
        line = job.told.get()
        if isinstance(line, Exception):
            for _ in frames:  # the trainer listens when it has sent everything
                pass
        self.send_response(line_status(line))
        self.end_headers()
        while True:  # the answer ends with the connection
            self.wfile.write(json.dumps(as_line(line)).encode() + b"\n")
            if isinstance(line, Exception) or "answer" in line:
                return
            line = job.told.get()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not logged."""


def line_status(line: dict[str, Any] | Exception) -> int:
    """Whose mistake it is, if it is one."""
    if not isinstance(line, Exception):
        return 200
    return 409 if isinstance(line, NotReady) else 400 if isinstance(line, ValueError) else 500


def as_line(line: dict[str, Any] | Exception) -> dict[str, Any]:
    """What is sent of it."""
    if not isinstance(line, Exception):
        return line
    return {"error": f"{type(line).__name__}: {line}", "status": line_status(line)}


class Server(ThreadingHTTPServer):
    """Listens, with a queue to the main thread."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, listening: socket.socket):
        super().__init__(listening.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.jobs: queue.Queue[Job] = queue.Queue()


def serve(listening: socket.socket, folder: Path) -> None:
    """Answer requests for ever."""
    server, host = Server(listening), Host(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"rollout server on http://{':'.join(map(str, listening.getsockname()[:2]))}: {LISTENING}", flush=True)
    while True:
        job = server.jobs.get()
        try:
            job.told.put({"answer": host.work(job)})
        except Exception as mistake:
            print(f"{job.path}: {type(mistake).__name__}: {mistake}", file=sys.stderr, flush=True)
            job.told.put(mistake)


def serve_for_anyone(address: str, port: int) -> None:
    """A server that its user starts and ends."""
    with tempfile.TemporaryDirectory(prefix="rollout_server_") as folder:
        serve(socket.create_server((address, port)), Path(folder))


def die_with_parent() -> None:
    """End when the trainer does, however it ends: by the kernel's signal, and when the pipe from it closes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """A server that a trainer has started, on a socket that is open already."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("socket", type=int, help="number of the open socket")
    parser.add_argument("folder", type=Path, help="where the trainer's files are put")
    arguments = parser.parse_args()
    die_with_parent()
    serve(socket.socket(fileno=arguments.socket), arguments.folder)


if __name__ == "__main__":
    main()
