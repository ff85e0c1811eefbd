"""The trainer's end of one worker process: start it, hand it jobs, learn how it ended."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe

from rewards.verdict import Outcome
from rewards.worker import OUT_OF_MEMORY, Done, Job

START_SECONDS = 120.0  # until a new process answers; a busy machine needs many
OUT_OF_TIME = "it used more CPU time than it may"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# Not by multiprocessing: it would run the user's script again in every worker.
BODY = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from rewards.worker import serve
serve({}, {}, {}, {!r})
"""


class WorkerGone(Exception):
    """The process has ended, or was ended, in the middle of a job."""

    def __init__(self, outcome: Outcome, why: str):
        super().__init__(why)
        self.outcome = outcome


class WorkerProcess:
    """One process, for one function. Start it in a thread that lives as long as it shall: Linux ends it with that one.

    Raises WorkerGone, or what loading the function has raised.
    """

    def __init__(self, function: str, memory: int):
        self.connection, theirs = Pipe()
        body = BODY.format(theirs.fileno(), os.getpid(), memory, function)
        self.process = subprocess.Popen(
            [sys.executable, "-c", body, json.dumps(sys.path)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | ONE_THREAD,
            start_new_session=True,  # Ctrl-C is for the trainer alone to answer
        )
        theirs.close()  # so that reading fails, and does not wait, when the process has ended
        self.jobs_done = 0
        loaded = self._receive(START_SECONDS, "to start")
        if loaded.error:
            self.kill()
            raise loaded.error

    def send(self, jobs: Sequence[tuple[bytes, float]]) -> None:
        """Hand over jobs, as packed arguments and seconds of CPU time; their results come one by one."""
        try:
            self.connection.send(list(jobs))
        except OSError:
            raise self._gone() from None

    def result(self, job: Job) -> Done:
        """The result of the job that the process is at; raises WorkerGone."""
        done = self._receive(job.wall_seconds, "for a job")
        self.jobs_done += 1
        return done

    def _receive(self, seconds: float, purpose: str) -> Done:
        try:
            if self.connection.poll(seconds):
                return self.connection.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        self.kill()
        raise WorkerGone(Outcome.INFRA_ERROR, f"a reward worker took more than {seconds:g} s {purpose}")

    def _gone(self) -> WorkerGone:
        """How the process ended, which it has done already or is about to do."""
        code = self.process.wait()
        self.connection.close()
        if code == -signal.SIGPROF:
            return WorkerGone(Outcome.TIMEOUT, OUT_OF_TIME)
        if code == OUT_OF_MEMORY:
            return WorkerGone(Outcome.INFRA_ERROR, "a reward worker needed more memory than it may have")
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return WorkerGone(Outcome.INFRA_ERROR, f"a reward worker ended ({how})")

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.wait()
        self.connection.close()
