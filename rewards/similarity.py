"""Answers that are right to a degree: boxes for grounding by their overlap, read text by its edit distance."""

import re
import unicodedata

Box = tuple[float, float, float, float]  # left, top, right, bottom

MOST_BOXES = 100
MOST_CHARACTERS = 20_000
LEAST_SIMILARITY = 0.5  # below it nothing is paid: common words would earn a share on any page

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_BETWEEN = re.compile(r"(?:[\s,;()\[\]{}<>|:\"'=/_]|b?box|[xy]min|[xy]max)*", re.IGNORECASE)


def read_boxes(text: str) -> list[Box] | None:
    """The boxes that a text lists, four numbers each, corners in either order; None for anything else."""
    if len(text) > MOST_CHARACTERS:
        return None
    names = re.sub(r"\"label\"\s*:\s*\"[^\"]*\"|\bbbox_2d\b|\b[xy][12]\b", " ", text)
    numbers = [float(number) for number in _NUMBER.findall(names)]
    if not numbers or len(numbers) % 4 or len(numbers) > 4 * MOST_BOXES or not _only_numbers(names):
        return None
    corners = [numbers[start : start + 4] for start in range(0, len(numbers), 4)]
    return [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]


def _only_numbers(text: str) -> bool:
    return all(_BETWEEN.fullmatch(piece) for piece in _NUMBER.split(text))


def overlap(first: Box, second: Box) -> float:
    """Intersection over union; 0 for boxes without an area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(width, 0.0) * max(height, 0.0)
    union = _area(first) + _area(second) - common
    return common / union if union > 0 else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def boxes_overlap(gold: list[Box], answer: list[Box]) -> float:
    """The mean overlap of boxes matched one to one, best pairs first; boxes too many or too few count 0."""
    pairs = sorted(
        ((overlap(wanted, given), i, j) for i, wanted in enumerate(gold) for j, given in enumerate(answer)),
        reverse=True,
    )
    total, used_gold, used_answer = 0.0, set[int](), set[int]()
    for value, i, j in pairs:
        if i not in used_gold and j not in used_answer:
            total += value
            used_gold.add(i)
            used_answer.add(j)
    return total / max(len(gold), len(answer), 1)


def text_similarity(gold: str, answer: str) -> float:
    """1 minus the edit distance by the longer text's length, blanks and width apart; 0 where it is below a half."""
    gold, answer = _plain(gold), _plain(answer)
    longest = max(len(gold), len(answer))
    if longest == 0 or longest > MOST_CHARACTERS or 2 * min(len(gold), len(answer)) < longest:
        return 0.0
    similarity = 1 - edit_distance(gold, answer) / longest
    return similarity if similarity >= LEAST_SIMILARITY else 0.0


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's, by Myers' bit vectors: a column of the table is one whole number, so long texts are quick."""
    if not first or not second:
        return max(len(first), len(second))
    places: dict[str, int] = {}
    for index, character in enumerate(first):
        places[character] = places.get(character, 0) | 1 << index
    every, last = (1 << len(first)) - 1, 1 << (len(first) - 1)
    rising, falling, distance = every, 0, len(first)
    for character in second:
        same = places.get(character, 0)
        diagonal = (((same & rising) + rising) ^ rising) | same | falling
        up, down = falling | (every & ~(diagonal | rising)), rising & diagonal
        distance += bool(up & last) - bool(down & last)
        up, down = (up << 1 | 1) & every, (down << 1) & every
        rising, falling = down | (every & ~(diagonal | up)), up & diagonal
    return distance
