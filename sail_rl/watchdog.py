"""Ends a run that hangs, with a report: which phase of which step, on which process, and the stacks of all threads."""

import faulthandler
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

STUCK = 70  # EX_SOFTWARE of sysexits.h
MOST_SECONDS_BETWEEN_LOOKS = 10.0


class Pulse:
    """The last sign of progress in this process."""

    what = "the start"
    step = 0
    idle = 0.0
    """Seconds since then. Counted by looks: in a process that was stopped for a while, no time has passed."""
    watched = False


def mark(what: str) -> None:
    """Something has begun or ended, or a part of it is done. Called by any thread."""
    Pulse.what, Pulse.idle = what, 0.0


@contextmanager
def watching(limit: float, rank: int) -> Iterator[None]:
    """Within it, the process ends when there is no sign of progress for so many seconds."""
    mark("the start of the loop")
    Pulse.watched = True
    Thread(target=look, args=(limit, rank), daemon=True).start()
    try:
        yield
    finally:
        Pulse.watched = False


def look(limit: float, rank: int) -> None:
    """Look again and again."""
    pause = min(limit / 10, MOST_SECONDS_BETWEEN_LOOKS)
    while Pulse.watched:
        time.sleep(pause)
        Pulse.idle += pause
        if Pulse.idle > limit:
            report(rank)
            os._exit(STUCK)


def report(rank: int) -> None:
    """What is stuck, and where every thread is."""
    print(
        f"\nerror: process {rank} is stuck in step {Pulse.step}: nothing has happened for {Pulse.idle:.0f} s "
        f"(trainer.stuck_after) since {Pulse.what}. It ends with code {STUCK}; the same command goes on from the "
        "newest checkpoint. Its threads:",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
