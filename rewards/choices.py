"""Option letters: `B`, `(B) 5`, `Option B`, `A, C`, and the text of an option in place of its letter."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rewards.notation import clean, squash, text_key

Options = Mapping[str, str]  # letter -> cleaned text

_PREFIX = re.compile(
    r"^(?:the\s+)?(?:correct\s+)?(?:options?|choices?|answers?|选项|答案|故选|应选|选)\s*(?:is|are|:|是)?\s*"
    r"(?=[A-Z(\[])",
    re.IGNORECASE,
)
_SUFFIX = re.compile(r"(?<=[A-H])\s*选?项$")
_LOWER_LIST = re.compile(r"[a-h](?:\s*[,;]\s*[a-h])+")
_BRACKETED = re.compile(r"[(\[{]\s*([A-Za-z])\s*[)\]}][.:]?")
_WITH_CONTENT = re.compile(r"(?:[(\[]([A-Za-z])[)\]]\s*[.:)]?|([A-Za-z])\s*[.:)](?!\d))\s*(\S.*)", re.DOTALL)
_SEPARATED = re.compile(r"[A-Z](?:(?:\s|,|;|&|\band\b|和)*[A-Z])*")
_SEPARATOR = re.compile(r"\s*(?:[,;&]|\band\b|和)\s*|\s+")
_ANOTHER = re.compile(
    r"(?:^|\bor\b|\band\b|[,;/&])\s*(?:[(\[][A-Za-z][)\]]|[A-Z](?=[.:)]|\s*$|\s*[,;/&]|\s+(?:or|and)\b))"
)
_LAST_INFERRED = "H"  # without options listed, later letters in a run are words or Roman numerals


@dataclass(frozen=True)
class Choice:
    """The letters named by an answer, and what it wrote beside a single one."""

    letters: frozenset[str]
    content: str = ""


def read_options(options: Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
    """Options as letter -> text; a leading "A." is dropped where every option has its own letter in front."""
    if not options:
        return {}
    if isinstance(options, Mapping):
        return {letter.strip().upper(): clean(str(text)) for letter, text in options.items() if text is not None}
    texts = [clean(str(text)) for text in options]
    letters = [chr(ord("A") + index) for index in range(len(texts))]
    marked = [_WITH_CONTENT.fullmatch(text) for text in texts]
    if all(match and (match[1] or match[2]).upper() == letter for match, letter in zip(marked, letters, strict=True)):
        texts = [match[3].strip() for match in marked if match]
    return dict(zip(letters, texts, strict=True))


def read_choice(text: str) -> Choice | None:
    """The letters of a cleaned text by the grammar of option answers; None when it names none, or hedges."""
    text = _SUFFIX.sub("", _PREFIX.sub("", text)).strip()
    plain = _BRACKETED.sub(r"\1", text).strip(" .:)(")
    if len(plain) == 1 and plain.isascii() and plain.isalpha():
        return Choice(frozenset(plain.upper()))
    plain = plain.upper() if _LOWER_LIST.fullmatch(plain) else plain
    if len(plain) <= 60 and _SEPARATED.fullmatch(plain):
        letters = [letter for part in _SEPARATOR.split(plain) for letter in part]
        return Choice(frozenset(letters)) if len(set(letters)) == len(letters) else None
    match = _WITH_CONTENT.fullmatch(text)
    if match is None or _ANOTHER.search(match[3]):
        return None
    return Choice(frozenset((match[1] or match[2]).upper()), match[3].strip())


def looks_like_choice(gold: str) -> bool:
    """Whether a cleaned gold without a type is option letters: one letter up to H (or I), or a rising run."""
    choice = read_choice(gold)
    if choice is None or (gold.islower() and len(squash(gold)) == 1 and gold > "h"):
        return False
    if choice.content or len(choice.letters) == 1:
        return len(squash(gold)) > 1 or gold.upper() <= "I"
    letters = [letter for letter in gold if letter in choice.letters]
    return letters == sorted(letters) and letters[-1] <= _LAST_INFERRED


def same_choice(gold: str, answer: str, options: Options, same_text: Callable[[str, str], bool]) -> bool:
    """Whether two cleaned texts name the same options; `same_text` compares an option's text with an answer."""
    wanted = resolve(gold, options, same_text)
    if wanted is None:
        return False
    written = read_choice(gold)
    if not options and written and written.content and same_text(written.content, answer):
        return True
    found = resolve(answer, options, same_text)
    return found is not None and found == wanted


def resolve(text: str, options: Options, same_text: Callable[[str, str], bool]) -> frozenset[str] | None:
    """The letters that a text names, by letter or by an option's text; None where these disagree."""
    choice = read_choice(text)
    if choice and (not options or choice.letters <= set(options)):
        named = _by_text(choice.content, options, same_text) if choice.content else None
        return choice.letters if named is None or named <= choice.letters else None
    return _by_text(text, options, same_text)


def _by_text(text: str, options: Options, same_text: Callable[[str, str], bool]) -> frozenset[str] | None:
    """The one option whose text this is; an exact spelling goes before an equal value."""
    for same in (lambda left, right: text_key(left) == text_key(right), same_text):
        letters = [letter for letter, option in options.items() if same(option, text)]
        if letters:
            return frozenset(letters) if len(letters) == 1 else None
    return None
