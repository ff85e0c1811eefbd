"""Multiple-choice questions taken apart: the question, its options, and the text of the right one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewards.choices import read_choice, read_options, resolve
from rewards.gold import gold_problem, gold_type
from rewards.ladder import Row as Gold
from rewards.notation import clean, squash

LETTERS = "ABCDEFGHIJ"
# The first option: at the start of a line, or in brackets anywhere.
_LINES = re.compile(r"(?:^|\n)[ \t]*\(?([A-J])[).:][ \t]+")
_BRACKETS = re.compile(r"(?:^|\s)\(([A-J])\)\s*")
_HEADER = re.compile(r"\s*(?:answer )?(?:options|choices)\s*:?\s*\Z", re.IGNORECASE)
_REQUEST = re.compile(
    r"[^.?!\n]*\b(?:select|choose|pick|answer with|respond with|give|write|reply with)\b"
    r"[^.?!\n]*\b(?:option|choice|letter)(?:'s|s)?\b[^.?!\n]*[.?!]?\s*",
    re.IGNORECASE,
)
# A question that needs its options to be understood, or that others might answer as well.
LEANS = re.compile(
    r"\b(?:following|options?|choices?|except|possible|closest|nearest)\b|_{2,}|(?:^|[.?!,]\s+)which\b"
    r"|\b(?:all|none|any|each|either|both|one)\s+(?:of\s+)?(?:the\s+)?(?:above|below|these|those)\b"
    r"|\b(?:best (?:describes|matches|represents|approximates)|most (?:likely|nearly|similar|suitable))\b"
    r"|\b(?:could|may|might|can) (?:\w+ )?be\b|\bnot\s+(?:a|an|true|correct|valid)\b",
    re.IGNORECASE,
)
_OTHERS = re.compile(
    r"\b(?:above|below|none|all of|both|neither|cannot be determined|[A-J] and [A-J])\b", re.IGNORECASE
)
LETTER_TYPES = ("letter", "choice", "option", "multiple_choice", "mcq")
SURE = ("number", "unit")  # one spelling apart from notation, which the ladder reads: words could be put in other words


@dataclass(frozen=True)
class Choices:
    """A multiple-choice question."""

    stem: str
    """The question without its options, and without the request to name one."""
    options: dict[str, str]
    """Letter -> text."""
    right: str
    """The text of the right option."""


def read_choices(question: str, row: Mapping[str, Any], gold: str) -> Choices | str | None:
    """The question taken apart; what is wrong with it, in words; None where it is not multiple choice."""
    stem, listed = split_listed(question)
    options = raw_options(row.get("options")) or listed
    letters_alone = str(row.get("answer_type") or "").lower() in (
        "letter",
        "choice",
        "option",
        "multiple_choice",
        "mcq",
    )
    if len(options) < 2:
        return "its options are not there" if letters_alone else None
    named = resolve(clean(gold), read_options(options), lambda left, right: squash(left) == squash(right))
    if named is None:
        choice = read_choice(clean(gold))
        return "its answer is none of its options" if choice and not choice.content else None
    if len(named) != 1:
        return "several of its options are right"
    return Choices(_REQUEST.sub("", stem).strip(), options, options[next(iter(named))])


def raw_options(given: Any) -> dict[str, str]:
    """The row's options as letter -> text as it was written; a letter in front of each is dropped."""
    if isinstance(given, Mapping):
        return {str(k).strip().upper(): str(text).strip() for k, text in given.items() if text is not None}
    texts = [str(text).strip() for text in given or []]
    marked = [re.match(rf"\(?{letter}[).:]\s*(?=\S)", text) for letter, text in zip(LETTERS, texts, strict=False)]
    if texts and all(marked):
        texts = [text[match.end() :] for text, match in zip(texts, marked, strict=False) if match]
    return dict(zip(LETTERS, texts, strict=False))


def split_listed(question: str) -> tuple[str, dict[str, str]]:
    """The question without the options that it ends with, and these; the question whole where there are none."""
    for mark in (_LINES, _BRACKETS):
        found = list(mark.finditer(question))
        start = next((place for place, match in enumerate(found) if match[1] == "A"), None)
        if start is None:
            continue
        found = found[start:]
        if [match[1] for match in found] != list(LETTERS[: len(found)]) or len(found) < 2:
            continue
        ends = [match.start() for match in found[1:]] + [len(question)]
        texts = [question[match.end() : end].strip() for match, end in zip(found, ends, strict=True)]
        if all(texts) and "\n" not in texts[-1]:
            stem = _HEADER.sub("", question[: found[0].start()]).strip()
            return stem, dict(zip(LETTERS, texts, strict=False))
    return question, {}


def is_sure(choices: Choices) -> bool:
    """Whether the question can be asked as it is, and its answer be told from every other one by the rewards."""
    gold = Gold(choices.right)
    readable = gold_problem(gold) is None and gold_type(gold) in SURE
    return readable and not LEANS.search(choices.stem) and choices.stem.rstrip().endswith(("?", ".", ":", "$"))


def speaks_of_others(choices: Choices) -> bool:
    """Whether the right option means nothing without the others."""
    return bool(_OTHERS.search(choices.right))
