"""One rollout server as a trainer sees it: a process of its own or an address, and requests with a limit of time."""

import json
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rollouts import wire

NEW_TRY = 0.5  # seconds until a server that does not listen yet is tried again
PIECE = 2**20
LOG_END = 600  # characters of a dead server's log that are shown
# What launchers tell their processes; the server is a run of its own.
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")


class ServerFault(Exception):
    """A server is gone, late or wrong. Trying again may help."""


class Refused(ServerFault):
    """A server says that the request itself is wrong. Trying again does not help."""


class Lacking(ServerFault):
    """A server that is well lacks the model, or the newest weights."""


KINDS = {400: Refused, 409: Lacking}


class Link:
    """A server, by its address."""

    process: subprocess.Popen | None = None
    """The server's, if this process has started it."""

    def __init__(self, url: str):
        self.url = url

    def call(
        self,
        path: str,
        limit: float,
        content: bytes,
        files: Iterable[Path] = (),
        patient: bool = False,
        each: Callable[[Any], object] = lambda part: None,
    ) -> Any:
        """The answer to a request: a message, then files. A patient call waits for a server that does not listen yet.

        All of it may take `limit` seconds. `each` is given the parts of the answer as they come.
        """
        deadline = time.monotonic() + limit
        files = list(files)
        size = sum(wire.LENGTH_BYTES + length for length in (len(content), *(file.stat().st_size for file in files)))
        try:
            connection = self._connect(deadline, patient)
            connection.putrequest("POST", path)
            connection.putheader("Content-Length", str(size))
            connection.putheader("X-Limit", str(limit))
            connection.endheaders()
            send(connection.sock, content, deadline)
            for file in files:
                with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                    send(connection.sock, mapped, deadline)
            status, answer = receive(connection, deadline, each)
        except (OSError, HTTPException, ValueError) as mistake:
            late = f"no answer within {limit:g} s" if isinstance(mistake, TimeoutError) else repr(mistake)
            raise ServerFault(f"{self.url}{path}: {late}{self.last_words()}") from mistake
        if status != 200:
            raise KINDS.get(status, ServerFault)(f"{self.url}{path}: {answer} (status {status})")
        return answer

    def _connect(self, deadline: float, patient: bool) -> HTTPConnection:
        address = urlsplit(self.url)
        while True:
            connection = HTTPConnection(address.hostname or "", address.port, timeout=left(deadline))
            try:
                connection.connect()
                return connection
            except ConnectionRefusedError:
                if not patient or self.process or time.monotonic() + NEW_TRY > deadline:
                    raise
                time.sleep(NEW_TRY)

    def own_address(self, limit: float) -> str:
        """This machine's address, as the server can reach it."""
        address = urlsplit(self.url)
        try:
            with socket.create_connection((address.hostname or "", address.port or 80), limit) as connection:
                return connection.getsockname()[0]
        except OSError as mistake:
            raise ServerFault(f"{self.url}: {mistake!r}{self.last_words()}") from mistake

    def last_words(self) -> str:
        """How a process of ours has ended, for a message."""
        return ""


class OwnLink(Link):
    """A server that this process starts, and that ends with it."""

    def __init__(self, folder: Path, number: int):
        super().__init__("")
        self.folder = folder / f"engine_{number}"
        self.log = folder / f"server_{number}.log"

    def start(self) -> None:
        """A new process, which listens at once, and has no engine yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listening, self.log.open("ab") as log:
            number = str(listening.fileno())
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rollouts.vllm_serving", number, str(self.folder)],
                pass_fds=[listening.fileno()],
                stdin=subprocess.PIPE,  # nothing is written: it closes when this process ends
                stdout=log,
                stderr=log,
                env={name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)},
                start_new_session=True,  # an interrupt from the keyboard is for the trainer
            )
            self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"

    def end(self) -> None:
        """Kill the process, also one that hangs."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()  # type: ignore[union-attr]
            self.process = None

    def last_words(self) -> str:
        """Its exit code and the end of its log, once it has ended."""
        if self.process is None:
            return ""
        try:
            code = self.process.wait(timeout=1)  # a connection may be lost before the process has quite ended
        except subprocess.TimeoutExpired:
            return ""
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"; it {ended}; the end of {self.log}:\n{self.log.read_text(errors='replace')[-LOG_END:].strip()}"


def left(deadline: float) -> float:
    """Seconds until the deadline, of which there must be some."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def send(connection: socket.socket, content: bytes | mmap.mmap, deadline: float) -> None:
    """One frame."""
    connection.settimeout(left(deadline))
    connection.sendall(wire.length_of(content))
    connection.settimeout(left(deadline))
    connection.sendall(content)


def receive(connection: HTTPConnection, deadline: float, each: Callable[[Any], object]) -> tuple[int, Any]:
    """Status and answer, or what is said of an error; parts are handed on before."""
    link = connection.sock
    link.settimeout(left(deadline))
    response = connection.getresponse()
    for line in lines_of(response, link, deadline):
        told = json.loads(line)
        if not isinstance(told, dict) or not told.keys() & {"part", "answer", "error"}:
            return response.status, told
        if "answer" in told:
            return response.status, told["answer"]
        if "error" in told:
            return told.get("status", response.status), told["error"]
        each(told["part"])
    raise ConnectionError("the answer is cut short")


def lines_of(response: HTTPResponse, link: socket.socket, deadline: float) -> Iterator[bytes]:
    """Whole lines as they come, read a piece at a time, so that a server that dawdles is cut off as well."""
    rest = b""
    while piece := response.read1(PIECE):
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
        link.settimeout(left(deadline))
    if rest:
        yield rest
