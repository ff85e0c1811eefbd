"""What became of one completion in one reward: an outcome, and the number that it earns."""

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """How scoring one completion ended."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"  # nothing to compare: no box, an unclosed think block, cut off by the length limit
    REFUSED = "refused"  # an answer that symbolic algebra must never see
    TIMEOUT = "timeout"  # more CPU time than one completion may take
    INFRA_ERROR = "infra_error"  # not the completion's fault: a worker was killed, waited too long, a function raised
    GOLD_BAD = "gold_bad"  # the row has no right answer to compare with
    SCORED = "scored"  # a reward that is not right-or-wrong, or that does not apply


MASKED = (Outcome.INFRA_ERROR, Outcome.GOLD_BAD)  # nobody can tell; all others are the completion's own doing


@dataclass(frozen=True)
class Verdict:
    """A reward may return these in the place of numbers."""

    value: float | None
    """None where the reward cannot tell."""
    outcome: Outcome = Outcome.SCORED
    seconds: float = 0.0
    """What finding it took, without waiting for a worker."""
    answer: str | None = None
    """What was compared with the right answer, for the audit."""


def verdict_of(outcome: Outcome, seconds: float = 0.0, answer: str | None = None) -> Verdict:
    """The verdict of a right-or-wrong reward: 1, 0, or None where it is nobody's fault."""
    value = None if outcome in MASKED else float(outcome == Outcome.CORRECT)
    return Verdict(value, outcome, seconds, answer)
