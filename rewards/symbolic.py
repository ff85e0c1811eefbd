r"""Real expressions: math-verify behind a cheap refusal of what could keep it busy for ever.

math-verify stops itself by SIGALRM alone, which works in the main thread only; in any other thread both timeouts are
None and `refused` is the whole defence, so it errs on the side of refusing. A refused answer is a wrong one.
"""

import logging
import re
import signal
import threading
import time
from fractions import Fraction
from typing import Any

from rewards.notation import MAX_LENGTH, squash

TIMEOUT_SECONDS = 1  # whole seconds, for each parse and for each comparison
MAX_DEPTH = 12
MAX_FUNCTIONS = 4  # nested or multiplied trigonometry takes seconds to simplify
MAX_POWER_OF_SUM = 12  # all exponents on brackets multiplied

_REFUSED = re.compile(
    r"\\(?:sum|prod|int|iint|iiint|oint|lim|limsup|liminf|bigcup|bigcap|coprod|max|min)(?![A-Za-z])|∑|∏|∫"
    r"|\*\*|\*\s+\*|\d{31}|\d[eE]\+?\d{4}|\^\s*\{?\s*[-+]?\s*\d{5}|\d{4}\s*\}?\s*!|[)}\]!]\s*!|(?:![^!]*){5}|(?:[-+]\s*){4}|\d\.\d*e\+?\d{4}|[\x00-\x08]"
)
_BINOMIAL = re.compile(r"\\[dt]?binom(?![A-Za-z])(?!\s*\{\s*\d{1,3}\s*\}\s*\{\s*\d{1,3}\s*\})")
_FUNCTION = re.compile(r"(?:sinh?|cosh?|tanh?|cot|sec|csc|log|ln|lg|exp)(?![a-z])")
_LETTER_TOWER = re.compile(r"\^\{[^{}^]*[a-zA-Z]\^\{?\d\}?[^{}^]*\}")
_SUM_POWER = re.compile(r"[)\]}]\s*\^\s*\{?\s*([-+]?\d+)")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_FUNCTIONS = {
    *("frac", "sqrt", "pi", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh"),
    *("tanh", "log", "ln", "lg", "exp", "binom", "e", "i", "infty", "cup", "cap", "in", "pm", "le", "ge", "ne", "gcd"),
    *("emptyset", "begin", "end", "cdot", "ldots", "dots", "mid", "angle", "triangle", "approx", "setminus", "lcm"),
}
_PLAIN_FUNCTIONS = re.compile(r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|log|ln|exp)(?![A-Za-z])")
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


def same_expression(gold: str, answer: str) -> bool:
    """Whether math-verify finds two cleaned expressions equal."""
    names = symbols(answer)
    if refused(gold) or refused(answer) or not names <= symbols(gold) or (symbols(gold) and not names):
        return False
    return _guarded(_compare, gold, answer) is True


def constant_value(text: str) -> Fraction | None:
    r"""The value of a constant such as 2\pi to 15 digits, or None."""
    if refused(text) or symbols(text):
        return None
    value = _guarded(_evaluate, text)
    return value if isinstance(value, Fraction) else None


def _guarded(function: Any, *texts: str) -> Any:
    """Call into math-verify; whatever it or sympy raises on strange input means that nothing was shown."""
    # 3 s of import, needed for the rare expression only.
    from math_verify.errors import TimeoutException

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns of each timeout, which is a verdict here
    watchdog, started = signal.getitimer(signal.ITIMER_REAL), time.monotonic()
    try:
        return function(*[_latex(text) for text in texts])
    except (Exception, TimeoutException):  # its TimeoutException derives from BaseException
        return None
    finally:
        if watchdog[0] and _timeout():  # its alarm has cancelled a timer that the caller had set
            signal.setitimer(signal.ITIMER_REAL, max(watchdog[0] - time.monotonic() + started, 1e-3), watchdog[1])


def _compare(gold: str, answer: str) -> bool:
    from math_verify import verify

    pair = _parse(gold), _parse(answer)
    return all(pair) and bool(verify(*pair, timeout_seconds=_timeout()))


def _evaluate(text: str) -> Fraction | None:
    parsed = _parse(text)
    value = parsed[0].evalf(15) if parsed else None
    return Fraction(str(value)) if value is not None and value.is_Float and value.is_finite else None


def _parse(text: str) -> list[Any]:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # Units are gone by now; its own list of them would read 2ab as 2.
    normalization = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="all", equations=False)
    config = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)]
    return parse(rf"\boxed{{{text}}}", config, fallback_mode="no_fallback", parsing_timeout=_timeout())


def _timeout() -> int | None:
    return TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None


def _latex(text: str) -> str:
    """A cleaned text in the spelling that math-verify's parser knows."""
    text = _PLAIN_FUNCTIONS.sub(r"\\\1 ", text)
    text = _LETTER_RUN.sub(lambda run: run[0] if run[0].startswith("\\") else " ".join(run[0]), text)
    return text.replace("*", r"\cdot ").replace("°", r"^{\circ}")
