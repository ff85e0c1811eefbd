"""The `sail-rl` command: what is done to runs and checkpoints beside training."""

import argparse
import sys
from pathlib import Path

from sail_rl.command_line import EXIT_BAD_INPUT, BadInput, fail
from sail_rl.data.building.commands import add_data, on_recipe


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
    doctor = commands.add_parser("doctor", help="check whether a recipe can be trained here, and write nothing")
    doctor.add_argument("recipe", help="a YAML file, such as recipes/rlvr.yaml")
    doctor.add_argument("overrides", nargs="*", metavar="key.sub=value", help="recipe keys to change")
    doctor.set_defaults(run_command=examine_recipe)
    add_plan(commands.add_parser("plan", help="what a recipe needs of memory and time on GPUs, and what to change"))
    add_eval(commands.add_parser("eval", help="let a recipe's model answer its data.eval, and say how well it does"))
    compare = commands.add_parser("eval-compare", help="two evaluations of the same questions, with a paired test")
    compare.add_argument("first", type=Path, help="the folder of a `sail-rl eval`")
    compare.add_argument("second", type=Path, help="another one")
    compare.add_argument("--output", type=Path, help="a folder for the table and for both answers to each question")
    compare.set_defaults(run_command=compare_evaluations)
    add_exchange(commands)
    pipeline = commands.add_parser("pipeline", help="all stages from a basic model to its Thinking variant")
    pipeline.add_argument("recipe", help="a YAML file of stages, such as recipes/pipeline_tiny.yaml")
    pipeline.add_argument("overrides", nargs="*", metavar="key.sub=value", help="its keys to change, such as seed=1")
    pipeline.add_argument("--dry-run", action="store_true", help="check all recipes, print the commands and stop")
    pipeline.set_defaults(run_command=run_stages)
    add_rewards(commands.add_parser("rewards", help="try a reward function, or look at what a run's rewards judged"))
    add_data(commands.add_parser("data", help="make rows for training from other rows"))
    serve = commands.add_parser("serve-rollouts", help="a vLLM server for trainers with rollout.engine = vllm_server")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0 lets other machines in")
    serve.set_defaults(run_command=serve_rollouts)
    merge = commands.add_parser("merge", help="average sister checkpoints, or put adapters into their model's weights")
    merge.add_argument("target", type=Path, help="the folder to write, new or empty")
    merge.add_argument("sources", type=Path, nargs="+", help="checkpoint folders; config and processor of the first")
    merge.add_argument("--weights", type=float, nargs="+", help="one for each checkpoint; equal if left out")
    merge.add_argument("--force", action="store_true", help="also checkpoints that share no ancestor")
    merge.add_argument("--adapter", type=Path, help="a folder of LoRA adapters for the one checkpoint named")
    merge.add_argument("--recipe", type=Path, help="evaluate all of them, and the result, on the recipe's data.eval")
    merge.set_defaults(run_command=merge_checkpoints)
    return parser


def add_plan(parser: argparse.ArgumentParser) -> None:
    """`sail-rl plan`."""
    parser.add_argument("recipe", help="a recipe of either trainer")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="recipe keys to change")
    parser.add_argument("--gpus", required=True, help="such as 8xH100")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt, its pictures included, in the mean")
    parser.add_argument("--tiles", type=int, help="tiles of a prompt's pictures, thumbnails included")
    parser.add_argument("--completion", type=int, help="tokens of an answer, in the mean")
    parser.add_argument("--memory-gib", type=float, help="of a GPU that is not in the table, or in the place of it")
    parser.add_argument("--tflops", type=float, help="the same: dense, in bfloat16")
    parser.set_defaults(run_command=plan_run)


def add_eval(parser: argparse.ArgumentParser) -> None:
    """`sail-rl eval`."""
    parser.add_argument("recipe", help="a recipe of either trainer: its model, data.eval and rollout are used")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="recipe keys to change")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write; the same one goes on")
    parser.add_argument(
        "--samples", type=int, default=1, help="completions of each question; 1, the default, is greedy"
    )
    parser.add_argument("--limit", type=int, help="ask only so many questions, from the first on")
    parser.set_defaults(run_command=lambda arguments: on_recipe("sail_rl.eval_command:evaluate_recipe", arguments))


def add_exchange(commands) -> None:
    """`sail-rl eval-export` and `sail-rl eval-import`."""
    export = commands.add_parser("eval-export", help="write an evaluation as a prediction file of VLMEvalKit's")
    export.add_argument("folder", type=Path, help="the folder of a greedy `sail-rl eval`")
    export.add_argument("file", type=Path, help="the .tsv or .json file to write")
    export.set_defaults(run_command=lambda arguments: exchange("export_predictions", arguments))
    taken = commands.add_parser(
        "eval-import", help="judge a prediction file of VLMEvalKit's, to compare it with others"
    )
    taken.add_argument("file", type=Path, help="a .tsv or .json file with index, question, answer and prediction")
    taken.add_argument("folder", type=Path, help="the folder to write, as `sail-rl eval` does")
    taken.set_defaults(run_command=lambda arguments: exchange("import_predictions", arguments))


