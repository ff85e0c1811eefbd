"""Sides of a comparison in turn, each in a process of its own, as a trainer is.

In one process what one side frees is what the next is given, and that changes how fast both are. A step right after
somebody else's turn finds its memory cold, and what it had freed given back. So the first step of a turn is not
counted, and after it come as many as fit into the same few seconds.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from statistics import fmean
from typing import Any

from benchmarks.common import prepare_process
from rewards.worker import end_with
from sail_rl.heap import LARGE_PAGES, TUNABLES

SECONDS = 4.0
Figures = dict[str, float]
steps: list[Callable[[], Figures]] = []  # the one of this process


def take_turns(sides: Mapping[str, Sequence[Any]], rounds: int, warm_up: int = 1) -> dict[str, list[Figures]]:
    """The means of each side's turns. A side is a function that makes a step, and its arguments; a step returns what it
    measured by name."""
    with ExitStack() as stack:
        players = {name: stack.enter_context(own_process()) for name in sides}
        for name, (make_step, *arguments) in sides.items():
            with pages_of(name):
                players[name].submit(begin, make_step, arguments, warm_up).result()
        turns: dict[str, list[Figures]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, player in players.items():
                turns[name].append(player.submit(one_turn).result())
                print(f"{name}: { {key: round(value, 2) for key, value in turns[name][-1].items()} }", flush=True)
    return turns


@contextmanager
def pages_of(side: str) -> Iterator[None]:
    """A process that begins meanwhile has memory as that side's trainer has: ours asks for large pages, TRL's does not,
    and is slower with them, since it fills so much new memory."""
    withheld = side == "trl" and os.environ.get(TUNABLES) == LARGE_PAGES
    if withheld:
        del os.environ[TUNABLES]
    try:
        yield
    finally:
        if withheld:
            os.environ[TUNABLES] = LARGE_PAGES


def own_process() -> ProcessPoolExecutor:
    """A fresh process that stays until the end, also until an untimely one of this process."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with, initargs=(os.getpid(),))


def begin(make_step: Callable[..., Callable[[], Figures]], arguments: Sequence[Any], warm_up: int) -> None:
    """In the side's process: make ready, and warm up."""
    prepare_process()
    steps[:] = [make_step(*arguments)]
    for _ in range(warm_up):
        steps[0]()


def one_turn() -> Figures:
    """In the side's process: steps for some seconds, and the means of what they measured."""
    gc.collect()  # not before each step: it takes as long as a small one, and leaves the second core cold
    steps[0]()
    began, figures = time.perf_counter(), [steps[0]()]
    while time.perf_counter() - began < SECONDS:
        figures.append(steps[0]())
    return {name: fmean(one[name] for one in figures) for name in figures[0]}
