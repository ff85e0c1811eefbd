"""A judge behind an OpenAI-compatible endpoint: many yes-or-no questions at once, each about pictures and a text.

What comes back is a verdict or a named failure, never a guess. A batch ends by its deadline whatever the endpoint does.
"""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.judge_cache import JudgeCache
from rewards.judge_prompt import JudgeQuestion, content_key, request_body
from rewards.judge_reply import NoVerdict, read_verdict

RETRIED = (408, 409, 429)  # and 5xx: the endpoint may answer later; any other status will not change
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds between tries: doubled each time, with jitter
GRACE = 5.0  # seconds beyond the deadline for the asking thread to end


@dataclass(frozen=True)
class Verdict:
    """One answer of the judge."""

    value: bool | None
    """None where there is no verdict."""
    failure: str | None = None
    """Why not: transport, timeout, status, refusal, reply, breaker or deadline; with what was said."""


@dataclass(frozen=True)
class Judgement:
    """What a reward that asks a judge may return instead of a list."""

    values: list[float | None]
    """The reward; None where the judge failed."""
    checks: dict[str, list[float | None]] = field(default_factory=dict)
    """The single checks that it is made of, for the log."""


@dataclass(frozen=True)
class JudgeSettings:
    """Where the judge is and how it is asked."""

    base_url: str
    model: str
    api_key: str = "none"
    concurrency: int = 32
    """Most questions on their way at once."""
    call_seconds: float = 60.0
    """For one try."""
    batch_seconds: float = 300.0
    """For all questions of one call, retries included."""
    tries: int = 3
    breaker: int = 20
    """After so many failed questions in a row the endpoint counts as down; the next batch tries with one question."""
    max_tokens: int = 512
    """Of a reply."""
    cache: Path | None = None
    """A sqlite file that keeps verdicts; none are kept when left out."""


class Judge:
    """The endpoint, with what is known of it: verdicts given before, and whether it is down."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.cache = JudgeCache(settings.cache)
        self.failed_in_a_row = 0
        self.problems: list[str] = []
        """What went wrong since the list was last emptied, in words."""

    @property
    def down(self) -> bool:
        """Whether the circuit breaker is open."""
        return self.failed_in_a_row >= self.settings.breaker

    def ask(self, questions: Sequence[JudgeQuestion]) -> list[Verdict]:
        """A verdict for each question. Equal questions are asked once, those with a kept verdict not at all."""
        settings = self.settings
        keys = [content_key(question, settings.model, settings.max_tokens) for question in questions]
        known = {key: Verdict(value) for key, value in self.cache.read(keys).items()}
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
        answers = self.ask_in_thread(missing) if missing else {}
        self.cache.write({key: verdict.value for key, verdict in answers.items() if verdict.value is not None})
        known |= answers
        verdicts = [known[key] for key in keys]
        self.problems += failure_lines(verdicts)
        return verdicts

    def ask_in_thread(self, questions: dict[str, JudgeQuestion]) -> dict[str, Verdict]:
        """Ask in a thread with an event loop of its own: the caller may have one, and must not wait for a stuck one."""
        late = Verdict(None, f"deadline: no verdict within {self.settings.batch_seconds:g} s")
        answers, raised = dict.fromkeys(questions, late), []

        def work() -> None:
            try:
                asyncio.run(self.ask_all(questions, answers))
            except Exception as error:  # raised again in the caller's thread
                raised.append(error)

        thread = threading.Thread(target=work, name="judge", daemon=True)
        thread.start()
        thread.join(self.settings.batch_seconds + GRACE)
        if raised:
            raise raised[0]
        return dict(answers)

    async def ask_all(self, questions: dict[str, JudgeQuestion], answers: dict[str, Verdict]) -> None:
        """Fill in `answers` until all are there or time is up."""
        from openai import AsyncOpenAI

        settings = self.settings
        places = asyncio.Semaphore(settings.concurrency)

        async def answer(key: str) -> None:
            async with places:
                body = request_body(questions[key], settings.model, settings.max_tokens)
                answers[key] = await self.ask_one(client, body, questions[key].criterion)

        # Retries are ours: the client's own would also repeat what cannot change, and hide it.
        client = AsyncOpenAI(
            base_url=settings.base_url, api_key=settings.api_key, max_retries=0, timeout=settings.call_seconds
        )
        first, *others = questions
        try:
            async with asyncio.timeout(settings.batch_seconds), client:
                if self.down:
                    self.failed_in_a_row = settings.breaker - 1  # one question finds out whether it is back
                    await answer(first)
                    await asyncio.gather(*map(answer, others))
                else:
                    await asyncio.gather(*map(answer, questions))
        except TimeoutError:
            self.failed_in_a_row += sum(verdict.value is None for verdict in answers.values())

    async def ask_one(self, client, body: dict[str, Any], criterion: str) -> Verdict:
        """One question, tried again while the fault is the endpoint's and may pass."""
        for tried in range(1, self.settings.tries + 1):
            if self.down:
                return Verdict(None, f"breaker: {self.failed_in_a_row} questions in a row have failed")
            verdict, pause = await self.try_once(client, body, criterion)
            if pause is None:
                self.failed_in_a_row = 0
                return verdict
            if tried < self.settings.tries:
                await asyncio.sleep(max(pause, backoff(tried)))
        self.failed_in_a_row += 1
        return verdict

    async def try_once(self, client, body: dict[str, Any], criterion: str) -> tuple[Verdict, float | None]:
        """The outcome, and for a fault that may pass the least pause in seconds before the next try."""
        import openai

        try:
            async with asyncio.timeout(self.settings.call_seconds):
                reply = await client.chat.completions.create(**body)
            return Verdict(read_verdict(reply, criterion)), None
        except (TimeoutError, openai.APITimeoutError):
            return Verdict(None, f"timeout: no reply within {self.settings.call_seconds:g} s"), 0.0
        except openai.APIConnectionError as error:
            return Verdict(None, f"transport: {error.__cause__ or error}"), 0.0
        except openai.APIStatusError as error:
            failure = Verdict(None, f"status: {error.status_code}: {short(error.message)}")
            passing = error.status_code in RETRIED or error.status_code >= 500
            return failure, retry_after(error) if passing else None
        except NoVerdict as problem:
            return Verdict(None, str(problem)), None
        except (openai.APIError, ValueError) as error:  # a body that is not JSON, or not a reply
            return Verdict(None, f"reply: {type(error).__name__}: {short(str(error))}"), None


def backoff(tried: int) -> float:
    """Seconds before the next try, spread so that questions which failed together do not come back together."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (tried - 1)) * random.uniform(0.5, 1.5)


def retry_after(error) -> float:
    """What the endpoint asks for, in seconds and within reason."""
    asked = error.response.headers.get("retry-after", "")
    return min(LONGEST_PAUSE, float(asked)) if asked.replace(".", "", 1).isdigit() else 0.0


def short(text: str) -> str:
    """The start of what an endpoint said, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:197] + "..."


def failure_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """Failures by what was said, commonest first."""
    counts = Counter(verdict.failure for verdict in verdicts if verdict.failure)
    return [f"{count} of {len(verdicts)} questions have no verdict: {what}" for what, count in counts.most_common(3)]
