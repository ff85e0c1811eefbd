"""Processes that prepare rows while the trainer does something else.

Each has a thread in the trainer that hands it one row at a time, so it is always known which row a process was at when
it ended. Nothing but the standard library is imported at the top: a new process sets its threads before numpy and torch
are loaded. What is prepared comes back through a pipe: shared memory would need a file descriptor for each tensor and
room in /dev/shm, which containers keep small.
"""

import atexit
import importlib
import io
import os
import pickle
import signal
import sys
import threading
import traceback
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process, resource_tracker
from queue import SimpleQueue
from typing import Any

SPAWN = get_context("spawn")  # a fork would copy locks that threads of torch hold
FOR_THE_TRAINER = (signal.SIGINT, signal.SIGTERM)  # which terminals and launchers send to all of its processes
LAST_WORDS = 2.0  # seconds, for a thread whose process has been killed
ATTEMPTS = 2  # at a row whose process ends: the first end may be bad luck, the second is the row's
# To start a process is also to collect the exit codes of ended ones, each of which can be had once.
ONE_AT_A_TIME = threading.Lock()
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Task:
    """One row to prepare."""

    source: int
    """Which of the loaders."""
    position: int
    """In the stream."""
    index: int
    """Of the row."""
    result: Future = field(default_factory=Future)


class Workers:
    """A fixed number of processes, for all the streams of a run. They end with the trainer, however it ends."""

    def __init__(self, count: int, imports: tuple[str, ...] = ()):
        self.count = count
        self._imports = imports  # modules that take long to load: each process begins with them, before its first row
        self._loaders: list[tuple[Any, bytes]] = []
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._started: list[Worker] = []
        self._closed, self._lock = False, threading.Lock()
        atexit.register(self.close)
        # The first process would start it, and that unblocks the signals which `_serve` blocks.
        resource_tracker.ensure_running()
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def add(self, loader: Any) -> int:
        """Make known whose `load(position, index)` prepares rows of a source; its number."""
        self._loaders.append((loader, pickle.dumps(loader)))
        return len(self._loaders) - 1

    def submit(self, source: int, position: int, index: int) -> Future:
        """Have a row prepared; rows are begun in the order in which they are submitted."""
        task = Task(source, position, index)
        self._tasks.put(task)
        return task.result

    def close(self) -> None:
        """End all processes at once."""
        with self._lock:
            self._closed = True
        for worker in self._started:
            worker.process.kill()
            worker.exit_code()
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(LAST_WORDS)  # one that is at work while the interpreter ends may abort it
        atexit.unregister(self.close)

    def _serve(self) -> None:
        # Blocked in this thread, and so in the processes that it starts: they are for the trainer alone to answer.
        signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_TRAINER)
        worker = self._start()
        while worker and (task := self._tasks.get()):
            if worker.has_ended():  # no row is to blame
                worker = self._replace(worker, f"while idle ({worker.ending()})")
            if task.result.set_running_or_notify_cancel():
                worker = self._have_done(task, worker)

    def _start(self) -> "Worker | None":
        """A new process; None once there are to be no more."""
        with self._lock:
            if self._closed:
                return None
            self._started.append(Worker(self._imports))
            return self._started[-1]

    def _have_done(self, task: Task, worker: "Worker | None") -> "Worker | None":
        """Settle a task's result; the process that can take the next one."""
        name, ending = self._loaders[task.source][0].row_name(task.index), ""
        for _ in range(ATTEMPTS):
            if worker is None:
                return None
            try:
                reply = worker.ask(task, self._loaders[task.source][1])
            except (EOFError, ConnectionError):
                ending = worker.ending()
                worker = self._replace(worker, f"at {name} ({ending})")
                continue
            settle(task.result, reply)
            return worker
        from sail_rl.data.images import BadRow

        task.result.set_exception(BadRow(f"{ATTEMPTS} processes have ended while preparing it ({ending})"))
        return worker

    def _replace(self, worker: "Worker", ending: str) -> "Worker | None":
        """A new process in the place of one that has ended, unless the end is wanted."""
        replacement = self._start()
        if replacement:
            self._started.remove(worker)
            # One write: `print` writes the end of the line apart, and several threads may come here at once.
            sys.stderr.write(f"warning: a data worker ended {ending}; a new one goes on\n")
        return replacement


