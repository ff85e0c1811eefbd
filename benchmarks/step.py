"""A whole GRPO step, rollouts and rewards included: ours against TRL 1.16's GRPOTrainer, both with HF generate.

    python benchmarks/step.py [--short] [--engine vllm | --curve] [--json PATH]

Three tasks: the quickstart from its SFT start, whose prompts have 31 tokens and whose tower is small; its pictures read
by the model of update.py, random weights with the 2B's shares of tower and head; and long prompts for it. `--curve`
instead trains the quickstart with both, on three seeds, and compares greedy accuracy on 1,000 unseen questions over the
number of rollouts. Our linear layers multiply by oneDNN where MKL is slow (sail_rl/model/cpu_linear.py); a third side
shows ours without. With `--engine vllm` both sides write with vLLM in this process, in bfloat16, which is all that TRL
has, and completions have one length; ours in float32 is measured beside it. TRL 1.16 would not run so here: what is
mended is in vllm_sides.py. SFT starts and finished runs are kept in runs/benchmarks, to go on from if it is stopped.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import SHORT_RESULTS, machine, markdown, prepare_process, results_file, save
from benchmarks.quickstart_runs import sft_start
from benchmarks.turns import take_turns

ROUNDS, SHORT_ROUNDS = 5, 1
FLOAT32, TORCH = "ours, float32", "ours, torch's products"  # sides beside the two
WARM_UP = 2  # rounds of vLLM, which compiles in the first calls of each shape
SEEDS, SHORT_SEEDS = (0, 1, 2), (0,)
EVEN_TOKENS = str(Path(__file__).with_name("even_tokens.py")) + ":even_tokens"
LONG_PROMPT, LONG_COMPLETION, LONG_PROMPTS = 512, 64, 2
PICTURE_COMPLETION, PICTURE_PROMPTS = 48, 4


def main() -> None:
    """Phases of a step, or the learning curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one round; with --curve one seed and few steps")
    parser.add_argument("--curve", action="store_true", help="accuracy over rollouts instead of seconds per step")
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf", help="who writes the completions")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prepare_process()
    result: dict[str, Any] = {"machine": machine()}
    if arguments.curve:
        from benchmarks.learning_curve import curve, curve_table

        result["rows"] = curve(SHORT_SEEDS if arguments.short else SEEDS, arguments.short)
        save(arguments.json or results_file("curve", arguments.short), result, curve_table(result["rows"]))
        return
    tasks = {
        "quickstart": quickstart_task,
        "pictures, shares of the 2B": picture_task,
        "long prompts, shares of the 2B": long_task,
    }
    if arguments.engine == "vllm":
        tasks.pop("quickstart")  # without an end no answer is right, and ours leaves out groups whose rewards are equal
    vllm = arguments.engine == "vllm"
    result["rows"] = [measure(name, make, arguments.short, vllm) for name, make in tasks.items()]
    name = "step_vllm" if vllm else "step"
    save(arguments.json or results_file(name, arguments.short), result, phase_table(result["rows"]))


def with_vllm(task, precision: str):
    """The task with our vLLM in this precision, and completions of one length."""
    recipe = task.recipe
    rollout = recipe.rollout.model_copy(update={"engine": "vllm_colocate"})
    trainer = recipe.trainer.model_copy(update={"mixed_precision": precision})
    return replace(task, recipe=recipe.model_copy(update={"rollout": rollout, "trainer": trainer}))


def measure(name: str, make_task: Callable[[bool], Any], short: bool, vllm: bool) -> dict[str, Any]:
    """Median seconds of each phase, the sides in turn."""
    from benchmarks.full_step import median_phases, total
    from sail_rl.model.cpu_linear import is_faster_here

    rounds, warm_up = SHORT_ROUNDS if short else ROUNDS, WARM_UP if vllm else 1
    print(f"{name}: {rounds} rounds after {warm_up} for warming up", flush=True)
    rollout = make_task(short).recipe.rollout
    sides = ["ours", "trl", *([FLOAT32] if vllm else [TORCH] if is_faster_here() else [])]
    runs = take_turns({side: (step_of, side, make_task, short, vllm) for side in sides}, rounds, warm_up)
    seconds = {side: median_phases(steps) for side, steps in runs.items()}
    row: dict[str, Any] = {"task": name, "rollouts": rollout.prompts_per_step * rollout.num_generations}
    row |= {"seconds": seconds, "ratio": {key: seconds["trl"][key] / own for key, own in seconds["ours"].items()}}
    of_whole = {side: total(seconds["trl"]) / total(own) for side, own in seconds.items()}
    names = {"ours": "ratio_vs_trl", FLOAT32: "ratio_of_float32", TORCH: "ratio_of_torch_products"}
    return row | {names[side]: ratio for side, ratio in of_whole.items() if side in names}


