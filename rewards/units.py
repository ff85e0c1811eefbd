"""Units of measure: a small table of factors, compound units such as `m/s^2`, currencies and counted things."""

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

# unit of reference -> spelling -> how many of the reference it is
_TABLE: dict[str, dict[str, str]] = {
    "m": {
        **{
            "m meter metre meters metres 米": "1",
            "cm centimeter centimetre 厘米 公分": "0.01",
            "mm millimeter millimetre 毫米": "0.001",
        },
        **{
            "km kilometer kilometre 千米 公里": "1000",
            "dm decimeter decimetre 分米": "0.1",
            "um μm micrometer micron 微米": "0.000001",
        },
        **{
            "nm nanometer nanometre 纳米": "0.000000001",
            "in inch inches": "0.0254",
            "ft foot feet": "0.3048",
            "yd yard": "0.9144",
        },
        **{"mi mile": "1609.344"},
    },
    "g": {
        **{
            "g gram gramme 克": "1",
            "kg kilogram kilo 千克 公斤": "1000",
            "mg milligram 毫克": "0.001",
            "t ton tonne 吨": "1000000",
        },
        **{"lb lbs pound": "453.59237", "oz ounce": "28.349523125", "μg ug microgram": "0.000001"},
    },
    "s": {
        **{"s sec second 秒": "1", "min mins minute 分钟": "60", "h hr hrs hour 小时": "3600", "day days 天": "86400"},
        **{"ms millisecond 毫秒": "0.001", "week 周": "604800", "μs us microsecond": "0.000001"},
    },
    "year": {"yr year 年": "1", "month 个月": "1/12", "decade": "10", "century": "100"},
    "degree": {"° deg degree 度": "1"},
    "radian": {"rad radian": "1"},
    "celsius": {"°c °celsius celsius degree_celsius 摄氏度 ℃": "1"},
    "fahrenheit": {"°f °fahrenheit fahrenheit degree_fahrenheit ℉": "1"},
    "dollar": {"$ usd us$ dollar 美元": "1", "cent ¢ 美分": "0.01"},
    "euro": {"€ eur euro 欧元": "1"},
    "sterling": {"£ gbp": "1", "penny pence": "0.01"},
    "yuan": {"rmb cny yuan 元 人民币": "1", "角": "0.1"},
    "yen": {"jpy yen 日元": "1"},
    "¥": {"¥": "1"},
    "rupee": {"₹ inr rs rupee": "1"},
    "won": {"₩ krw won": "1"},
    "ampere": {"A amp ampere 安培": "1", "mA milliampere": "0.001"},
    "volt": {"V volt 伏 伏特": "1", "mV millivolt": "0.001", "kV kilovolt": "1000"},
    "ohm": {"Ω ohm 欧姆": "1", "kΩ kiloohm": "1000"},
    "newton": {"N newton 牛 牛顿": "1", "kN kilonewton": "1000"},
    "joule": {"J joule 焦耳": "1", "kJ kilojoule": "1000"},
    "watt": {"W watt 瓦 瓦特": "1", "kW kilowatt": "1000", "MW megawatt": "1000000"},
    "pascal": {"Pa pascal 帕": "1", "kPa kilopascal": "1000", "atm atmosphere": "101325"},
    "hertz": {"Hz hertz 赫兹": "1", "kHz kilohertz": "1000", "MHz megahertz": "1000000", "GHz gigahertz": "1000000000"},
    "kelvin": {"K kelvin": "1"},
    "mole": {"mol mole 摩尔": "1"},
    "byte": {"B byte": "1", "KB kilobyte": "1000", "MB megabyte": "1000000", "GB gigabyte": "1000000000"},
}
# A volume or an area with a name of its own: metres to a power.
_NAMED_POWERS = {
    **{"l L liter litre 升": ("0.001", 3), "ml mL milliliter millilitre cc 毫升": ("0.000001", 3)},
    **{"ha hectare 公顷": ("10000", 2), "acre": ("4046.8564224", 2), "gal gallon": ("0.003785411784", 3)},
}
_SCALES = {
    **{"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12},
    **{"千": 1000, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8, "mn": 10**6, "bn": 10**9},
}
# Words behind a number that make it another number or no single answer, so never a counted thing.
_NOT_COUNTED = {
    *("or", "and", "to", "by", "of", "not", "is", "than", "plus", "minus", "times", "over", "half", "halves", "third"),
    *("thirds", "quarter", "quarters", "fourths", "fifths", "tenth", "tenths", "hundredths", "thousandths", "squared"),
    *("cubed", "maybe", "pi", "sin", "cos", "tan", "log", "ln", "exp", "sqrt", "mod", "deg", "i"),
}
_NEEDS_SPACE = {"t", "h", "l", "K", "B", "T"}
_SAME_SIGN = ({"¥", "yen"}, {"¥", "yuan"})
_CURRENCY = re.compile(r"^(-?)\s*(US\$|[$€£¥₹₩]|USD|EUR|GBP|CNY|RMB|JPY|INR)\s*(?=[-.\d])", re.IGNORECASE)
_SUFFIX = re.compile(r"\\[A-Za-z]+|\d[eE][+-]?\d+|([A-Za-zμΩ°$€£¥₹₩¢一-鿿].*)")
_CHINESE_SCALE = re.compile(r"^(百万|千万|[千万亿])(?=[^\s千万亿])(?!米|克|瓦)")
_PART = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z一-鿿]+\.?|°|''?|\")[, ]{0,2}(?:and )?")
_FACTOR = re.compile(r"([A-Za-zμΩ°$€£¥₹₩¢一-鿿]+)(?:\^?\{?(-?\d)\}?)?")
_SHORT_SPEEDS = {"kmph": "km/h", "kph": "km/h", "mph": "mi/h", "mps": "m/s"}
_POWER_WORDS = {"square": 2, "sq": 2, "sq.": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3, "平方": 2, "立方": 3}


