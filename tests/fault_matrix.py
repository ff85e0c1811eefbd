"""The fault matrix: what each test marked `fault` injects, what it expects and what was seen, as one table.

    @pytest.mark.fault(fault="reward: hangs", injected="a reward that sleeps", expected="its row has no reward")

`fault` starts with the part that is hurt, by which the table is sorted. Tests of the same text are one line of it.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

HEAD = ("fault", "injected how", "expected", "seen")
KEYS = ("fault", "injected", "expected")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", metavar="FILE", type=Path, help="print the fault matrix and write it to this file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A marker travels with its test's report, as reports are all that a worker of xdist sends back."""
    for item in items:
        for marker in item.iter_markers("fault"):
            if marker.args or set(marker.kwargs) != set(KEYS):
                raise pytest.UsageError(f"{item.nodeid}: fault() takes fault, injected and expected, all by name")
            item.user_properties.append(("fault", [marker.kwargs[key] for key in KEYS]))


def outcomes(stats: dict[str, list]) -> Iterator[tuple[tuple[str, ...], str]]:
    """A row of the matrix and what was seen, for each test of it."""
    for kind in ("passed", "failed", "error", "skipped"):
        for report in stats.get(kind, []):
            for name, row in getattr(report, "user_properties", []):
                if name == "fault":
                    yield tuple(row), seen(kind, report.longrepr)


def seen(kind: str, longrepr: object) -> str:
    if kind == "passed":
        return "passed"
    if isinstance(longrepr, tuple):  # a skipped test's file, line and reason
        return f"skipped: {longrepr[2].removeprefix('Skipped: ')}"
    message = longrepr.reprcrash.message if hasattr(longrepr, "reprcrash") else str(longrepr)
    return f"failed: {message.splitlines()[0]}"


def matrix(stats: dict[str, list]) -> str:
    """The Markdown table; failures come before passes, as their words are sorted."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for row, outcome in outcomes(stats):
        rows.setdefault(row, []).append(outcome)
    lines = [HEAD, ("---",) * len(HEAD)]
    for row, found in sorted(rows.items()):
        counted = [f"{text} ({found.count(text)} of {len(found)})" for text in sorted(set(found))]
        lines.append((*row, "; ".join(counted) if len(found) > 1 else found[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    file = config.getoption("--faults")
    if file is None:
        return
    table = matrix(terminalreporter.stats)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"# Fault matrix\n\n{table}\n")
    terminalreporter.write_sep("=", f"fault matrix, also in {file}")
    terminalreporter.write_line(table)