class Worker:
    """One process and the trainer's end of its pipe."""

    def __init__(self, imports: tuple[str, ...]):
        self.connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=work, args=(theirs, imports), daemon=True)
        with ONE_AT_A_TIME:
            self.process.start()
        theirs.close()  # so that reading fails, and does not wait, when the process has ended
        self.known_sources: set[int] = set()

    def ask(self, task: Task, loader: bytes) -> bytes:
        """Send a task, with its loader when it is the first of its source, and wait for the reply."""
        sent = None if task.source in self.known_sources else loader
        self.connection.send((task.source, sent, task.position, task.index))
        self.known_sources.add(task.source)
        return self.connection.recv_bytes()

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return bool(connection.wait([self.process.sentinel], timeout=0))

    def exit_code(self) -> int:
        """Of a process that is about to end or has ended."""
        with ONE_AT_A_TIME:
            self.process.join()
            return self.process.exitcode or 0

    def ending(self) -> str:
        """How the process has ended, in words."""
        code = self.exit_code()
        if code >= 0:
            return f"exit code {code}"
        hint = ": out of memory?" if -code == signal.SIGKILL else ""
        return signal.Signals(-code).name + hint


def settle(result: Future, reply: bytes) -> None:
    """Put what came back where the trainer will look for it."""
    try:
        answer = pickle.loads(reply)
    except Exception as error:  # whatever it is: left here, it would leave the trainer waiting for ever
        answer = error
    if isinstance(answer, Exception):
        result.set_exception(answer)
    else:
        result.set_result(answer)


def work(requests: connection.Connection, imports: tuple[str, ...]) -> None:
    """The body of a process: load rows as they are asked for, until the trainer is gone."""
    for number in FOR_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)  # blocked so far; a library may unblock it
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    threading.Thread(target=end_with_trainer, daemon=True).start()
    for module in imports:
        importlib.import_module(module)
    loaders: dict[int, Any] = {}
    with suppress(EOFError, ConnectionError):  # the trainer has ended
        while True:
            source, packed_loader, position, index = requests.recv()
            requests.send_bytes(prepared(loaders, source, packed_loader, position, index))


def end_with_trainer() -> None:
    """Also in the middle of a row, and also when the trainer was killed."""
    trainer = parent_process()
    assert trainer is not None
    connection.wait([trainer.sentinel])
    os._exit(1)


def prepared(loaders: dict[int, Any], source: int, packed_loader: bytes | None, position: int, index: int) -> bytes:
    """The item, or the exception that the trainer is to raise in its place."""
    from sail_rl.command_line import BadInput
    from sail_rl.data.images import BadRow

    try:
        if packed_loader is not None:
            loaders[source] = pickle.loads(packed_loader)
        item = loaders[source].load(position, index)
    except (BadRow, BadInput) as error:
        return pickle.dumps(error)
    except Exception:
        name = loaders[source].row_name(index) if source in loaders else f"row {index + 1}"
        return pickle.dumps(RuntimeError(f"{name} cannot be prepared:\n{traceback.format_exc()}"))
    try:
        return packed(item)
    except Exception as error:  # pickle raises its own, and whatever the objects in a row raise
        how = f"{type(error).__name__}: {error}"
        return pickle.dumps(BadRow(f"it cannot be passed between processes ({how}); set data.workers=0"))


class ItemPickler(pickle.Pickler):
    """Sends tensors as numpy arrays: torch's own way writes each as a file in memory, with several copies."""

    def reducer_override(self, value: Any) -> Any:
        """How a tensor is taken apart; all else as usual."""
        torch = sys.modules.get("torch")  # not loaded for rows that have no tensors
        return (torch.from_numpy, (value.numpy(),)) if torch and isinstance(value, torch.Tensor) else NotImplemented


def packed(item: Any) -> bytes:
    """An item as bytes."""
    buffer = io.BytesIO()
    ItemPickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(item)
    return buffer.getvalue()
