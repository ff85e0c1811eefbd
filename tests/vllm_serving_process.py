"""`vllm serve` on a CPU as a context: its engine in processes of its own."""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import BIN, ROOT
from vllm_answers import ENGINE

OPTIONS = ("--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1")


@contextmanager
def vllm_serve(model: Path, log: Path, *options: str) -> Iterator[str]:
    """The address for OpenAI's clients, where the model's name is `tiny`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [BIN / "vllm", "serve", model, *OPTIONS, "--port", str(port), "--served-model-name", "tiny", *options],
        cwd=ROOT,
        env=os.environ | ENGINE | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for(server, log, f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def wait_for(server: subprocess.Popen, log: Path, url: str) -> None:
    """Until the server answers; what it said, if it ends instead."""
    for _ in range(300):
        if server.poll() is not None:
            raise AssertionError(log.read_text()[-5000:])
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"{url} did not answer in time")
