"""`sail-rl data tsv`: rows as a question file of VLMEvalKit's, pictures in it."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from sail_rl.command_line import BadInput
from sail_rl.data.building.job import Job, ProgressBar
from sail_rl.data.building.rows import Row, read_row
from sail_rl.data.images import BadRow
from sail_rl.data.mixture import JoinedRows
from sail_rl.data.vlmevalkit import write_questions


def write_tsv(rows: JoinedRows, arguments: argparse.Namespace) -> None:
    """The whole command; a row that cannot be written ends it, since a benchmark with holes is another one."""
    output: Path = arguments.output
    if output.suffix != ".tsv":
        raise BadInput(f"--output {output}: it must end in .tsv")
    job = Job("tsv", rows, output, {}, arguments.limit)
    number = [0]
    with ProgressBar(job) as advance:
        try:
            write_questions(counted(job, number, advance), output)
        except BadRow as error:
            raise BadInput(f"{rows.row_name(number[0])}: {error}") from None
    print(f"{output}: {job.count} rows", flush=True)


def counted(job: Job, number: list[int], advance: Callable[[int], None]) -> Iterator[tuple[Row, Path]]:
    """Each row with the folder of its pictures; `number` is that of the row at hand."""
    for number[0] in range(job.count):
        yield read_row(job.rows, number[0])
        advance(1)
