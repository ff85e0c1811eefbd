"""What became of the rows: `<output>.report.json` and `.report.md` beside the output, and a table on the terminal."""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sail_rl.data.building.journal import Record
from sail_rl.run_folder import write_json

Counts = dict[str, int]


@dataclass
class Report:
    """Counts of rows, by what became of them and by the classes that they fall into."""

    settings: dict[str, Any]
    read: int = 0
    written: int = 0
    kept: Counts = field(default_factory=Counter)
    """Rows of the input that stay, by what was done to them."""
    dropped: Counts = field(default_factory=Counter)
    """Rows of the input that do not, by the reason."""
    figures: dict[str, Counts] = field(default_factory=lambda: defaultdict(Counter))
    """Of all rows looked at: what was looked at -> class -> rows."""

    def count(self, record: Record) -> None:
        """Take one record in."""
        self.read += 1
        self.written += len(record.kept)
        (self.kept if record.kept else self.dropped)[record.reason] += 1
        for name, value in record.figures.items():
            self.figures[name][value] += 1

    @staticmethod
    def read_from(output: Path) -> "Report | None":
        """The report of a finished output; None where there is none."""
        file = output.with_suffix(".report.json")
        return Report(**json.loads(file.read_text())) if file.is_file() else None

    def as_values(self) -> dict[str, Any]:
        """Plain values, in an order that does not depend on that of the rows."""
        return {
            "settings": self.settings,
            "read": self.read,
            "written": self.written,
            "kept": by_size(self.kept),
            "dropped": by_size(self.dropped),
            "figures": {name: in_order(counts) for name, counts in sorted(self.figures.items())},
        }


def by_size(counts: Counts) -> Counts:
    """The largest first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def in_order(counts: Counts) -> Counts:
    """Classes by the number that they begin with."""
    return dict(sorted(counts.items(), key=lambda item: (first_number(item[0]), item[0])))


def first_number(name: str) -> int:
    """0 for a class that begins with none."""
    digits = name.split(" ", 1)[0]
    return int(digits) if digits.isdigit() else 0


def write_report(report: Report, output: Path) -> None:
    """Both files; the JSON one, which says that the output is finished, last."""
    values = report.as_values()
    output.with_suffix(".report.md").write_text(markdown(values, output))
    write_json(output.with_suffix(".report.json"), values)


def tables(values: dict[str, Any]) -> dict[str, list[tuple[str, str, int]]]:
    """(title, rows of three) of all tables of a report."""
    outcomes = [("kept", reason, n) for reason, n in values["kept"].items()]
    outcomes += [("dropped", reason, n) for reason, n in values["dropped"].items()]
    figures = [(name, value, n) for name, counts in values["figures"].items() for value, n in counts.items()]
    return {"what became of the rows": outcomes} | ({"what they are like": figures} if figures else {})


def markdown(values: dict[str, Any], output: Path) -> str:
    """The report for people."""
    lines = [f"# {output.name}", "", f"{values['read']} rows read, {values['written']} written.", ""]
    for title, rows in tables(values).items():
        lines += [f"## {title[0].upper()}{title[1:]}", "", "| | | rows |", "|---|---|---:|"]
        lines += [f"| {first} | {second} | {number} |" for first, second, number in rows] + [""]
    lines += ["## Settings", "", "```json", json.dumps(values["settings"], indent=2, default=str), "```", ""]
    return "\n".join(lines)


def show_report(report: Report) -> None:
    """The same on the terminal."""
    values = report.as_values()
    for title, rows in tables(values).items():
        table = Table("", "", "rows", title=title, title_justify="left")
        for first, second, number in rows:
            table.add_row(first, second, str(number))
        Console(markup=False, highlight=False).print(table)
    print(f"{values['read']} rows read, {values['written']} written")
