"""An OpenAI-compatible endpoint that is asked many things at once: retries, a circuit breaker, deadlines.

What comes back is a usable reply or a named failure, never a guess. A batch ends by its deadline whatever the endpoint
does.
"""

import asyncio
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

RETRIED = (408, 409, 429)  # and 5xx: the endpoint may answer later; any other status will not change
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds between tries: doubled each time, with jitter
GRACE = 5.0  # seconds beyond the deadline for the asking thread to end


class Unusable(Exception):
    """The endpoint replied, but not with what was asked for; the text says what came instead."""


@dataclass(frozen=True)
class EndpointSettings:
    """Where the endpoint is and how it is asked."""

    base_url: str
    model: str
    api_key: str = "none"
    concurrency: int = 32
    """Most requests on their way at once."""
    call_seconds: float = 60.0
    """For one try."""
    batch_seconds: float = 300.0
    """For all requests of one call, retries included."""
    tries: int = 3
    breaker: int = 20
    """After so many failed requests in a row the endpoint counts as down; the next batch tries with one request."""
    max_tokens: int = 512
    """Of a reply."""


@dataclass(frozen=True)
class Request:
    """One thing that is asked."""

    body: Callable[[], dict[str, Any]]
    """Makes the arguments of a chat completion; called when they are sent, since pictures are large."""
    read: Callable[[Any], Any]
    """From the reply to what is wanted of it; raises Unusable."""


@dataclass(frozen=True)
class Answer:
    """What became of a request."""

    value: Any
    """What was read of the reply; None where there is nothing."""
    failure: str | None = None
    """Why not: transport, timeout, status, refusal, reply, breaker or deadline; with what was said."""
    final: bool = True
    """Asking the same later would not change it."""


class Endpoint:
    """The endpoint, with what is known of it: whether it is down."""

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self.failed_in_a_row = 0

    @property
    def down(self) -> bool:
        """Whether the circuit breaker is open."""
        return self.failed_in_a_row >= self.settings.breaker

    def ask(self, requests: Mapping[Any, Request]) -> dict[Any, Answer]:
        """An answer for each request.

        In a thread with an event loop of its own: the caller may have one, and must not wait for a stuck one.
        """
        late = Answer(None, f"deadline: no reply within {self.settings.batch_seconds:g} s", final=False)
        answers, raised = dict.fromkeys(requests, late), []

        def work() -> None:
            try:
                asyncio.run(self.ask_all(requests, answers))
            except Exception as error:  # raised again in the caller's thread
                raised.append(error)

        thread = threading.Thread(target=work, name="endpoint", daemon=True)
        thread.start()
        thread.join(self.settings.batch_seconds + GRACE)
        if raised:
            raise raised[0]
        return dict(answers)

    async def ask_all(self, requests: Mapping[Any, Request], answers: dict[Any, Answer]) -> None:
        """Fill in `answers` until all are there or time is up."""
        from openai import AsyncOpenAI

        settings = self.settings
        places = asyncio.Semaphore(settings.concurrency)

        async def answer(key: Any) -> None:
            async with places:
                answers[key] = await self.ask_one(client, requests[key])

        # Retries are ours: the client's own would also repeat what cannot change, and hide it.
        client = AsyncOpenAI(
            base_url=settings.base_url, api_key=settings.api_key, max_retries=0, timeout=settings.call_seconds
        )
        first, *others = requests
        try:
            async with asyncio.timeout(settings.batch_seconds), client:
                if self.down:
                    self.failed_in_a_row = settings.breaker - 1  # one request finds out whether it is back
                    await answer(first)
                    await asyncio.gather(*map(answer, others))
                else:
                    await asyncio.gather(*map(answer, requests))
        except TimeoutError:
            self.failed_in_a_row += sum(answer.failure is not None for answer in answers.values())

    async def ask_one(self, client, request: Request) -> Answer:
        """One request, tried again while the fault is the endpoint's and may pass."""
        body = request.body()
        for tried in range(1, self.settings.tries + 1):
            if self.down:
                return Answer(None, f"breaker: {self.failed_in_a_row} questions in a row have failed", final=False)
            answer, pause = await self.try_once(client, body, request.read)
            if pause is None:
                self.failed_in_a_row = 0
                return answer
            if tried < self.settings.tries:
                await asyncio.sleep(max(pause, backoff(tried)))
        self.failed_in_a_row += 1
        return answer

    async def try_once(self, client, body: dict[str, Any], read: Callable[[Any], Any]) -> tuple[Answer, float | None]:
        """The outcome, and for a fault that may pass the least pause in seconds before the next try."""
        import openai

        try:
            async with asyncio.timeout(self.settings.call_seconds):
                reply = await client.chat.completions.create(**body)
            return Answer(read(reply)), None
        except (TimeoutError, openai.APITimeoutError):
            return Answer(None, f"timeout: no reply within {self.settings.call_seconds:g} s", final=False), 0.0
        except openai.APIConnectionError as error:
            return Answer(None, f"transport: {error.__cause__ or error}", final=False), 0.0
        except openai.APIStatusError as error:
            passing = error.status_code in RETRIED or error.status_code >= 500
            failure = Answer(None, f"status: {error.status_code}: {short(error.message)}", final=not passing)
            return failure, retry_after(error) if passing else None
        except Unusable as problem:
            return Answer(None, str(problem)), None
        except (openai.APIError, ValueError) as error:  # a body that is not JSON, or not a reply
            return Answer(None, f"reply: {type(error).__name__}: {short(str(error))}"), None


def reply_text(reply: Any) -> str:
    """The text of a chat completion that has ended by itself; raises Unusable."""
    choices = getattr(reply, "choices", None)
    if not choices or choices[0].message is None:
        raise Unusable("reply: it holds no message")
    choice = choices[0]
    if choice.finish_reason == "content_filter" or getattr(choice.message, "refusal", None):
        raise Unusable("refusal: the model declined")
    if choice.finish_reason == "length":
        raise Unusable("reply: cut off by max_tokens")
    return choice.message.content or ""


def backoff(tried: int) -> float:
    """Seconds before the next try, spread so that requests which failed together do not come back together."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (tried - 1)) * random.uniform(0.5, 1.5)


def retry_after(error) -> float:
    """What the endpoint asks for, in seconds and within reason."""
    asked = error.response.headers.get("retry-after", "")
    return min(LONGEST_PAUSE, float(asked)) if asked.replace(".", "", 1).isdigit() else 0.0


def short(text: str) -> str:
    """The start of what an endpoint said, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:197] + "..."
