"""A user's reward in a worker process of its own, which keeps what the function remembers between calls."""

import os
import pickle
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rewards.call import RewardError
from rewards.pool import Pool
from rewards.verdict import Outcome, Verdict
from rewards.worker import Job

TIMEOUT_SECONDS = 60.0  # of CPU time for one call, unless the recipe's entry has a `timeout`


class TookTooLong(RewardError):
    """The call used up its CPU time."""


class Remote:
    """The function of `path/file.py:name`, called in another process."""

    def __init__(self, reference: str, timeout: float | None):
        place, _, name = reference.rpartition(":")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        self.timeout = timeout or TIMEOUT_SECONDS
        self.pool = Pool(f"{os.path.abspath(place)}:{name}", 1, memory)

    def call(self, columns: Mapping[str, Any]) -> list[Verdict]:
        """The verdicts; raises what the function raised, in words, or why it did not come to an end."""
        # A worker may wait for others: only twice the time by the clock, and then some, means that it hangs.
        job = Job((dict(columns),), self.timeout, 2 * self.timeout + 1)
        try:
            result = self.pool.run([job])[0]
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise RewardError(f"a column cannot be passed between processes ({error}); set in_process: true") from error
        if result.problem == Outcome.TIMEOUT:
            raise TookTooLong(
                f"took more than {self.timeout:g} s of CPU time (key `timeout`); what alone takes as long scores 0"
            )
        if result.problem:
            raise RewardError(result.why)
        if result.done.error:
            raise result.done.error
        share = result.done.seconds / max(len(result.done.value), 1)
        return [replace(verdict, seconds=verdict.seconds or share) for verdict in result.done.value]

    def close(self) -> None:
        """End the process."""
        self.pool.close()
