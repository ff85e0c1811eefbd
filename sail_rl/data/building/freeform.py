"""`sail-rl data freeform`: multiple choice into free form, so that guessing a letter earns nothing.

By rule where the right option is a number or a quantity and the question stands without its options; else a model puts
the question in other words, if one is named.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rewards.accuracy import gold_text, verify
from rewards.gold import gold_problem, gold_type
from rewards.ladder import Row as Gold
from rewards.notation import text_key
from sail_rl.command_line import BadInput
from sail_rl.data.building.asking import Asker, as_object, endpoint_settings, messages_about, read_object, reason_of
from sail_rl.data.building.job import Job, Record, Taken, do_job, open_journal
from sail_rl.data.building.journal import Row
from sail_rl.data.building.options import LEANS, Choices, is_sure, read_choices, speaks_of_others
from sail_rl.data.building.rows import question_text, with_question, without_turn
from sail_rl.data.images import BadRow
from sail_rl.data.mixture import JoinedRows

AT_ONCE = 256
INSTRUCTION = """The question above was asked with these options, of which {letter} is right:
{options}
Rewrite it so that it can be answered without seeing the options, by a short answer that can only be the text of the \
right one. Keep everything else that the question says, and say what form the answer has (a unit, a name, a number of \
decimals) if that is needed. Do not give the answer away, and do not mention options. If this cannot be done, because \
the question only makes sense with its options or has several good answers, say so.
Reply with one JSON object: `possible` (true or false), `question` (the new question, or an empty text) and `answer` \
(its short answer)."""
REPLY = {"possible": "boolean", "question": "string", "answer": "string"}


@dataclass(frozen=True)
class Open:
    """A row that a model is asked about."""

    taken: Taken
    choices: Choices


def make_free(rows: JoinedRows, arguments: argparse.Namespace) -> None:
    """The whole command."""
    if bool(arguments.base_url) != bool(arguments.model):
        raise BadInput("--base-url and --model: give both, or neither to do what is sure without a model")
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in ("split", "model", "others")}
    job = Job("freeform", rows, arguments.output, settings, arguments.limit)
    endpoint = endpoint_settings(arguments) if arguments.model else None
    journal = open_journal(job)
    if journal is None:
        return
    asker = Asker(endpoint, begun=len(journal) > 0) if endpoint else None
    at_once = asker.at_once if asker else AT_ONCE
    do_job(job, journal, partial(work, job, asker, arguments.others), at_once)


def work(job: Job, asker: Asker | None, others: str, taken: Sequence[Taken]) -> list[Record]:
    """Records of a chunk."""
    looked = [by_rule(one, others) for one in taken]
    records = [one for one in looked if isinstance(one, Record)]
    unsure = [one for one in looked if isinstance(one, Open)]
    if asker is None:
        return records + [one.taken.dropped("needs a model to be put in other words") for one in unsure]
    return records + by_model(job, asker, unsure)


def by_rule(one: Taken, others: str) -> Record | Open:
    """What is sure; else what a model is to be asked about."""
    try:
        question = question_text(one.row)
    except BadRow as error:
        return one.dropped("malformed row", str(error))
    gold = gold_text(one.row.get("answer")) or gold_text(one.row.get("solution"))
    choices = read_choices(question, one.row, gold)
    if choices is None:
        reason = "not multiple choice"
        return one.kept(reason, one.row) if others == "keep" else one.dropped(reason)
    if isinstance(choices, str):
        return one.dropped(choices)
    if speaks_of_others(choices):
        return one.dropped("its right option speaks of others")
    if is_sure(choices):
        return one.kept("options taken away", free_row(one.row, choices.stem, choices.right))
    return Open(one, choices)


def free_row(row: Row, question: str, answer: str) -> Row:
    """The row as a question with a short answer; the choice it came from is kept in one column."""
    dropped = ("options", "answer_type", "solution", "reasoning")
    kept = {name: value for name, value in with_question(without_turn(row), question).items() if name not in dropped}
    was = {"question": question_text(row), "options": row.get("options"), "answer": row.get("answer")}
    return kept | {"answer": answer, "answer_type": gold_type(Gold(answer)), "choice": was}


def by_model(job: Job, asker: Asker, unsure: Sequence[Open]) -> list[Record]:
    """A record for each row that there is an answer about."""
    requests, records = {}, []
    for one in unsure:
        try:
            turns = messages_about(one.taken.row, job.output.parent, instruction(one.choices))
        except BadRow as error:
            records.append(one.taken.dropped("cannot be asked about", str(error)))
            continue
        read = partial(read_object, names=tuple(REPLY))
        requests[one.taken.number] = asker.request(turns, read, temperature=0, **as_object(REPLY))
    answers = asker.ask(requests)
    for one in unsure:
        answer = answers.get(one.taken.number)
        if answer and answer.failure:
            records.append(one.taken.dropped(reason_of(answer.failure), answer.failure))
        elif answer:
            records.append(rewritten(one, answer.value))
    return records


def instruction(choices: Choices) -> str:
    """What the model is asked to do."""
    letter = next(letter for letter, text in choices.options.items() if text == choices.right)
    lines = [f"{name}. {text}" for name, text in choices.options.items()]
    return INSTRUCTION.format(letter=letter, options="\n".join(lines))


def rewritten(one: Open, reply: dict[str, Any]) -> Record:
    """The row as the model puts it, if that is the same question and gives nothing away."""
    taken, choices, question = one.taken, one.choices, str(reply["question"]).strip()
    if reply["possible"] is not True or not question:
        return taken.dropped("the model finds it cannot be free form")
    problem = problem_of(choices, question, str(reply["answer"]))
    if problem:
        return taken.dropped(problem, question)
    marks = "<image>" * choices.stem.count("<image>")  # a model sees pictures, not their marks
    try:
        written = free_row(taken.row, marks + question, choices.right)
    except BadRow as error:
        return taken.dropped("malformed row", str(error))
    return taken.kept("put in other words by the model", written)


def problem_of(choices: Choices, question: str, answer: str) -> str:
    """What speaks against a model's question; empty where nothing does."""
    if gold_problem(Gold(choices.right)):
        return "its answer cannot be compared with"
    if not verify(choices.right, answer):
        return "the model's answer is another one"
    if LEANS.search(question) and not LEANS.search(choices.stem):
        return "the model's question still leans on options"
    if "<image>" in question or question.count("<") > choices.stem.count("<"):
        return "the model's question has marks of its own"
    asked, before = f" {text_key(question)} ", f" {text_key(choices.stem)} "
    given_away = f" {text_key(choices.right)} "
    return "the model's question gives the answer away" if given_away in asked and given_away not in before else ""
