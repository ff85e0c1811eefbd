"""Worker processes for rewards: each has a thread here that hands it jobs, bounds their time and replaces it.

A job that uses up its CPU time is the completion's doing. Any other end of a worker is not: such a job is done once
more, in a new process, and then counts as failed.
"""

import atexit
import os
import pickle
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue

from rewards.call import RewardError
from rewards.verdict import Outcome
from rewards.worker import Done, Job
from rewards.worker_process import OUT_OF_TIME, WorkerGone, WorkerProcess

ATTEMPTS = 2  # at a job whose worker ends
BATCHES_PER_WORKER = 4  # so that a worker with slow jobs leaves the rest to others
MOST_IN_BATCH = 32


@dataclass(frozen=True)
class Result:
    """What became of a job."""

    done: Done = field(default_factory=Done)
    problem: Outcome | None = None
    """TIMEOUT or INFRA_ERROR; None when the job came to an end, be it by raising."""
    why: str = ""


@dataclass
class Task:
    """A job on its way."""

    job: Job
    arguments: bytes
    result: Future = field(default_factory=Future)
    attempts: int = 0


class Pool:
    """A fixed number of processes, started when there are jobs for them. They end with the trainer, however it ends."""

    def __init__(self, function: str, workers: int, memory: int, recycle_after: int | None = None):
        """`function` is what the workers call: `package.module:name`, or `/path/file.py:name` of a user's reward."""
        self.function, self.workers, self._memory, self._recycle_after = function, workers, memory, recycle_after
        self._queue: SimpleQueue[list[Task] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._processes: list[WorkerProcess] = []
        self._lock, self._closed = threading.Lock(), False
        self.owner = os.getpid()  # a forked copy has no threads
        atexit.register(self.close)

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        """Have jobs done, by several workers and in any order; their results in the order of the jobs."""
        tasks = [Task(job, pickle.dumps(job.arguments)) for job in jobs]
        size = min(MOST_IN_BATCH, -(-len(tasks) // (self.workers * BATCHES_PER_WORKER)) or 1)
        batches = [tasks[start : start + size] for start in range(0, len(tasks), size)]
        self._start_threads(min(len(batches), self.workers))
        for batch in batches:
            self._queue.put(batch)
        return [task.result.result() for task in tasks]

    def close(self) -> None:
        """End all processes; what they were at counts as failed."""
        with self._lock:
            self._closed = True
            processes, threads = list(self._processes), list(self._threads)
        for _ in threads:
            self._queue.put(None)
        for process in processes:
            process.process.kill()
        for process in processes:
            process.process.wait()
        atexit.unregister(self.close)

    def _start_threads(self, wanted: int) -> None:
        with self._lock:
            if self._closed:
                raise RewardError("the reward workers are closed")
            while len(self._threads) < wanted:
                self._threads.append(threading.Thread(target=self._serve, daemon=True))
                self._threads[-1].start()

    def _serve(self) -> None:
        worker: WorkerProcess | None = None
        while batch := self._queue.get():
            worker = self._do(deque(batch), worker)

    def _do(self, tasks: deque[Task], worker: WorkerProcess | None) -> WorkerProcess | None:
        """Settle a batch; the process that can take the next one."""
        while tasks:
            begun = time.monotonic()
            try:
                worker = worker or self._new_worker()
                worker.send([(task.arguments, task.job.cpu_seconds) for task in tasks])
                while tasks:
                    begun = time.monotonic()
                    done = worker.result(tasks[0].job)
                    problem = Outcome.TIMEOUT if done.out_of_time else None
                    tasks.popleft().result.set_result(Result(done, problem, OUT_OF_TIME if problem else ""))
            except WorkerGone as gone:
                self._forget(worker)
                worker = None
                self._try_again_or_give_up(tasks, gone, time.monotonic() - begun)
            except RewardError as error:  # the function cannot be loaded
                tasks.popleft().result.set_result(Result(Done(error=error)))
        if worker and self._recycle_after and worker.jobs_done >= self._recycle_after:
            self._forget(worker)
            worker.kill()
            worker = None
        return worker

    def _try_again_or_give_up(self, tasks: deque[Task], gone: WorkerGone, seconds: float) -> None:
        """The first task is the one that its worker was at."""
        tasks[0].attempts += 1
        if gone.outcome == Outcome.TIMEOUT or tasks[0].attempts == ATTEMPTS or self._closed:
            tasks.popleft().result.set_result(Result(Done(seconds=seconds), gone.outcome, str(gone)))
        else:
            print(f"warning: {gone}; its job is done once more, in a new process", file=sys.stderr, flush=True)

    def _new_worker(self) -> WorkerProcess:
        if self._closed:
            raise WorkerGone(Outcome.INFRA_ERROR, "the reward workers are closed")
        worker = WorkerProcess(self.function, self._memory)
        with self._lock:
            self._processes.append(worker)
        if self._closed:
            worker.process.kill()
        return worker

    def _forget(self, worker: WorkerProcess | None) -> None:
        with self._lock, suppress(ValueError):
            self._processes.remove(worker)  # type: ignore[arg-type]
