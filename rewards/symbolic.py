r"""Real expressions: what may be asked of symbolic algebra, which a worker process answers (algebra.py).

Nothing here imports sympy. What could keep it busy is refused before it is asked; a refused answer is a wrong one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from rewards.notation import MAX_LENGTH, squash
from rewards.verdict import Outcome

MAX_DEPTH = 12
MAX_FUNCTIONS = 4  # nested or multiplied trigonometry takes seconds to simplify
MAX_POWER_OF_SUM = 12  # all exponents on brackets multiplied

_REFUSED = re.compile(
    r"\\(?:sum|prod|int|iint|iiint|oint|lim|limsup|liminf|bigcup|bigcap|coprod|max|min)(?![A-Za-z])|∑|∏|∫"
    r"|\*\*|\*\s+\*|\d{31}|\d[eE]\+?\d{4}|\^\s*\{?\s*[-+]?\s*\d{5}|\d{4}\s*\}?\s*!|[)}\]!]\s*!|(?:![^!]*){5}|(?:[-+]\s*){4}|\d\.\d*e\+?\d{4}|[\x00-\x08]"
)
_BINOMIAL = re.compile(r"\\[dt]?binom(?![A-Za-z])(?!\s*\{\s*\d{1,3}\s*\}\s*\{\s*\d{1,3}\s*\})")
_FUNCTION = re.compile(r"(?:sinh?|cosh?|tanh?|cot|sec|csc|log|ln|lg|exp)(?![a-z])")
_LETTER_TOWER = re.compile(r"\^\{[^{}^]*[a-df-zA-Z]\^\{?\d\}?[^{}^]*\}")
_SUM_POWER = re.compile(r"[)\]}]\s*\^\s*\{?\s*([-+]?\d+)")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_FUNCTIONS = {
    *("frac", "sqrt", "pi", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh"),
    *("tanh", "log", "ln", "lg", "exp", "binom", "e", "i", "infty", "cup", "cap", "in", "pm", "le", "ge", "ne", "gcd"),
    *("emptyset", "begin", "end", "cdot", "ldots", "dots", "mid", "angle", "triangle", "approx", "setminus", "lcm"),
}
_PLAIN_FUNCTIONS = re.compile(r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|log|ln|exp)(?![A-Za-z])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*°")
_LETTER_RUN = re.compile(r"\\(?:begin|end)\{[a-z]+\*?\}|\\[A-Za-z]+|[A-Za-z]{2,}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-z]+\*?\}")


def refused(text: str) -> bool:
    """Whether an expression is one that symbolic algebra must never see; linear in the text."""
    if len(text) > MAX_LENGTH or _REFUSED.search(text) or _BINOMIAL.search(text) or _too_deep(text):
        return True
    if len(_FUNCTION.findall(text)) > MAX_FUNCTIONS:
        return True
    power = 1
    for exponent in _SUM_POWER.findall(text):
        power *= max(abs(int(exponent)), 1)
    return power > MAX_POWER_OF_SUM or _tower(_LETTER_TOWER.sub("", text))


def _too_deep(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        if depth > MAX_DEPTH:
            return True
    return False


def _tower(text: str) -> bool:
    """Whether an exponent holds a power or a factorial: 9^{9^9}, 2^3^4, 2^{9!}."""
    opened: list[bool] = []  # for each open bracket: does it stand in an exponent
    before = ""
    for character in text.replace(" ", ""):
        if character in "({[":
            opened.append(before == "^" or any(opened[-1:]))
        elif character in ")}]" and opened:
            opened.pop()
        elif character in "^!" and any(opened[-1:]):
            return True
        before = character
    return bool(re.search(r"\^\\?\w+[\^!]", squash(text)))


def symbols(text: str) -> set[str]:
    """The free names of an expression: single letters and Greek commands; constants and functions are none."""
    text = _ENVIRONMENT.sub(" ", text)
    named = {name for name in _COMMAND.findall(text) if name not in _FUNCTIONS}
    plain = _PLAIN_FUNCTIONS.sub(" ", _COMMAND.sub(" ", text))
    return named | {letter for letter in plain if letter.isalpha() and letter not in "ei"}


@dataclass(frozen=True)
class Question:
    """For a worker: are two texts the same expression, or what is the value of one."""

    kind: Literal["same", "value"]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Reply:
    """What a worker found, or why it found nothing."""

    value: bool | Fraction | None = None
    problem: Outcome | None = None
    seconds: float = 0.0


class Unanswered(Exception):
    """A comparison cannot go on without the answer to a question."""

    def __init__(self, question: Question):
        super().__init__(question)
        self.question = question


class Algebra:
    """Symbolic algebra for one comparison, as far as its replies are known; it asks by raising Unanswered."""

    def __init__(self, known: Mapping[Question, Reply]):
        self._known = known
        self.problems: set[Outcome] = set()
        """Why some of what was asked has no answer."""
        self.seconds = 0.0
        """What the replies took in the workers."""

    def same(self, gold: str, answer: str) -> bool:
        """Whether two cleaned expressions are equal."""
        names = symbols(answer)
        if self._refuses(gold, answer) or not names <= symbols(gold) or (symbols(gold) and not names):
            return False
        return self._ask(Question("same", (gold, answer))) is True

    def value(self, text: str) -> Fraction | None:
        r"""The value of a constant such as 2\pi to 15 digits, or None."""
        if symbols(text) or self._refuses(text):
            return None
        value = self._ask(Question("value", (text,)))
        return value if isinstance(value, Fraction) else None

    def _refuses(self, *texts: str) -> bool:
        if any(map(refused, texts)):
            self.problems.add(Outcome.REFUSED)
            return True
        return False

    def _ask(self, question: Question) -> bool | Fraction | None:
        reply = self._known.get(question)
        if reply is None:
            raise Unanswered(question)
        if reply.problem:
            self.problems.add(reply.problem)
        self.seconds += reply.seconds
        return reply.value


def parser_spelling(text: str) -> str:
    """A cleaned text in the spelling that math-verify's parser knows."""
    text = _PLAIN_FUNCTIONS.sub(r"\\\1 ", text)
    if _FUNCTION.search(text):  # it takes radians
        text = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    text = _LETTER_RUN.sub(lambda run: run[0] if run[0].startswith("\\") else " ".join(run[0]), text)
    return text.replace("*", r"\cdot ").replace("°", r"^{\circ}")
