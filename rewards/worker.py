"""The body of a worker process: it does jobs one after another and ends with the trainer.

Two timers bound a job's CPU time. The first raises an exception, and the process goes on with the next job. Code that
never comes back to the interpreter, as a power of a thousand digits, is met by the second, which ends the process.
"""

import ctypes
import importlib
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

GRACE_SECONDS = 1.0  # of CPU time between the two timers
OUT_OF_MEMORY = 137  # the exit code, as shells say it
WATCH_SECONDS = 1.0
_END_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


class OutOfTime(BaseException):
    """A job has used up its CPU time. Not an Exception: those are caught everywhere in libraries."""


@dataclass(frozen=True)
class Job:
    """A call of the worker's function."""

    arguments: tuple[Any, ...]
    cpu_seconds: float
    wall_seconds: float
    """Counted from when a worker begins with it."""


@dataclass(frozen=True)
class Done:
    """How a job ended that did not end its worker."""

    value: Any = None
    error: Exception | None = None
    out_of_time: bool = False
    seconds: float = field(default=0.0, compare=False)


def serve(descriptor: int, parent: int, memory: int, name: str) -> None:
    """Load the function, then call it for jobs as they come, list by list, until the trainer is gone."""
    end_with(parent)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGVTALRM, raise_out_of_time)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    requests = Connection(descriptor)
    try:
        loaded = do(lambda: find(name))
        requests.send_bytes(packed(Done(error=loaded.error)))
        while loaded.error is None:
            for arguments, cpu_seconds in requests.recv():
                requests.send_bytes(packed(do(partial(unpack_and_call, loaded.value, arguments), cpu_seconds)))
    except (EOFError, ConnectionError):
        pass
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    os._exit(0)  # at once: threads of the jobs may be running


def unpack_and_call(function: Callable[..., Any], arguments: bytes) -> Any:
    """What cannot be unpacked here is the job's mistake, not the worker's."""
    return function(*pickle.loads(arguments))


def do(call: Callable[[], Any], cpu_seconds: float = 0) -> Done:
    """Make one call, within its CPU time where that is bounded; a lack of memory ends the process."""
    start = time.perf_counter()
    try:
        set_timers(cpu_seconds)
        try:
            done = Done(call())
        finally:
            set_timers(0)
    except OutOfTime:
        done = Done(out_of_time=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a job raises is its result
        done = Done(error=error)
    return replace(done, seconds=time.perf_counter() - start)


def set_timers(seconds: float) -> None:
    """Start both, or stop them with 0."""
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    signal.setitimer(signal.ITIMER_PROF, seconds and seconds + GRACE_SECONDS)


def raise_out_of_time(*_: Any) -> None:
    """The first timer's signal; one that comes late finds no job to end."""
    if signal.getitimer(signal.ITIMER_PROF)[0]:
        raise OutOfTime


def find(name: str) -> Callable[..., Any]:
    """The function of `package.module:name`, or a user's reward of `/path/file.py:name`, ready to be called."""
    from rewards.call import call_function
    from rewards.load import load_from_file

    place, _, function = name.rpartition(":")
    if place.endswith(".py"):
        return partial(call_function, load_from_file(name))
    return getattr(importlib.import_module(place), function)


def packed(done: Done) -> bytes:
    """A result as bytes; one that cannot be passed between processes becomes an error in words."""
    from rewards.call import RewardError, describe

    try:
        if done.error is not None and not isinstance(done.error, RewardError):  # perhaps of a class unknown to others
            done = replace(done, error=RewardError(describe(done.error)))
        return pickle.dumps(done)
    except MemoryError:
        raise
    except Exception as error:
        what = f"the result cannot be passed between processes: {type(error).__name__}: {error}"
        return pickle.dumps(Done(error=RewardError(what), seconds=done.seconds))


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends, also in the middle of a job and where the kernel does not help."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
    threading.Thread(target=watch, args=(parent,), daemon=True).start()


def watch(parent: int) -> None:
    """End this process once it has another parent, which it may have had from the start."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)
