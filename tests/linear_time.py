"""Whether work grows with the text's length, or with its square; on a machine that other programs disturb."""

import time
from collections.abc import Callable

TRIES = 20


def takes_linear_time(work: Callable[[int], object]) -> bool:
    """Whether `work(8)`, on an eightfold text, takes less than 24 times `work(1)`: 8 when linear, 64 when quadratic.

    A disturbed measurement can only be too long, so the shortest times are compared, and measured again while in doubt.
    """
    short, long = float("inf"), float("inf")
    for _ in range(TRIES):
        short = min(short, _cpu_seconds(work, 1))
        long = min(long, _cpu_seconds(work, 8))
        if long < 24 * short + 0.02:
            return True
    return False


def _cpu_seconds(work: Callable[[int], object], times: int) -> float:
    start = time.process_time()
    work(times)
    return time.process_time() - start
