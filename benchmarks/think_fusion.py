"""Basic, LongCoT and Think-Fusion SFT in small: what each stage does to both answer modes and both kinds of questions.

    python benchmarks/think_fusion.py [--short] [--seeds 0 1 2] [--json PATH]

Ten to twenty minutes a seed on 2 busy cores; finished runs are skipped, so it can be stopped and run again.
A tiny SAIL-VL2 is asked for the number on one of four cards (one look) and for the sum of two (two steps). Basic SFT
teaches direct answers; LongCoT SFT goes on with reasoning alone; a control goes on with direct answers for as many
steps; Think-Fusion SFT goes on from LongCoT with nine direct answers to one trace. Two sisters go on from LongCoT at a
tenth of its rate, with their data in different orders, and `sail-rl merge` makes a soup of them. Each checkpoint
answers 1,000 unseen questions in each mode, which the chat template alone switches.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import SHORT_RESULTS, machine, markdown, results_file, save
from benchmarks.quickstart_runs import launch

QUESTIONS, SHORT_QUESTIONS = 1000, 40
SOURCE = "source: pictures, families: [cards], levels: [1], forms: [number, sum]"
# Steps of each stage.
STEPS = {"basic": 400, "longcot": 300, "fusion": 200, "direct_on": 300, "sister_a": 100, "sister_b": 100}
SHORT_STEPS = dict.fromkeys(STEPS, 2)
NAMES = {
    "basic": "basic SFT",
    "direct_on": "basic SFT, as many more steps as LongCoT",
    "longcot": "LongCoT SFT",
    "sister_a": "LongCoT SFT, gently on",
    "sister_b": "LongCoT SFT, gently on, in another order",
    "soup": "soup of the two",
    "fusion": "Think-Fusion SFT",
}
CELLS = [(mode, kind) for mode in ("direct", "thinking") for kind in ("one look", "two steps")]
COLUMNS = {"stage": "after"} | {f"{mode}, {kind}": f"{mode}, {kind}" for mode, kind in CELLS}


def main() -> None:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two steps of each stage, few questions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    path, rows = arguments.json or results_file("think_fusion", arguments.short), list[dict[str, Any]]()
    for seed in arguments.seeds:
        rows += run_seed(seed, arguments.short)
        result = {"machine": machine(), "questions": questions(arguments.short), "rows": rows, "means": means(rows)}
        save(path, result | {"claims": claims(result["means"], result["questions"])}, report(rows, result["questions"]))


def questions(short: bool) -> int:
    """In each mode; half of them of each kind."""
    return SHORT_QUESTIONS if short else QUESTIONS


def run_seed(seed: int, short: bool) -> list[dict[str, Any]]:
    """All stages of one seed: a row each."""
    folder = SHORT_RESULTS / f"think_fusion_seed{seed}{'_short' if short else ''}"
    basic, longcot = folder / "basic/final", folder / "longcot/final"
    go_on = ("model.random_init=null", f"model.path={basic}")
    direct, cot = part("direct", 0), part("cot", 1)
    mixture = f"data.train=[{part('direct', 2, 9)}, {part('cot', 3, 1)}]"
    stage(folder, "basic", seed, short, f"data.train={direct}")
    stage(folder, "longcot", seed, short, f"data.train={cot}", *go_on)
    stage(folder, "fusion", seed, short, mixture, f"model={longcot}", recipe="recipes/quickstart_think_fusion.yaml")
    stage(folder, "direct_on", seed, short, f"data.train={part('direct', 1)}", *go_on)
    # Sisters must stay close: with the rate of the stages they are too far apart for a mean.
    gently = ("model.random_init=null", f"model.path={longcot}", "optim.learning_rate=2e-4")
    for name, order in (("sister_a", 4), ("sister_b", 5)):
        stage(folder, name, seed, short, f"data.train={part('cot', order)}", *gently)
    answers = {name: read_predictions(folder / name / "predictions_after.jsonl") for name in STEPS}
    rows = [{"seed": seed, "name": name} | cells(answered) for name, answered in answers.items()]
    return [*rows, {"seed": seed, "name": "soup"} | soup(folder)]


def part(kind: str, seed: int, weight: int | None = None) -> str:
    """A source of training rows of one kind."""
    share = f", weight: {weight}" if weight else ""
    return f"{{{SOURCE}, kind: {kind}, seed: {seed}{share}}}"


def stage(
    folder: Path, name: str, seed: int, short: bool, *changes: str, recipe: str = "recipes/quickstart_sft.yaml"
) -> None:
    """One training run through its real command; a finished one returns at once."""
    asked = ", ".join(f"{{{SOURCE}, kind: {kind}, rows: {questions(short)}}}" for kind in ("direct", "cot"))
    common = ("data.thinking=by_kind", f"data.eval=[{asked}]", "trainer.eval_every=null", "data.reasoning=terse")
    steps = (SHORT_STEPS if short else STEPS)[name]
    launch("sail_rl/train_sft.py", recipe, steps, *common, f"seed={seed}", f"output_dir={folder / name}", *changes)


def soup(folder: Path) -> dict[str, float]:
    """The mean of the two sisters, by the real command, on the questions of one of them."""
    from sail_rl.checkpoint_accuracy import checkpoint_predictions, read_eval_recipe
    from sail_rl.run_folder import write_json_lines

    target, answers = folder / "soup", folder / "soup.jsonl"
    if not target.exists():
        sources = [folder / name / "final" for name in ("sister_a", "sister_b")]
        subprocess.run([sys.executable, "-m", "sail_rl.cli", "merge", target, *sources], check=True)
    if not answers.exists():
        recipe = read_eval_recipe(folder / "longcot/config.yaml")
        write_json_lines(answers, checkpoint_predictions(recipe, target))
    return cells(read_predictions(answers))


def read_predictions(file: Path) -> list[dict[str, Any]]:
    """What a checkpoint has answered."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def cells(answered: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy by mode and kind of question."""
    modes, kinds = {"direct": "direct", "cot": "thinking"}, {False: "one look", True: "two steps"}
    found: dict[str, list[bool]] = {f"{mode}, {kind}": [] for mode, kind in CELLS}
    for one in answered:
        found[f"{modes[one['kind']]}, {kinds[one['needs_thinking']]}"].append(one["correct"])
    return {name: fmean(values) for name, values in found.items()}


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each stage over the seeds."""
    cells_of = [f"{mode}, {kind}" for mode, kind in CELLS]
    found = []
    for name, shown in NAMES.items():
        mine = [row for row in rows if row["name"] == name]
        values = {cell: fmean(row[cell] for row in mine) for cell in cells_of}
        found.append({"name": name, "stage": shown, "seeds": len(mine)} | values)
    return found


def claims(averages: Sequence[dict[str, Any]], asked: int) -> list[dict[str, Any]]:
    """What was to be shown, each as a difference of two accuracies with two standard errors of it."""
    after = {row["name"]: row for row in averages}
    two_steps, one_look = "two steps", "one look"
    longcot, fusion, basic, soup_ = (after[name] for name in ("longcot", "fusion", "basic", "soup"))
    compared = [
        ("LongCoT, thinking, over basic SFT, direct", longcot, "thinking", basic, "direct", two_steps),
        ("LongCoT, thinking, over as much direct SFT", longcot, "thinking", after["direct_on"], "direct", two_steps),
        ("Think-Fusion by LongCoT, thinking", fusion, "thinking", longcot, "thinking", two_steps),
        ("Think-Fusion by LongCoT, thinking", fusion, "thinking", longcot, "thinking", one_look),
        ("Think-Fusion by basic SFT, direct", fusion, "direct", basic, "direct", two_steps),
        ("Think-Fusion by basic SFT, direct", fusion, "direct", basic, "direct", one_look),
        ("soup by the mean of the sisters, thinking", soup_, "thinking", sisters(after), "thinking", two_steps),
    ]
    return [
        {"claim": name, "questions": kind}
        | difference(a[f"{mine}, {kind}"], b[f"{theirs}, {kind}"], a["seeds"] * asked)
        for name, a, mine, b, theirs, kind in compared
    ]


def sisters(after: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The mean of both."""
    pair = [after["sister_a"], after["sister_b"]]
    return {name: fmean(one[name] for one in pair) for name in pair[0] if name not in ("name", "stage")}


def difference(mine: float, theirs: float, asked: int) -> dict[str, float]:
    """In points of accuracy, with two standard errors; half of the questions are of one kind."""
    variance = (mine * (1 - mine) + theirs * (1 - theirs)) / (asked / 2)
    return {"points": 100 * (mine - theirs), "noise": 200 * variance**0.5}


def percent(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with accuracies in percent."""
    return [row | {f"{mode}, {kind}": 100 * row[f"{mode}, {kind}"] for mode, kind in CELLS} for row in rows]


def report(rows: Sequence[dict[str, Any]], asked: int) -> str:
    """The tables as Markdown."""
    averages = means(rows)
    claimed = {"claim": "difference", "questions": "questions", "points": "points", "noise": "two standard errors"}
    each = percent([row | {"stage": NAMES[row["name"]]} for row in rows])
    seeds = averages[0]["seeds"]
    parts = [f"Accuracy in percent, means of {seeds} seeds, {asked} unseen questions in each mode, half of each kind."]
    parts += [markdown(percent(averages), COLUMNS), markdown(claims(averages, asked), claimed)]
    parts += ["Each seed.", markdown(each, {"seed": "seed"} | COLUMNS)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    main()
