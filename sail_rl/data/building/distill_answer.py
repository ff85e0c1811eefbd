"""`sail-rl data distill-answer`: wordy answers become short ones that can be compared with.

By rule where the answer has a box; else a model names the essential answer. It is taken where all its numbers are the
wordy answer's, and where the same model, asked as a judge that sees both, finds that they say the same.
"""

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from rewards.accuracy import gold_text
from rewards.gold import gold_problem
from rewards.judge import Judge
from rewards.judge_prompt import JudgeQuestion
from rewards.ladder import Row as Gold
from sail_rl.command_line import BadInput
from sail_rl.data.building.asking import Asker, as_object, endpoint_settings, messages_about, read_object, reason_of
from sail_rl.data.building.job import Job, Record, Taken, do_job, open_journal
from sail_rl.data.building.rows import question_text
from sail_rl.data.images import BadRow
from sail_rl.data.mixture import JoinedRows

INSTRUCTION = """Someone has answered the question above like this:
{answer}
What is the essential answer, as short as it can be said: a number with its unit, a name, a few words, a formula? Take \
it from the text as it is, right or wrong; add nothing, work nothing out. If the text has no single short answer, give \
an empty text.
Reply with one JSON object: `answer`."""
REPLY = {"answer": "string"}
SAME = (
    "Two answers to the question are given, a long one and a short one. True only if the short answer is the final "
    "answer that the long one comes to: whoever holds one of them right must hold the other right, too, with the same "
    "value, unit, sign and meaning. It does not matter whether they are right, or that the long one explains more."
)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def shorten(rows: JoinedRows, arguments: argparse.Namespace) -> None:
    """The whole command."""
    if arguments.most_words < 1:
        raise BadInput(f"--most-words {arguments.most_words}: give 1 or more")
    settings = endpoint_settings(arguments)
    job = Job(
        "distill-answer",
        rows,
        arguments.output,
        {name: getattr(arguments, name) for name in ("split", "model", "most_words")},
        arguments.limit,
    )
    journal = open_journal(job)
    if journal is None:
        return
    asker = Asker(settings, begun=len(journal) > 0)
    do_job(job, journal, partial(work, job, asker, Judge(settings), arguments.most_words), asker.at_once)


def work(job: Job, asker: Asker, judge: Judge, most: int, taken: Sequence[Taken]) -> list[Record]:
    """Records of a chunk."""
    records: list[Record] = []
    wordy: list[Taken] = []
    for one in taken:
        record = by_rule(one, most)
        records += [record] if record else []
        wordy += [] if record else [one]
    requests = {}
    for one in wordy:
        try:
            question_text(one.row)  # which the judge is shown
            turns = messages_about(one.row, job.output.parent, INSTRUCTION.format(answer=answer_of(one)))
        except BadRow as error:
            records.append(one.dropped("cannot be asked about", str(error)))
            continue
        read = partial(read_object, names=tuple(REPLY))
        requests[one.number] = asker.request(turns, read, temperature=0, **as_object(REPLY))
    answers = asker.ask(requests)
    short: list[tuple[Taken, str]] = []
    for one in wordy:
        answer = answers.get(one.number)
        if answer and answer.failure:
            records.append(one.dropped(reason_of(answer.failure), answer.failure))
        elif answer:
            text = str(answer.value["answer"]).strip()
            problem = problem_of(answer_of(one), text, most)
            records += [one.dropped(problem, text)] if problem else []
            short += [] if problem else [(one, text)]
    return records + compared(asker, judge, short)


def answer_of(one: Taken) -> str:
    """The row's answer, or the whole of its solution."""
    return str(one.row["answer"] if one.row.get("answer") is not None else one.row.get("solution") or "")


def by_rule(one: Taken, most: int) -> Record | None:
    """The record of a row that no model is needed for."""
    given = answer_of(one)
    if not given.strip():
        return one.dropped("malformed row", "no `answer` (or `solution`)")
    gold = gold_text(given)
    if len(gold.split()) > most:
        return None
    if gold == given.strip() and one.row.get("answer") is not None:
        return one.kept("short already", one.row)
    return one.kept("taken from its box", one.row | {"answer": gold})


def problem_of(given: str, text: str, most: int) -> str:
    """What can be seen to be wrong with a short answer; empty where nothing can."""
    if not text:
        return "the model finds no short answer in it"
    if len(text.split()) > most:
        return "the model's answer is wordy, too"
    if gold_problem(Gold(text)):
        return "the model's answer cannot be compared with"
    added = Counter(numbers(text)).keys() - set(numbers(given))
    return "the model's answer has a number that is not in the text" if added else ""


def numbers(text: str) -> list[str]:
    """The numbers of a text in one spelling."""
    return [number.lstrip("0") or "0" for number in _NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3})", "", text))]


def compared(asker: Asker, judge: Judge, short: Sequence[tuple[Taken, str]]) -> list[Record]:
    """Records of those that the judge has a verdict about."""
    questions = [same_question(one, text) for one, text in short]
    verdicts = judge.ask(questions) if questions else []
    records = []
    for (one, text), verdict in zip(short, verdicts, strict=True):
        if verdict.value is None:
            failure = verdict.failure or ""
            if not failure.startswith(("refusal", "reply")):
                asker.problem = asker.problem or failure  # stays to be done
                continue
            records.append(one.dropped(reason_of(failure), failure))
        elif verdict.value:
            changed: dict[str, Any] = {"answer": text, "wordy_answer": answer_of(one)}
            records.append(one.kept("shortened by the model", one.row | changed))
        else:
            records.append(one.dropped("the short answer is not the same", text))
    return records


def same_question(one: Taken, text: str) -> JudgeQuestion:
    """Whether both say the same; without the picture, which would tempt to answer."""
    written = {"The long answer": answer_of(one), "The short answer": text}
    return JudgeQuestion("is_same_answer", SAME, question_text(one.row), written)
