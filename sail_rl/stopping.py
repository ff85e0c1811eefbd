"""A signal ends a run early, with everything saved: SIGTERM, as clusters send it, and SIGINT (Ctrl-C) alike.

The step that runs is finished, its checkpoint written, and the process ends with PREEMPTED. Nothing is waited for that
can be had again: before and after the loop a run ends at once, an evaluation is given up after its batch, and one
process alone gives up a step whose completions are still being written (several may be at different places of it).
All processes stop after the same step, whichever the signal has reached. A second signal ends a process at once.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from sail_rl.data.stream import Shard

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
TOGETHER = 1.0  # seconds within which signals are one: a launcher passes on what its processes have received as well
HEARD = (signal.SIGTERM, signal.SIGINT)


class Preempted(BaseException):
    """The run is to end, and nothing is left to be saved. Not an Exception: those are caught everywhere."""


class GivenUp(Preempted):
    """The same, in the middle of something."""


class Asked:
    """What has come so far. One for the process, as its signals are."""

    number: signal.Signals | None = None
    at = 0.0
    waits = False
    """Whether a signal waits for somebody to ask."""


def listen() -> None:
    """From here on, signals are answered."""
    for number in HEARD:
        signal.signal(number, answer)


def answer(number: int, frame: FrameType | None) -> None:
    """A signal has come."""
    if Asked.number is None:
        Asked.number, Asked.at = signal.Signals(number), time.monotonic()
        if Asked.waits and os.environ.get("RANK", "0") == "0":
            # Not by print: a signal may come in the middle of another one.
            os.write(2, f"\n{Asked.number.name}: saving after this step; another one ends the run at once\n".encode())
        if not Asked.waits:
            raise GivenUp
    elif time.monotonic() - Asked.at > TOGETHER:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextmanager
def waiting(waits: bool = True) -> Iterator[None]:
    """Within it, a signal waits until the end of the step, or does not wait."""
    before, Asked.waits = Asked.waits, waits
    try:
        if Asked.number and not waits:
            raise GivenUp
        yield
    finally:
        Asked.waits = before


def given_up_alone(shard: Shard) -> AbstractContextManager:
    """Within it, signals to a single process do not wait; several would have to give up the same step."""
    return waiting(shard.world_size > 1)


def give_up_if_asked(shard: Shard) -> None:
    """For what can be given up at places that all processes reach together."""
    if asked(shard):
        raise GivenUp


def asked(shard: Shard) -> bool:
    """Whether a signal has reached any process."""
    return any(shard.gather([Asked.number is not None]))