def exchange(function: str, arguments: argparse.Namespace) -> None:
    """Read one, write the other."""
    from sail_rl import eval_exchange

    getattr(eval_exchange, function)(arguments.folder, arguments.file)


def compare_evaluations(arguments: argparse.Namespace) -> None:
    """Print the table, and write it where a folder is named."""
    from sail_rl.eval_compare import compare_folders

    compare_folders(arguments.first, arguments.second, arguments.output)


def add_rewards(parser: argparse.ArgumentParser) -> None:
    """`sail-rl rewards test` and `sail-rl rewards audit`."""
    commands = parser.add_subparsers(dest="rewards_command", required=True)
    test = commands.add_parser("test", help="call a reward on sample completions and name what is wrong with it")
    test.add_argument("function", help="my_file.py:my_reward, or the name of a built-in")
    test.add_argument(
        "--data",
        type=Path,
        required=True,
        help="rows as data.train has them, .jsonl or .parquet; "
        "with a column `completion` or `completions` these are judged instead of invented ones",
    )
    test.add_argument("--timeout", type=float, help="as in the recipe: seconds of CPU time for one call")
    test.add_argument("--in-process", action="store_true", help="as in the recipe: call it in this process")
    test.set_defaults(run_command=test_reward)
    audit = commands.add_parser("audit", help="list the slowest, the refused, and where math-verify disagrees")
    audit.add_argument("run", type=Path, help="a run folder, such as runs/quickstart")
    audit.set_defaults(run_command=lambda arguments: audit_rewards(arguments.run))


def test_reward(arguments: argparse.Namespace) -> None:
    """Exit with 1 where something is wrong with the reward."""
    from sail_rl.reward_trial import try_reward

    if not try_reward(arguments.function, arguments.data, arguments.timeout, arguments.in_process):
        sys.exit(1)


def audit_rewards(run: Path) -> None:
    """Print what is worth a look."""
    from sail_rl.audit import audit

    audit(run)


def examine_recipe(arguments: argparse.Namespace) -> None:
    """Leave with the code of bad input if there is a problem."""
    from sail_rl.doctor import examine

    if not examine(arguments.recipe, arguments.overrides):
        sys.exit(EXIT_BAD_INPUT)


def plan_run(arguments: argparse.Namespace) -> None:
    """Exit with 1 where it does not fit."""
    from sail_rl.planning.command import plan

    told = {name: getattr(arguments, name) for name in ("prompt", "tiles", "completion", "memory_gib", "tflops")}
    if not plan(arguments.recipe, arguments.overrides, arguments.gpus, **told):
        sys.exit(1)


def run_stages(arguments: argparse.Namespace) -> None:
    """What is finished is skipped."""
    from sail_rl.pipeline import run_pipeline

    run_pipeline(arguments.recipe, arguments.overrides, arguments.dry_run)


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


def serve_rollouts(arguments: argparse.Namespace) -> None:
    """Serve until interrupted. The model comes from the trainer, so nothing is named here but where to listen."""
    print("loading", flush=True)
    from rollouts.vllm_serving import serve_for_anyone
    from sail_rl.engines import check_vllm

    check_vllm("sail-rl serve-rollouts")
    try:
        serve_for_anyone(arguments.host, arguments.port)
    except OSError as error:
        raise BadInput(f"--host {arguments.host} --port {arguments.port}: {error.strerror}") from error
    except KeyboardInterrupt:
        print("\nended", flush=True)


def merge_checkpoints(arguments: argparse.Namespace) -> None:
    """Merge, and say what was written; with a recipe also how good it is, and how good what it was made of."""
    print(f"reading {', '.join(map(str, arguments.sources))}", flush=True)
    from sail_rl.merge import evaluated, merge, merge_adapter, result_line

    target, sources = arguments.target.resolve(), arguments.sources
    if arguments.adapter and (len(sources) > 1 or arguments.weights):
        raise BadInput("--adapter: name the one checkpoint that the adapters belong to, and no --weights")
    with evaluated(arguments.recipe, target, sources, arguments.weights):
        if arguments.adapter is None:
            print("wrote " + result_line(merge(target, sources, arguments.weights, arguments.force)))
        else:
            merge_adapter(target, sources[0], arguments.adapter)
            print(f"wrote {target}: {sources[0]} with the adapters of {arguments.adapter}")


if __name__ == "__main__":
    main()
