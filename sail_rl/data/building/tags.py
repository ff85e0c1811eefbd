"""One spelling for traces: `reasoning` without tags and `answer` without box, whatever tags a dataset has used."""

import re
from collections.abc import Mapping
from typing import Any

from rewards.answers import boxed_answers, split_completion
from sail_rl.data.building.rows import without_turn
from sail_rl.data.example import assistant_turn
from sail_rl.data.images import BadRow

Row = dict[str, Any]
# Only where a text uses them as tags: names that mean a think block or an answer in datasets of traces.
_THINK = re.compile(r"<(/?)\s*(?:think|thinking|thought|reasoning)\s*>", re.IGNORECASE)
_ANSWER = re.compile(r"<\s*(answer|conclusion)\s*>(.*?)<\s*/\s*\1\s*>", re.IGNORECASE | re.DOTALL)
_OTHER = re.compile(r"</?\s*(?:summary|caption)\s*>", re.IGNORECASE)


def repair(row: Row) -> tuple[Row, str]:
    """The row in our columns, and what was mended, or nothing; raises BadRow where it cannot be told what was meant."""
    target = assistant_turn(row)
    return mend_columns(row) if target is None else split_turn(row, target)


def mend_columns(row: Row) -> tuple[Row, str]:
    """Tags around the reasoning and a box around the answer are taken away: the target has its own."""
    mended = dict(row)
    if row.get("reasoning"):
        mended["reasoning"] = bare_reasoning(str(row["reasoning"]))
    if isinstance(row.get("answer"), str):
        mended["answer"] = bare_answer(row["answer"])
    changed = [name for name in ("reasoning", "answer") if mended.get(name) != row.get(name)]
    return mended, f"tags repaired in {' and '.join(changed)}" if changed else ""


def bare_reasoning(text: str) -> str:
    """Reasoning without the tags at its ends; raises BadRow for tags in its middle."""
    plain = _OTHER.sub("", _THINK.sub(r"<\1think>", text)).strip()
    plain = plain.removeprefix("<think>").removesuffix("</think>").strip()
    if "<think>" in plain or "</think>" in plain:
        raise BadRow("the reasoning has think tags in its middle")
    return plain


def bare_answer(text: str) -> str:
    """The content of the last box, or of answer tags, where there are such."""
    tagged = _ANSWER.findall(text)
    inner = tagged[-1][1].strip() if tagged else text
    boxes = boxed_answers(inner)
    return boxes[-1].content.strip() if boxes else inner


def split_turn(row: Row, target: str) -> tuple[Row, str]:
    """Reasoning and answer of a turn of the assistant's, as columns of their own; raises BadRow."""
    text = _THINK.sub(r"<\1think>", target).strip()
    tagged = list(_ANSWER.finditer(text))
    if tagged and "<think>" not in text:
        reasoning, answer = _OTHER.sub("", text[: tagged[-1].start()]), tagged[-1][2]
        return with_parts(row, reasoning.strip(), bare_answer(answer).strip())
    if "</think>" in text and "<think>" not in text:  # a template that opens the block in the prompt
        text = "<think>" + text
    parts = split_completion(text)
    if parts.problem or parts.judge is not None:
        raise BadRow(f"the tags of the assistant's turn are {parts.problem or 'of another form'}")
    answer = bare_answer(parts.rest).strip()
    if not boxed_answers(parts.rest) and not tagged and parts.think is None:
        return dict(row), ""  # a plain answer: it is imitated to the letter
    return with_parts(row, (parts.think or "").strip(), answer)


def with_parts(row: Mapping[str, Any], reasoning: str, answer: str) -> tuple[Row, str]:
    """The row with reasoning and answer in the place of the turn."""
    if not answer:
        raise BadRow("nothing follows the reasoning in the assistant's turn")
    kept = without_turn(row) | {"answer": answer} | ({"reasoning": reasoning} if reasoning else {})
    return kept, "turn of the assistant's split into reasoning and answer" if reasoning else "answer taken from its box"
