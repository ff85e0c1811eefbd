"""The `sail-rl` command: what is done to runs and checkpoints beside training."""

import argparse
from pathlib import Path

from sail_rl.command_line import BadInput, fail


def main() -> None:
    """Parse and run one subcommand."""
    arguments = make_parser().parse_args()
    try:
        arguments.run_command(arguments)
    except BadInput as mistake:
        fail(mistake)


def make_parser() -> argparse.ArgumentParser:
    """Every subcommand with what it takes."""
    parser = argparse.ArgumentParser(prog="sail-rl", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="write report.html of a run folder again")
    report.add_argument("run", type=Path, help="a run folder, such as runs/quickstart")
    report.set_defaults(run_command=lambda arguments: make_report(arguments.run))
    convert = commands.add_parser("convert", help="turn a released SAIL-VL2 checkpoint into ours, or back")
    convert.add_argument("source", type=Path, help="a checkpoint folder; its config.json tells the layout")
    convert.add_argument("target", type=Path, help="the folder to write, new or empty")
    convert.add_argument("--to", choices=("released", "native"), help="the layout to write; the other one if left out")
    convert.add_argument("--dry-run", action="store_true", help="check and tell, but write nothing")
    convert.set_defaults(run_command=convert_checkpoint)
    merge = commands.add_parser("merge", help="average sister checkpoints, or put adapters into their model's weights")
    merge.add_argument("target", type=Path, help="the folder to write, new or empty")
    merge.add_argument("sources", type=Path, nargs="+", help="checkpoint folders; config and processor of the first")
    merge.add_argument("--weights", type=float, nargs="+", help="one for each checkpoint; equal if left out")
    merge.add_argument("--force", action="store_true", help="also checkpoints that share no ancestor")
    merge.add_argument("--adapter", type=Path, help="a folder of LoRA adapters for the one checkpoint named")
    merge.set_defaults(run_command=merge_checkpoints)
    return parser


def make_report(run: Path) -> None:
    """Write and name the report; a folder that is no run is the user's mistake."""
    from sail_rl.report import write_report

    if not (run / "config.yaml").is_file():
        raise BadInput(f"{run} is not a run folder: it has no config.yaml")
    print(write_report(run))


def convert_checkpoint(arguments: argparse.Namespace) -> None:
    """Convert, and say what was or would be written."""
    print(f"checking {arguments.source}", flush=True)
    from sail_rl.convert import convert, result_line

    plan = convert(arguments.source, arguments.target.resolve(), arguments.to, arguments.dry_run)
    print(("would write " if arguments.dry_run else "wrote ") + result_line(plan, arguments.target))


def merge_checkpoints(arguments: argparse.Namespace) -> None:
    """Merge, and say what was written."""
    print(f"reading {', '.join(map(str, arguments.sources))}", flush=True)
    from sail_rl.merge import merge, merge_adapter, result_line

    target, sources = arguments.target.resolve(), arguments.sources
    if arguments.adapter is None:
        print("wrote " + result_line(merge(target, sources, arguments.weights, arguments.force)))
        return
    if len(sources) > 1 or arguments.weights:
        raise BadInput("--adapter: name the one checkpoint that the adapters belong to, and no --weights")
    merge_adapter(target, sources[0], arguments.adapter)
    print(f"wrote {target}: {sources[0]} with the adapters of {arguments.adapter}")


if __name__ == "__main__":
    main()
