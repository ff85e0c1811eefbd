"""The arguments of `sail-rl data …`. Nothing here imports torch."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from sail_rl.command_line import BadInput
from sail_rl.threads import wait_briefly

INTERRUPTED = 130  # as shells say it


def add_data(parser: argparse.ArgumentParser) -> None:
    """All commands with what they take."""
    commands = parser.add_subparsers(dest="data_command", required=True)
    add_cot(commands.add_parser("cot", help="have a model write the reasoning for known answers"))
    add_filter(commands.add_parser("filter", help="repair tags; drop duplicates, malformed and empty reasoning"))
    add_freeform(commands.add_parser("freeform", help="turn multiple choice into free form"))
    add_distill(commands.add_parser("distill-answer", help="have a model shorten wordy answers"))
    add_passrate(commands.add_parser("passrate", help="keep questions that the model solves now and then"))
    add_reject(commands.add_parser("reject", help="keep the model's own right traces"))
    add_rows(commands.add_parser("tsv", help="write rows as a question file of VLMEvalKit's"), "tsv:write_tsv")


def add_rows(parser: argparse.ArgumentParser, function: str) -> None:
    """Which rows are read, and where they go."""
    parser.add_argument("input", metavar="INPUT", help="a .jsonl or .parquet file, a Hub id, or `pictures`")
    parser.add_argument("--columns", nargs="+", default=[], metavar="ours=theirs", help="such as question=problem")
    parser.add_argument("--split", default="train", help="of a Hub dataset or of the picture task (train)")
    add_output(parser)
    parser.set_defaults(run_command=lambda arguments: on_rows(function, arguments))


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where rows go."""
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write; reports lie beside it")
    parser.add_argument("--limit", type=int, help="read only so many rows, from the first on")


def add_endpoint(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The arguments that say who is asked, and how."""
    asked = parser.add_argument_group("the model that is asked")
    asked.add_argument("--base-url", required=required, help="such as http://localhost:8000/v1 of a `vllm serve`")
    asked.add_argument("--model", required=required, help="under which name the endpoint serves it")
    asked.add_argument("--api-key-env", help="the environment variable that holds the key")
    asked.add_argument("--concurrency", type=int, default=32, help="most requests on their way at once (32)")
    asked.add_argument("--call-seconds", type=float, default=300.0, help="for one try of one request (300)")
    asked.add_argument("--tries", type=int, default=5, help="where connection, endpoint or its limits fail (5)")
    asked.add_argument("--max-tokens", type=int, default=4096, help="of a reply (4096)")


def add_cot(parser: argparse.ArgumentParser) -> None:
    """`sail-rl data cot`."""
    add_rows(parser, "cot:write_traces")
    add_endpoint(parser)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--attempts", type=int, default=2, help="until a trace is right (2)")
    parser.add_argument("--seed", type=int, default=0, help="sent to the endpoint")


def add_filter(parser: argparse.ArgumentParser) -> None:
    """`sail-rl data filter`."""
    add_rows(parser, "filter:clean_rows")
    parser.add_argument(
        "--overlap", type=float, default=0.8, help="drop where this share of reasoning or answer is the other's (0.8)"
    )
    parser.add_argument("--shortest", type=int, default=1, help="reasoning, in words (1)")
    parser.add_argument("--longest", type=int, help="reasoning, in words; no bound if left out")
    parser.add_argument("--most-per-bucket", type=int, help="rows of each length (1, 2 to 3, 4 to 7, … words), by lot")
    parser.add_argument("--near", type=int, help="also drop pictures that differ in so many of 64 bits, such as 3")
    parser.add_argument("--needs-reasoning", action="store_true", help="drop rows without reasoning")
    parser.add_argument("--seed", type=int, default=0)


def add_freeform(parser: argparse.ArgumentParser) -> None:
    """`sail-rl data freeform`."""
    add_rows(parser, "freeform:make_free")
    add_endpoint(parser, required=False)
    parser.add_argument("--others", choices=("keep", "drop"), default="keep", help="rows that are not multiple choice")


def add_distill(parser: argparse.ArgumentParser) -> None:
    """`sail-rl data distill-answer`."""
    add_rows(parser, "distill_answer:shorten")
    add_endpoint(parser)
    parser.add_argument("--most-words", type=int, default=5, help="of an answer that is short already (5)")


def add_recipe(parser: argparse.ArgumentParser, function: str) -> None:
    """Whose model answers which rows, how often."""
    parser.add_argument("recipe", help="a recipe of train_grpo.py: its model, data.train and rollout are used")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="recipe keys to change")
    add_output(parser)
    parser.add_argument("--samples", type=int, default=4, help="attempts at each question (4)")
    parser.set_defaults(run_command=lambda arguments: on_recipe(f"sail_rl.data.building.{function}", arguments))


def add_passrate(parser: argparse.ArgumentParser) -> None:
    """`sail-rl data passrate`."""
    add_recipe(parser, "passrate:measure")
    parser.add_argument(
        "--unsolved",
        choices=("by_row", "drop", "keep"),
        default="by_row",
        help="questions that no attempt solves; by_row drops them unless needs_thinking is false or kind is direct",
    )


def add_reject(parser: argparse.ArgumentParser) -> None:
    """`sail-rl data reject`."""
    add_recipe(parser, "reject:collect")
    parser.add_argument("--keep", type=int, default=1, help="most traces of a question (1)")


def on_rows(function: str, arguments: argparse.Namespace) -> None:
    """Open the input and run the command on it."""
    from sail_rl.data.building.rows import open_input

    pairs = [pair.partition("=") for pair in arguments.columns]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise BadInput(f"--columns {' '.join(arguments.columns)}: write each as ours=theirs, such as question=problem")
    columns = {ours: theirs for ours, _, theirs in pairs}
    rows = open_input(arguments.input, columns, arguments.split)
    run(f"sail_rl.data.building.{function}", rows, checked(arguments))


def on_recipe(function: str, arguments: argparse.Namespace) -> None:
    """Run a command that starts a model."""
    wait_briefly()
    run(function, checked(arguments))


def run(function: str, *arguments: Any) -> None:
    """Run a command, imported only now, whose work an interruption does not undo."""
    module, name = function.split(":")
    try:
        getattr(importlib.import_module(module), name)(*arguments)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with what is left", flush=True)
        sys.exit(INTERRUPTED)


def checked(arguments: argparse.Namespace) -> argparse.Namespace:
    """The numbers that every command has."""
    for name in ("limit", "attempts", "most_per_bucket"):
        if getattr(arguments, name, None) is not None and getattr(arguments, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(arguments, name)}: give 1 or more")
    return arguments