@dataclass(frozen=True)
class Unit:
    """A unit as a factor on units of reference to their powers."""

    factor: Fraction
    powers: tuple[tuple[str, int], ...]  # sorted (unit of reference, power)
    scale: int = 1  # "million" and its like, which count even against a bare number


def _spellings() -> dict[str, Unit]:
    table: dict[str, Unit] = {}
    for reference, spelled in _TABLE.items():
        for names, factor in spelled.items():
            table |= dict.fromkeys(names.split(), Unit(Fraction(factor), ((reference, 1),)))
    for names, (factor, power) in _NAMED_POWERS.items():
        table |= dict.fromkeys(names.split(), Unit(Fraction(factor), (("m", power),)))
    return table


_UNITS = _spellings()


def split_unit(text: str) -> tuple[str, str]:
    """A cleaned text as (number, unit): the unit starts at the first letter outside a LaTeX command, or is a prefix."""
    if match := _CURRENCY.match(text):
        number, suffix = split_unit(match[1] + text[match.end() :])
        return number, f"{suffix} {match[2]}".strip() if suffix in _SCALES else match[2]
    for match in _SUFFIX.finditer(text):
        if match[1] and (text[: match.start()].endswith(" ") or _may_touch(match[1].strip(" ."))):
            return text[: match.start()].strip(), match[1].strip(" .")
        if match[1]:
            break
    return text, ""


def _may_touch(unit: str) -> bool:
    """Whether a unit may follow its number without a space: not an unknown word (2ab), nor a letter used in algebra."""
    return unit not in _NEEDS_SPACE and (not unit[0].isascii() or _compound(unit) is not None or unit in _SCALES)


def read_parts(text: str) -> tuple[str, Unit] | None:
    """A quantity in falling units, in the last of them: `2 h 30 min`, `6 feet 2 inches`, `35° 30'`."""
    parts = [(Fraction(number), _arc(mark) or _known(mark.rstrip("."))) for number, mark in _PART.findall(text)]
    units = [unit for _, unit in parts if unit]
    if len(parts) < 2 or len(units) < len(parts) or _PART.sub("", text).strip():
        return None
    falling = all(larger.factor > smaller.factor for larger, smaller in pairwise(units))
    if not falling or len({unit.powers for unit in units}) > 1:
        return None
    total = sum(number * unit.factor for number, unit in parts if unit) / units[-1].factor
    return str(total), units[-1]


