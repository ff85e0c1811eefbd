"""Where the answer stands in a completion: tags, boxes and the final box, found by scanners of linear time.

No regex here can backtrack: each matches one short token, and brackets are balanced with a stack.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_TAG = re.compile(r"</?(?:think|judge)>")
_BRACE = re.compile(r"\\boxed\{|\\boxed\s{1,8}\{|\\.|[{}]", re.DOTALL)
_JOINER = re.compile(r"(?:and|or|und|[,;/&、，或和]|\s|\\[()\[\],;:! ]|\\text\{|\\quad|[$}])*", re.IGNORECASE)
_HEDGE = re.compile(r"[\s$,;]*(?:\\text\{\s*)?(?:or\b|或)", re.IGNORECASE)
_OR = re.compile(r"\bor\b|或", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?。！？\n]")
_GAP_LIMIT = 80

_MOST_TAGS = 4
_WELL_FORMED = {
    ("<think>", "</think>"),
    ("<judge>", "</judge>"),
    ("<judge>", "</judge>", "<think>", "</think>"),
}


@dataclass(frozen=True)
class Completion:
    """The parts of one completion; offsets are not kept, joined with their tags the parts give the text again."""

    before: str  # text ahead of the first tag, or the whole text when there is none and `rest` is empty
    judge: str | None  # inside <judge>…</judge>; None without such a block
    between: str  # text between </judge> and <think>
    think: str | None  # inside <think>…</think>; None without such a block
    rest: str  # everything after the last closing tag; the whole text when there are no tags
    problem: str | None  # None when well formed, else "unclosed", "repeated" or "order"


@dataclass(frozen=True)
class Box:
    """One balanced \\boxed{...}."""

    start: int  # offset of the backslash
    end: int  # offset behind the closing brace
    content: str


@dataclass(frozen=True)
class FinalAnswer:
    """The last balanced box after the think block, and what stands joined to it."""

    text: str  # content of the last box
    joined: tuple[str, ...]  # all boxes of the final run ("or", "and", a comma, touching), the last one included
    hedged: bool = False  # an "or" stands between two of them


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion given as a string or as TRL's conversational messages (the last assistant turn)."""
    if isinstance(completion, str):
        return completion
    turns = [message for message in completion if message.get("role", "assistant") == "assistant"]
    content = turns[-1].get("content") if turns else None
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text") or "" for part in content if part.get("type", "text") == "text")


def split_completion(text: str) -> Completion:
    """Split a completion at its judge and think tags; anything but one block of each, in order, is a problem."""
    names: list[str] = []  # of the first tags, one more than any right form has
    blocks: dict[str, str] = {}  # tag -> content of the last block that its own closing tag ends
    first = last = None
    between = ""
    for tag in _TAG.finditer(text):
        gap = (last.end(), tag.start()) if last else (0, tag.start())
        if last and last.group() + tag.group() in ("<think></think>", "<judge></judge>"):
            blocks[last.group()] = text[slice(*gap)]
        if len(names) == 2:
            between = text[slice(*gap)]
        if len(names) <= _MOST_TAGS:
            names.append(tag.group())
        first, last = first or tag, tag
    if first is None or last is None:
        return Completion("", None, "", None, text, None)
    closed = last.group().startswith("</")
    problem = _tag_problem(tuple(names), closed)
    before, rest = text[: first.start()], text[last.end() :] if closed else ""
    return Completion(before, blocks.get("<judge>"), between, blocks.get("<think>"), rest, problem)


def _tag_problem(names: tuple[str, ...], closed: bool) -> str | None:
    """None for a right form, "unclosed" when the text ends inside a block, else "repeated" or "order"."""
    if names in _WELL_FORMED:
        return None
    if not closed:
        return "unclosed"
    return "repeated" if len(set(names)) < len(names) else "order"


def boxed_answers(text: str) -> list[Box]:
    """All balanced, outermost \\boxed{...} of a text, in order; unclosed ones are passed over."""
    found: list[Box] = []
    opened: list[int] = []  # offset where the content of a box starts, -1 for a plain brace
    starts: list[int] = []
    for token in _BRACE.finditer(text):
        piece = token.group()
        if piece.startswith("\\boxed"):
            opened.append(token.end())
            starts.append(token.start())
        elif piece == "{":
            opened.append(-1)
        elif piece == "}" and opened and (begin := opened.pop()) >= 0:
            start = starts.pop()
            while found and found[-1].start > start:
                found.pop()
            found.append(Box(start, token.end(), text[begin : token.start()]))
    return found


def final_answer(completion: str) -> FinalAnswer | None:
    """The answer of a completion; None without a balanced box after the think block or with the block unclosed."""
    parts = split_completion(completion)
    boxes = [] if parts.problem == "unclosed" else boxed_answers(parts.rest)
    if not boxes:
        return None
    first, hedged = len(boxes) - 1, False
    while first and _joins(gap := parts.rest[boxes[first - 1].end : boxes[first].start]):
        hedged = hedged or bool(_OR.search(gap))
        first -= 1
    return FinalAnswer(boxes[-1].content, tuple(box.content for box in boxes[first:]), hedged)


def _joins(gap: str) -> bool:
    """Whether the text between two boxes makes one statement of them: nothing, a comma, "and", or a hedging "or"."""
    if len(gap) > _GAP_LIMIT:
        return False
    return bool(_JOINER.fullmatch(gap) or (_HEDGE.match(gap) and not _SENTENCE_END.search(gap)))
