"""`sail-rl data cot`: a model that is told the right answer writes the reasoning that leads to it.

A trace is kept only where its form is right, its own final answer is the row's by the rewards' comparison, and it does
not speak of the answer that it was told.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rewards.accuracy import accuracy_verdicts
from rewards.answers import split_completion
from rewards.format import is_well_formed
from sail_rl.data.building.asking import Asker, endpoint_settings, messages_about, reason_of
from sail_rl.data.building.job import Job, Record, Taken, do_job, open_journal
from sail_rl.data.building.rows import traced_row
from sail_rl.data.images import BadRow
from sail_rl.data.mixture import JoinedRows

INSTRUCTION = """The right answer to the question above is: {answer}
{options}
Write the reasoning by which someone finds this answer who sees the picture and the question and does not know it yet. \
Begin with what the picture shows, take one step after the other, and check the result. Never say or hint that the \
answer was known beforehand. If the picture does not lead to this answer, end with the one that you find.
Write the reasoning within <think> </think> tags, and after them nothing but the final answer in \\boxed{{}}."""
TOLD = re.compile(
    r"\b(?:given|provided|known|reference|ground[- ]truth) (?:final )?answer\b(?! choice| option)"
    r"|\banswer (?:that )?(?:is|was|has been|(?:we|I) (?:are|am|were|was)) (?:given|provided|told)\b(?! by| in)"
    r"|\b(?:we|I) (?:are|am|were|was) (?:told|given) (?:that )?the (?:final )?answer\b|\bground truth\b",
    re.IGNORECASE,
)
LEFT_AS_IT_IS = "has reasoning already"


def write_traces(rows: JoinedRows, arguments: argparse.Namespace) -> None:
    """The whole command."""
    settings = endpoint_settings(arguments)
    named = ("split", "model", "max_tokens", "temperature", "attempts", "seed")
    job = Job("cot", rows, arguments.output, {n: getattr(arguments, n) for n in named}, arguments.limit)
    journal = open_journal(job)
    if journal is None:
        return
    asker = Asker(settings, begun=len(journal) > 0)
    do_job(job, journal, partial(work, job, asker, arguments), asker.at_once)


def work(job: Job, asker: Asker, arguments: argparse.Namespace, taken: Sequence[Taken]) -> list[Record]:
    """Records of a chunk: rows are asked about again while an attempt is not right."""
    records, open_ones = [], []
    for one in taken:
        if str(one.row.get("reasoning") or "").strip():
            records.append(one.kept(LEFT_AS_IT_IS, {"kind": "cot"} | one.row))
        elif one.row.get("answer") is None and one.row.get("solution") is None:
            records.append(one.dropped("malformed row", "no `answer` (or `solution`)"))
        else:
            open_ones.append(one)
    for attempt in range(1, arguments.attempts + 1):
        final = attempt == arguments.attempts
        found = attempt_once(job, asker, arguments, open_ones, attempt)
        records += [record for record in found if record.kept or final]
        settled = {record.row for record in found if record.kept or final}
        unanswered = {one.number for one in open_ones} - {record.row for record in found}
        open_ones = [one for one in open_ones if one.number not in settled | unanswered]
    return records


def attempt_once(
    job: Job, asker: Asker, arguments: argparse.Namespace, taken: Sequence[Taken], attempt: int
) -> list[Record]:
    """A record for each row that there is an answer about."""
    requests, records = {}, []
    for one in taken:
        try:
            turns = messages_about(one.row, job.output.parent, instruction(one.row))
        except BadRow as error:
            records.append(one.dropped("cannot be asked about", str(error)))
            continue
        seed = arguments.seed + attempt
        requests[one.number] = asker.request(turns, temperature=arguments.temperature, seed=seed)
    answers = asker.ask(requests)
    texts = {number: answer.value.strip() for number, answer in answers.items() if answer.failure is None}
    asked = [one for one in taken if one.number in answers]
    problems = problems_of([one for one in asked if one.number in texts], texts)
    for one in asked:
        failure = answers[one.number].failure
        if failure:
            records.append(one.dropped(reason_of(failure), failure))
        elif problems[one.number]:
            records.append(one.dropped(problems[one.number], texts[one.number][-200:]))
        else:
            reasoning = (split_completion(texts[one.number]).think or "").strip()
            figures = {"attempt that was right": str(attempt)}
            records.append(one.kept("reasoning written", traced_row(one.row, reasoning), figures=figures))
    return records


def instruction(row: Mapping[str, Any]) -> str:
    """What the model is asked to do, with the answer that is right."""
    answer = row.get("answer") if row.get("answer") is not None else row.get("solution")
    options = row.get("options")
    listed = options.items() if isinstance(options, Mapping) else zip("ABCDEFGHIJKLMNOP", options or [], strict=False)
    lines = [f"{letter}. {text}" for letter, text in listed if text is not None]
    return INSTRUCTION.format(answer=answer, options="\n".join(["The options:", *lines, ""]) if lines else "")


def problems_of(taken: Sequence[Taken], texts: Mapping[int, str]) -> dict[int, str]:
    """What is wrong with each trace; empty where nothing is."""
    if not taken:
        return {}
    completions = [texts[one.number] for one in taken]
    verdicts = accuracy_verdicts(completions, **columns_of(taken))
    problems = {}
    for one, text, verdict in zip(taken, completions, verdicts, strict=True):
        if not is_well_formed(text):
            problems[one.number] = "the form is wrong"
        elif verdict.value is None:
            problems[one.number] = f"the answer cannot be compared with ({verdict.outcome})"
        elif verdict.value < 1:
            problems[one.number] = "its own answer is another one"
        else:
            told = TOLD.search(split_completion(text).think or "")
            problems[one.number] = "it speaks of the answer that it was told" if told else ""
    return problems


def columns_of(taken: Sequence[Taken]) -> dict[str, Any]:
    """What the accuracy reward reads of the rows."""
    names = ("answer", "solution", "answer_type", "options", "tolerance")
    return {name: [one.row.get(name) for one in taken] for name in names}
