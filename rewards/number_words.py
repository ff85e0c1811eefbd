"""Numbers in words, English and Chinese: `twenty-one`, `three quarters`, `三十五`, `十万`, `二点五`."""

import re

_ONES = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_PARTS = {
    **{"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7},
    **{"eighth": 8, "ninth": 9, "tenth": 10, "twelfth": 12, "hundredth": 100, "thousandth": 1000},
}
_DIGITS = {**{digit: value for value, digit in enumerate("零一二三四五六七八九")}, "〇": 0, "两": 2}
_SCALES = {"十": 10, "百": 100, "千": 1000}
_LARGE = {"亿": 10**8, "万": 10**4}
_CHINESE = "".join((*_DIGITS, *_SCALES, *_LARGE))
_CHINESE_RUN = re.compile(f"([{_CHINESE}]+)(?:点([{''.join(_DIGITS)}]+))?")
_PERCENT = re.compile(r"^ per ?cent$", re.IGNORECASE)
_CHINESE_FRACTION = re.compile(f"([{_CHINESE}]+)分之([{_CHINESE}]+)")
_MINUS = re.compile(r"^(?:negative|minus|负)\s*", re.IGNORECASE)


def _english_names() -> dict[str, int]:
    """Numbers below a hundred, and a few round ones."""
    names = {word: value for value, word in enumerate(_ONES)}
    for tens, name in enumerate(_TENS, 2):
        names[name] = 10 * tens
        for ones in range(1, 10):
            names |= dict.fromkeys((f"{name}-{_ONES[ones]}", f"{name} {_ONES[ones]}"), 10 * tens + ones)
    return names | {"one hundred": 100, "a hundred": 100, "one thousand": 1000, "a thousand": 1000}


_NAMES = _english_names()
_FRACTION = re.compile(
    rf"(?:({'|'.join(_NAMES)}) and )?({'|'.join((*_ONES[1:], 'a'))})[- ]({'|'.join(_PARTS)})(s?)", re.IGNORECASE
)
_LEADING = re.compile(rf"({'|'.join(sorted(_NAMES, key=len, reverse=True))})(?= )", re.IGNORECASE)


def spelled(text: str) -> str | None:
    """The number that a text names, in digits; None for anything else."""
    sign, words = ("-", _MINUS.sub("", text)) if _MINUS.match(text) else ("", text)
    if (value := _NAMES.get(words.casefold())) is not None:
        return f"{sign}{value}"
    if fraction := _FRACTION.fullmatch(words):
        above = f"{_NAMES[fraction[1].casefold()]} " if fraction[1] else ""
        return f"{sign}{above}{_NAMES.get(fraction[2].casefold(), 1)}/{_PARTS[fraction[3].casefold()]}"
    if fraction := _CHINESE_FRACTION.fullmatch(words):
        below, top = _chinese(fraction[1]), _chinese(fraction[2])
        return f"{sign}{top}/{below}" if below and top is not None else None
    run = _CHINESE_RUN.fullmatch(words)
    whole = _chinese(run[1]) if run else None
    if run is None or whole is None:
        return None
    return f"{sign}{whole}" + (f".{''.join(str(_DIGITS[digit]) for digit in run[2])}" if run[2] else "")


def digits_first(text: str) -> str:
    """A number in words ahead of a unit in digits: `eight apples`, `三厘米`; any other text as it is."""
    if whole := spelled(text):
        return whole
    if words := _LEADING.match(text):
        return f"{_NAMES[words[1].casefold()]}{_PERCENT.sub('%', text[words.end() :])}"
    run = _CHINESE_RUN.match(text)
    value = _chinese(run[1]) if run and not run[2] else None
    return text if run is None or value is None else f"{value} {text[run.end() :]}"


def _chinese(text: str) -> int | None:
    """`三十五`, `一百零二`, `十万`: digits before their scales; None where they stand in another order."""
    for name, large in _LARGE.items():
        high, found, low = text.partition(name)
        if found:
            above, below = _chinese(high), _chinese(low.removeprefix("零")) if low else 0
            return None if above is None or below is None else above * large + below
    digit: int | None = None
    total, last = 0, 10_000
    for character in text:
        if (size := _SCALES.get(character)) is not None:
            if size >= last or (digit is None and text[0] != "十"):
                return None
            total, digit, last = total + (1 if digit is None else digit) * size, None, size
        elif digit:
            return None
        else:
            digit = _DIGITS[character]
    return (total + (digit or 0)) if text else None
