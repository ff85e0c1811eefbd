"""One command at work: rows in chunks, a record for each, and in the end the output with its report."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sail_rl.command_line import BadInput
from sail_rl.data.building.journal import Journal, Record, Row, refuse_changes
from sail_rl.data.building.report import Report, show_report, write_report
from sail_rl.data.building.rows import identity, read_row, row_id, with_files
from sail_rl.data.images import BadRow
from sail_rl.data.mixture import JoinedRows
from sail_rl.data.sources import ENDLESS
from sail_rl.run_folder import write_json_lines

LINE_EVERY = 30.0  # seconds between lines of progress where there is no terminal
Records = Callable[[], Iterator[Record]]  # all of them, in the order of the rows, as often as it is called


@dataclass(frozen=True)
class Taken:
    """A row at hand: under our column names, its pictures as files."""

    number: int
    id: str
    row: Row

    def kept(self, reason: str, *rows: Row, **more: Any) -> Record:
        """The record of a row that stays, as the rows given."""
        return Record(self.number, self.id, list(rows), reason, **more)

    def dropped(self, reason: str, detail: str = "", **more: Any) -> Record:
        """The record of a row that does not."""
        return Record(self.number, self.id, [], reason, detail, **more)


Work = Callable[[Sequence[Taken]], list[Record]]


@dataclass(frozen=True)
class Job:
    """What is to be done to which rows."""

    command: str
    rows: JoinedRows
    output: Path
    settings: dict[str, Any]
    """All that the result depends on, beside the rows."""
    limit: int | None = None
    """Only so many rows, from the first on."""

    @property
    def count(self) -> int:
        """How many rows are looked at."""
        count = min(len(self.rows), self.limit or ENDLESS)
        if count >= ENDLESS:
            raise BadInput(f"{self.rows.name} has no end; say how many rows with --limit")
        return count

    @property
    def all_settings(self) -> dict[str, Any]:
        """The same with command and rows."""
        return {"command": self.command, "input": identity(self.rows), "rows": self.count} | self.settings


def open_journal(job: Job) -> Journal | None:
    """The work begun before, or a new one; None, with the report shown, where all was done before."""
    output = job.output
    if output.suffix != ".jsonl":
        raise BadInput(f"--output {output}: it must end in .jsonl")
    if any(output.resolve() == Path(part.rows.name).resolve() for part in job.rows.parts):
        raise BadInput(f"--output {output}: it is the input; name another file")
    report = Report.read_from(output)
    if report is not None:
        refuse_changes(output, report.settings, job.all_settings)
        progress_file(output).unlink(missing_ok=True)  # ended when all was written
        print(f"{output} is finished; its report:")
        show_report(report)
        return None
    if output.exists() and not progress_file(output).exists():
        raise BadInput(f"--output {output}: there is a file of that name, without a report; name another")
    output.parent.mkdir(parents=True, exist_ok=True)
    return Journal(progress_file(output), job.all_settings)


def progress_file(output: Path) -> Path:
    """Where the work so far is."""
    return output.with_name(output.name + ".progress")


def do_job(
    job: Job,
    journal: Journal,
    work: Work,
    at_once: int,
    finish: Callable[[Records], Iterator[Record]] = lambda records: records(),
) -> None:
    """Do what is not done yet, then write output and report. Rows that `work` returns no record of stay to be done."""
    done_before = len(journal)
    if done_before:
        print(f"going on: {done_before} of {job.count} rows are done", flush=True)
    todo = (number for number in range(job.count) if number not in journal)
    with ProgressBar(job) as advance:
        advance(done_before)
        while chunk := list(islice(todo, at_once)):
            taken, records = take(job, chunk)
            records += work(taken) if taken else []
            journal.add(sorted(records, key=lambda record: record.row))
            advance(len(records))
    missing = job.count - len(journal)
    if missing:
        raise BadInput(f"{missing} of {job.count} rows could not be done; the same command tries them again")
    report = write_output(job, finish(journal.records))
    progress_file(job.output).unlink()
    journal.close()
    if not report.written:
        raise BadInput(f"{job.output} has no rows: all {job.count} were dropped; the report says why")


def take(job: Job, numbers: Sequence[int]) -> tuple[list[Taken], list[Record]]:
    """Rows at hand, and the records of those that cannot be used."""
    taken, records = [], []
    for number in numbers:
        try:
            row, folder = read_row(job.rows, number)
            taken.append(Taken(number, str(row.get("id", "-")), with_files(row, folder, job.output)))
        except BadRow as error:
            records.append(Record(number, row_id(job.rows, number), [], "malformed row", str(error)))
    return taken, records


def write_output(job: Job, records: Iterator[Record]) -> Report:
    """Output, list of dropped rows and report, each whole; the report comes last and says that all is there."""
    report = Report(job.all_settings)

    def kept() -> Iterator[Row]:
        for record in records:
            report.count(record)
            if not record.kept:
                dropped.append({name: getattr(record, name) for name in ("row", "id", "reason", "detail", "figures")})
            yield from record.kept

    dropped: list[dict[str, Any]] = []
    used: set[str] = set()
    write_json_lines(job.output, noting_files(kept(), used))
    for line in dropped:
        line["row"] += 1  # people count from 1
    write_json_lines(job.output.with_suffix(".dropped.jsonl"), dropped)
    remove_unused_files(job.output, used)
    write_report(report, job.output)
    show_report(report)
    print(f"{job.output}: {report.written} rows", flush=True)
    return report


def noting_files(rows: Iterator[Row], used: set[str]) -> Iterator[Row]:
    """The same rows, their pictures and videos noted."""
    for row in rows:
        used.update(row.get("images") or [], row.get("videos") or [])
        yield row


def remove_unused_files(output: Path, used: set[str]) -> None:
    """Pictures that were written for rows which were dropped."""
    folder = output.parent / f"{output.stem}_files"
    for file in folder.iterdir() if folder.is_dir() else []:
        if f"{folder.name}/{file.name}" not in used:
            file.unlink()
    with suppress(OSError):
        folder.rmdir()  # if it is empty


class ProgressBar:
    """A bar on a terminal, a line now and then elsewhere. Entered, it is a function that is told of rows done."""

    def __init__(self, job: Job) -> None:
        self.job, self.done, self.told = job, 0, time.monotonic()
        console = Console(stderr=True)
        columns = (TextColumn(job.command), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(job.command, total=job.count)

    def __enter__(self) -> Callable[[int], None]:
        self.bar.start()
        return self.advance

    def advance(self, rows: int) -> None:
        """So many rows more are done."""
        self.done += rows
        self.bar.advance(self.task, rows)
        if self.bar.disable and time.monotonic() - self.told > LINE_EVERY:
            self.told = time.monotonic()
            print(f"{self.job.command}: {self.done} of {self.job.count} rows", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
