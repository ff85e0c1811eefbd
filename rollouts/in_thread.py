"""Work beside the trainer's own thread."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any


def in_thread(work: Callable[..., Any], *arguments: Any) -> Future:
    """What a thread of its own makes of it; the thread does not keep an interrupted program alive."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as mistake:
            future.set_exception(mistake)

    Thread(target=run, daemon=True).start()
    return future