def _arc(mark: str) -> Unit | None:
    """Minutes and seconds of an angle."""
    sizes = {"'": 60, '"': 3600, "''": 3600}
    return Unit(Fraction(1, sizes[mark]), (("degree", 1),)) if mark in sizes else None


def read_unit(text: str) -> Unit | None:
    """The unit that a text names; counted things ("apples") are units of their own; None for anything else."""
    scale, words = 1, _CHINESE_SCALE.sub(r"\1 ", text).split()
    while words and words[0].casefold() in _SCALES:
        scale *= _SCALES[words.pop(0).casefold()]
    if not words:
        return Unit(Fraction(1), (), scale)
    unit = _compound(" ".join(words)) or _counted(words)
    return unit and Unit(unit.factor, unit.powers, scale)


def conversion(gold: Unit, answer: Unit) -> Fraction | None:
    """What the answer's number is multiplied with to be in the gold's unit; None where the units do not fit.

    A unit on one side alone is accepted as it stands, save for its scale.
    """
    scale = Fraction(answer.scale, gold.scale)
    if not gold.powers or not answer.powers:
        return scale
    names = {gold.powers[0][0], answer.powers[0][0]}
    if gold.powers != answer.powers and names not in _SAME_SIGN:
        return None
    return scale * answer.factor / gold.factor


def _compound(text: str) -> Unit | None:
    """`m/s^2`, `kg m^{-3}`, `square cm`, `km per hour`, `平方厘米`."""
    text = re.sub(r"\s*(?:/|\bper\b)\s*", "/", _SHORT_SPEEDS.get(text.casefold(), text))
    text = re.sub(r"(degrees?) (celsius|fahrenheit)", r"\2", text.replace("° ", "°"), flags=re.IGNORECASE)
    factor, powers = Fraction(1), dict[str, int]()
    for index, side in enumerate(text.split("/")):
        found = _product(side.strip("() "), -1 if index else 1)
        if found is None:
            return None
        factor *= found.factor
        for name, power in found.powers:
            powers[name] = powers.get(name, 0) + power
    return Unit(factor, tuple(sorted((name, power) for name, power in powers.items() if power)))


def _product(text: str, sign: int) -> Unit | None:
    """Units written side by side, with powers."""
    factor, powers, pending = Fraction(1), dict[str, int](), 1
    words = re.sub(r"^(平方|立方)", r"\1 ", text).replace("*", " ").split()
    if words and words[-1] in ("squared", "cubed"):
        words.insert(0, words.pop())
    for word in words:
        if word.casefold() in _POWER_WORDS:
            pending = _POWER_WORDS[word.casefold()]
            continue
        match = _FACTOR.fullmatch(word.rstrip("."))
        unit = _known(match[1]) if match else None
        if match is None or unit is None:
            return None
        power = sign * pending * int(match[2] or 1)
        factor, pending = factor * unit.factor**power, 1
        for name, own in unit.powers:
            powers[name] = powers.get(name, 0) + own * power
    return Unit(factor, tuple(powers.items())) if words else None


def _known(word: str) -> Unit | None:
    """A spelling of the table: as written (M is not m), else in lower case, else without a plural s."""
    lower = word.casefold() if len(word) > 2 or word.isupper() else word
    if word in ("M", "S", "G", "T", "H"):
        return None
    return _UNITS.get(word) or _UNITS.get(lower) or (_UNITS.get(lower.removesuffix("s")) if len(lower) > 3 else None)


def _counted(words: list[str]) -> Unit | None:
    """ "red apples": one to three plain words, named by the last one in the singular."""
    if words[0] == "of":  # "of the cake"
        words = [word for word in words[1:] if word not in ("the", "a", "an")]
    plain = bool(words) and all(word.isalpha() and (len(word) > 1 or not word.isascii()) for word in words)
    if not plain or len(words) > 3 or _NOT_COUNTED & {word.casefold() for word in words}:
        return None
    return Unit(Fraction(1), ((words[-1].casefold().removesuffix("s"), 1),))
