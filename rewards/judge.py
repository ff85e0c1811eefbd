"""A judge behind an OpenAI-compatible endpoint: many yes-or-no questions at once, each about pictures and a text.

What comes back is a verdict or a named failure, never a guess. A batch ends by its deadline whatever the endpoint does.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rewards.endpoint import Answer, Endpoint, EndpointSettings, Request
from rewards.judge_cache import JudgeCache
from rewards.judge_prompt import JudgeQuestion, content_key, request_body
from rewards.judge_reply import read_verdict


@dataclass(frozen=True)
class Verdict:
    """One answer of the judge."""

    value: bool | None
    """None where there is no verdict."""
    failure: str | None = None
    """Why not, as in the endpoint's Answer."""


@dataclass(frozen=True)
class Judgement:
    """What a reward that asks a judge may return instead of a list."""

    values: list[float | None]
    """The reward; None where the judge failed."""
    checks: dict[str, list[float | None]] = field(default_factory=dict)
    """The single checks that it is made of, for the log."""


@dataclass(frozen=True)
class JudgeSettings(EndpointSettings):
    """Where the judge is and how it is asked."""

    cache: Path | None = None
    """A sqlite file that keeps verdicts; none are kept when left out."""


class Judge:
    """The endpoint with the verdicts that it has given before."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.endpoint = Endpoint(settings)
        self.cache = JudgeCache(settings.cache)
        self.problems: list[str] = []
        """What went wrong since the list was last emptied, in words."""

    @property
    def down(self) -> bool:
        """Whether the circuit breaker is open."""
        return self.endpoint.down

    def ask(self, questions: Sequence[JudgeQuestion]) -> list[Verdict]:
        """A verdict for each question. Equal questions are asked once, those with a kept verdict not at all."""
        settings = self.settings
        keys = [content_key(question, settings.model, settings.max_tokens) for question in questions]
        known = {key: Answer(value) for key, value in self.cache.read(keys).items()}
        missing = {
            key: self.request(question) for key, question in zip(keys, questions, strict=True) if key not in known
        }
        answers = self.endpoint.ask(missing) if missing else {}
        self.cache.write({key: answer.value for key, answer in answers.items() if answer.failure is None})
        known |= answers
        verdicts = [Verdict(known[key].value, known[key].failure) for key in keys]
        self.problems += failure_lines(verdicts)
        return verdicts

    def request(self, question: JudgeQuestion) -> Request:
        """A question as it is asked."""
        body = partial(request_body, question, self.settings.model, self.settings.max_tokens)
        return Request(body, partial(read_verdict, criterion=question.criterion))


def failure_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """Failures by what was said, commonest first."""
    counts = Counter(verdict.failure for verdict in verdicts if verdict.failure)
    return [f"{count} of {len(verdicts)} questions have no verdict: {what}" for what, count in counts.most_common(3)]
