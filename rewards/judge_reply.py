"""The judge's reply, read strictly: one JSON object with a reason and the named verdict, or it is no verdict."""

import json
from typing import Any

from rewards.endpoint import Unusable, reply_text


class NoVerdict(Unusable):
    """The endpoint answered, but gave no verdict; the text says what came instead."""


def read_verdict(reply: Any, criterion: str) -> bool:
    """The verdict of a chat completion; raises Unusable."""
    return parse_verdict(reply_text(reply), criterion)


def parse_verdict(text: str, criterion: str) -> bool:
    """The verdict of a reply's text; raises NoVerdict."""
    try:
        # Not strict about control characters inside the reason, which constrained decoding lets through.
        pairs = json.loads(text, object_pairs_hook=list, strict=False)
    except (ValueError, RecursionError):
        raise NoVerdict(f"reply: not JSON: {quoted(text)}") from None
    is_object = isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs)
    names = sorted(name for name, _ in pairs) if is_object else []
    if names != sorted(["reason", criterion]):
        raise NoVerdict(f"reply: not an object with `reason` and `{criterion}`, once each: {quoted(text)}")
    value = dict(pairs)[criterion]
    if not isinstance(value, bool):
        raise NoVerdict(f"reply: `{criterion}` is {quoted(json.dumps(value))}, not true or false")
    return value


def quoted(text: str) -> str:
    """The start of a reply."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
