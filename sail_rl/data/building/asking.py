"""A model behind an OpenAI-compatible endpoint, asked about rows: its answer, or whose fault it is that it has none."""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rewards.endpoint import LONGEST_PAUSE, Answer, Endpoint, Request, Unusable, reply_text, short
from rewards.judge import JudgeSettings
from rewards.judge_prompt import picture
from sail_rl.command_line import BadInput
from sail_rl.data.example import conversation
from sail_rl.data.images import BadRow

TURNS = 4  # requests of a chunk for each that may be on its way: few wait for the slowest, little is lost at an end
NOT_THE_ROW = ("status: 401", "status: 403", "status: 404")  # key, right or model name
REASONS = {
    "refusal": "the model declined",
    "reply: cut off": "the reply was cut off",
    "status": "the endpoint refuses the request",
}


def endpoint_settings(arguments: argparse.Namespace) -> JudgeSettings:
    """Checked. A chunk's deadline is beyond all that its tries may take."""
    for name in ("concurrency", "tries", "max_tokens", "call_seconds"):
        if getattr(arguments, name) <= 0:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(arguments, name)}: give a number above 0")
    if not arguments.base_url.startswith(("http://", "https://")):
        raise BadInput(f"--base-url {arguments.base_url}: it must begin with http:// or https://")
    key = os.environ.get(arguments.api_key_env) if arguments.api_key_env else "none"
    if key is None:
        raise BadInput(f"--api-key-env {arguments.api_key_env}: there is no such environment variable")
    return JudgeSettings(
        arguments.base_url,
        arguments.model,
        key,
        arguments.concurrency,
        arguments.call_seconds,
        batch_seconds=TURNS * arguments.tries * (arguments.call_seconds + LONGEST_PAUSE),
        tries=arguments.tries,
        max_tokens=arguments.max_tokens,
    )


class Asker:
    """The endpoint, and whether to go on asking it."""

    def __init__(self, settings: JudgeSettings, begun: bool) -> None:
        self.settings, self.endpoint = settings, Endpoint(settings)
        self.answered = begun
        """There has been a reply of the model's, or work that goes on: what is refused then is the row's fault."""
        self.problem: str | None = None

    @property
    def at_once(self) -> int:
        """Rows of a chunk."""
        return TURNS * self.settings.concurrency

    def ask(self, requests: Mapping[int, Request]) -> dict[int, Answer]:
        """Answers by row; without those that failed through no fault of the row, which is to be asked about again."""
        if self.problem:
            raise BadInput(f"{self.settings.base_url} fails: {self.problem}; what is done is kept: try again later")
        answers = self.endpoint.ask(requests) if requests else {}
        self.answered = self.answered or any(map(is_a_reply, answers.values()))
        blamed = {key: answer for key, answer in answers.items() if self.answered and is_of_the_row(answer)}
        failures = Counter(answers[key].failure for key in answers.keys() - blamed.keys())
        if failures:
            what = failures.most_common(1)[0][0]
            print(f"warning: {failures.total()} of {len(answers)} requests failed: {what}", file=sys.stderr)
            if self.endpoint.down or not self.answered or failures.total() == len(answers):
                self.problem = what
        return blamed

    def request(self, messages: list[dict[str, Any]], read: Any = reply_text, **more: Any) -> Request:
        """A chat completion with these messages, whose pictures are paths until it is sent."""
        return Request(partial(self.body, messages, more), read)

    def body(self, messages: list[dict[str, Any]], more: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a chat completion."""
        shown = [turn | {"content": [sent(part) for part in turn["content"]]} for turn in messages]
        return {"model": self.settings.model, "messages": shown, "max_tokens": self.settings.max_tokens, **more}


def is_a_reply(answer: Answer) -> bool:
    """Whether the model said something, be it of use or not."""
    return answer.failure is None or answer.failure.startswith(("reply", "refusal"))


def is_of_the_row(answer: Answer) -> bool:
    """Whether there is an answer, or none for this row whenever it is asked about."""
    return answer.failure is None or (answer.final and not answer.failure.startswith(NOT_THE_ROW))


def reason_of(failure: str) -> str:
    """A failure as one of few reasons."""
    return next((reason for start, reason in REASONS.items() if failure.startswith(start)), "the reply cannot be read")


def messages_about(row: Mapping[str, Any], folder: Path, instruction: str) -> list[dict[str, Any]]:
    """The row's conversation with its pictures, and an instruction at the end of the last question; raises BadRow."""
    if row.get("videos"):
        raise BadRow("videos are not sent to a model")
    files = iter([str(folder / path) for path in row.get("images") or []])
    turns = []
    for message in conversation(row, len(row.get("images") or [])):
        parts = [{"type": "image", "file": next(files)} if p["type"] == "image" else p for p in message["content"]]
        turns.append({"role": message["role"], "content": parts})
    last = [turn for turn in turns if turn["role"] == "user"][-1]
    last["content"].append({"type": "text", "text": f"\n\n{instruction}"})
    return turns


def sent(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a message as it is sent."""
    if part["type"] != "image":
        return dict(part)
    return {"type": "image_url", "image_url": {"url": picture(part["file"])[0]}}


def read_object(reply: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object that a reply holds, fenced or not; raises Unusable where a name is missing."""
    text = reply_text(reply).strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        raise Unusable(f"reply: not JSON: {short(text)}") from None
    if not isinstance(value, dict) or not set(names) <= value.keys():
        raise Unusable(f"reply: not an object with {', '.join(names)}: {short(text)}")
    return value


def as_object(names: Mapping[str, str]) -> dict[str, Any]:
    """The request's argument by which an endpoint keeps to an object with these names, of these types."""
    schema = {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in names.items()},
        "required": list(names),
        "additionalProperties": False,
    }
    named = {"name": "reply", "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}