def step_of(side: str, make_task: Callable[[bool], Any], short: bool, vllm: bool) -> Callable[[], dict[str, float]]:
    """A side's step. accelerate has one precision for a process, so each needs its own."""
    from benchmarks.full_step import our_side, trl_side
    from sail_rl.model.cpu_linear import is_faster_here

    if vllm:
        from benchmarks.vllm_sides import prepare_vllm

        prepare_vllm()
    task = make_task(short)
    if vllm:
        task = with_vllm(task, "no" if side == FLOAT32 else "bf16")
    return trl_side(task) if side == "trl" else our_side(task, is_faster_here() and side != TORCH)


def quickstart_task(short: bool):
    """The quickstart, after its SFT."""
    from benchmarks.full_step import Task
    from sail_rl.command_line import load_recipe
    from sail_rl.config import GrpoRecipe
    from sail_rl.model.load import load_model

    overrides = [f"model={sft_start(0, short)}", f"output_dir={SHORT_RESULTS / 'pictures'}"]
    recipe = load_recipe(GrpoRecipe, Path("recipes/quickstart.yaml"), overrides)
    model, processor = load_model(recipe.model, recipe.seed)
    return Task(recipe, model, processor, recipe.rollout.prompts_per_step * recipe.rollout.num_generations)


def picture_task(short: bool):
    """The quickstart's pictures and questions, a tile of 64 tokens each, on the model of update.py."""
    from benchmarks.scaled_model import Cell, make_world

    cards = {"source": "pictures", "families": ["cards"], "levels": [1], "forms": ["sum"]}
    return random_task(make_world(Cell(256, PICTURE_COMPLETION)), "cards", cards, PICTURE_PROMPTS, PICTURE_COMPLETION)


def long_task(short: bool):
    """Prompts of 512 tokens, completions of 64, two groups of eight a step, on the model of update.py."""
    from benchmarks.scaled_model import Cell, make_world

    world = make_world(Cell(LONG_PROMPT, LONG_COMPLETION, groups=8))
    rows = {"source": "file", "path": str(write_rows(world, SHORT_RESULTS / "long"))}
    return random_task(world, "long", rows, LONG_PROMPTS, LONG_COMPLETION)


def random_task(world, folder: str, rows: dict[str, Any], prompts: int, completion: int):
    """Groups of eight on random weights, whose completions are all as long as they may be."""
    from benchmarks.full_step import Task
    from benchmarks.scaled_model import GROUP
    from sail_rl.config import GrpoRecipe

    recipe = GrpoRecipe.model_validate(
        {
            "output_dir": str(SHORT_RESULTS / folder),
            "model": {"random_init": "tiny"},  # not read: the model is made here
            "data": {"train": rows, "thinking": "direct"},
            "rollout": {"prompts_per_step": prompts, "num_generations": GROUP, "max_completion_length": completion},
            "rewards": [{"function": EVEN_TOKENS}],
            "trainer": {"max_steps": 1},
        }
    )
    return Task(recipe, world.model, world.processor, GROUP)


def write_rows(world, folder: Path) -> Path:
    """The prompts as a user's data: pictures and a .jsonl file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (prompt, question) in enumerate(zip(world.prompts, world.questions, strict=True)):
        prompt.images[0].save(folder / f"{number}.png")
        lines.append(json.dumps({"question": question, "images": [f"{number}.png"], "answer": "0"}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def phase_table(rows: list[dict[str, Any]]) -> str:
    """Seconds by phase."""
    flat = [
        {"task": row["task"], "side": side, **phases, "step": sum(phases.values())}
        for row in rows
        for side, phases in row["seconds"].items()
    ]
    ratios = [{"task": row["task"], "side": "TRL / ours", **row["ratio"], "step": row["ratio_vs_trl"]} for row in rows]
    columns = {name: name for name in ("task", "side", "rollout", "reward", "update", "step")}
    return f"Median seconds of one GRPO step.\n\n{markdown([*flat, *ratios], columns)}"


if __name__ == "__main__":
    main()
