"""Symbolic algebra in worker processes: one pool for the whole program, started by the first question.

Whoever asks (the main thread, a thread, a coroutine) gets the same replies, and nobody can be held up for ever.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

from rewards.call import RewardError
from rewards.pool import Pool, Result
from rewards.symbolic import Algebra, Question, Reply, Unanswered
from rewards.verdict import Outcome
from rewards.worker import Job

CPU_SECONDS = 1.0  # for one question; nearly all take milliseconds
WALL_SECONDS = 30.0  # on a machine that is busy with other things
MEMORY = 2 << 30  # bytes for each worker
RECYCLE_AFTER = 2_000  # questions: sympy's caches grow
MOST_WORKERS = 4
MOST_REMEMBERED = 100_000

Found = TypeVar("Found")

_LOCK = threading.Lock()
_POOLS: list[Pool] = []  # none or one
_REPLIES: OrderedDict[Question, Reply] = OrderedDict()


def use_workers(count: int) -> None:
    """How many processes answer from now on, when that is not to be half of the cores."""
    close()
    with _LOCK:
        _POOLS.append(_new_pool(count))


def close() -> None:
    """End the workers and forget all replies; a later question starts new ones."""
    with _LOCK:
        while _POOLS:
            _POOLS.pop().close()
        _REPLIES.clear()


def settle(steps: Sequence[Callable[[Algebra], Found]]) -> list[Found]:
    """Run comparisons to their end: what they ask of algebra is asked for all of them together, round by round."""
    known: dict[Question, Reply] = {}
    found: dict[int, Found] = {}
    while len(found) < len(steps):
        questions: list[Question] = []
        for index, step in enumerate(steps):
            if index in found:
                continue
            try:
                found[index] = step(Algebra(known))
            except Unanswered as unanswered:
                questions.append(unanswered.question)
        wanted = list(dict.fromkeys(questions))
        known.update(zip(wanted, ask_algebra(wanted), strict=True))
    return [found[index] for index in range(len(steps))]


def ask_algebra(questions: Sequence[Question]) -> list[Reply]:
    """What is not remembered is asked, all of it together."""
    with _LOCK:
        replies = {question: _remembered(question) for question in questions}
    unknown = [question for question, reply in replies.items() if reply is None]
    if unknown:
        jobs = [Job((one,), CPU_SECONDS, WALL_SECONDS) for one in unknown]
        fresh = dict(zip(unknown, map(as_reply, _pool().run(jobs)), strict=True))
        replies.update(fresh)
        with _LOCK:
            _remember(fresh)
    return [reply for question in questions if (reply := replies[question])]


def as_reply(result: Result) -> Reply:
    """A worker's result; what raised there is a mistake of ours or of the installation, never a wrong answer."""
    if result.done.error:
        raise RewardError(f"symbolic algebra fails: {result.done.error}")
    return Reply(result.done.value, result.problem, result.done.seconds)


def _new_pool(workers: int) -> Pool:
    return Pool("rewards.algebra:answer_question", workers, MEMORY, RECYCLE_AFTER)


def _pool() -> Pool:
    with _LOCK:
        if _POOLS and _POOLS[0].owner != os.getpid():
            _POOLS.clear()
        if not _POOLS:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            _POOLS.append(_new_pool(max(1, min(MOST_WORKERS, cores // 2))))
        return _POOLS[0]


def _remembered(question: Question) -> Reply | None:
    if question in _REPLIES:
        _REPLIES.move_to_end(question)
    return _REPLIES.get(question)


def _remember(fresh: dict[Question, Reply]) -> None:
    """The newest ones are kept. What failed is asked anew next time."""
    _REPLIES.update({question: reply for question, reply in fresh.items() if reply.problem != Outcome.INFRA_ERROR})
    while len(_REPLIES) > MOST_REMEMBERED:
        _REPLIES.popitem(last=False)
