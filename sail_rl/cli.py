"""The `sail-rl` command: what is done to a run beside training it."""

import argparse
from pathlib import Path

from sail_rl.command_line import BadInput, fail


def main() -> None:
    """Parse and run one subcommand."""
    parser = argparse.ArgumentParser(prog="sail-rl", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="write report.html of a run folder again")
    report.add_argument("run", type=Path, help="a run folder, such as runs/quickstart")
    arguments = parser.parse_args()
    try:
        make_report(arguments.run)
    except BadInput as mistake:
        fail(mistake)


def make_report(run: Path) -> None:
    """Write and name the report; a folder that is no run is the user's mistake."""
    from sail_rl.report import write_report

    if not (run / "config.yaml").is_file():
        raise BadInput(f"{run} is not a run folder: it has no config.yaml")
    print(write_report(run))


if __name__ == "__main__":
    main()
