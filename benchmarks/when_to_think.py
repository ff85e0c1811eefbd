"""When to think: SAIL-RL's dual reward against a model that always thinks.

    .venv/bin/python benchmarks/when_to_think.py [--short] [--seeds 0 1 2]

About twenty-five minutes a seed on one core; finished runs are skipped. A card's own number is easy, the sum of two is
hard. Two tiny models begin alike: one is taught to judge whether thought is needed, and to answer at once where it is
not (recipes/quickstart_dual_reward.yaml goes on with the gated product of accuracy and judging, and the form); the
other always thinks (recipes/quickstart.yaml, accuracy and form). The teacher of the first tosses a coin for each of its
judgements, so that when to think can be learnt from the reward alone. Both then answer the same unseen questions.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import SHORT_RESULTS, machine, markdown, results_file, save
from benchmarks.quickstart_runs import launch

QUESTIONS, SHORT_QUESTIONS = 1000, 20
ROWS, SHORT_ROWS = 6000, 60  # of the teacher, half of them hard
# To judge, to answer at once and to reason is more to learn than to reason; the other side is right by its steps.
SFT_STEPS, STEPS = {"judge": 1300, "always": 400}, {"judge": 200, "always": 60}
SHORT_STEPS = 2
WRONG = 1 / 2  # of the teacher's judgements
LENGTH = {"judge": 96, "always": 72}  # a judgement takes some thirty tokens
KEPT = ("id", "question", "answer", "needs_thinking", "judgement", "reasoning")
SOURCE = "source: pictures, families: [cards], levels: [1], forms: [number, sum]"
NAMES = {
    "judge-sft": "judges, after SFT",
    "judge": "judges, dual reward",
    "always-sft": "always thinks, after SFT",
    "always": "always thinks, accuracy and form",
}
COLUMNS = {
    "stage": "model",
    "accuracy": "right, %",
    "thinks_hard": "thinks on hard, %",
    "thinks_easy": "thinks on easy, %",
    "right_hard": "right on hard, %",
    "right_easy": "right on easy, %",
    "tokens": "tokens",
}


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two steps of each stage, few questions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        rows += run_seed(seed, arguments.short)
        result = {"machine": machine(), "rows": rows, "means": means(rows)}
        save(arguments.json or results_file("when_to_think", arguments.short), result, report(rows))


def run_seed(seed: int, short: bool) -> list[dict[str, Any]]:
    """Both models of one seed, before and after GRPO: a row each."""
    folder = SHORT_RESULTS / f"when_to_think_seed{seed}{'_short' if short else ''}"
    taught = teacher_rows(folder, seed, SHORT_ROWS if short else ROWS)
    on_cards = f"data.train={{{SOURCE}, seed: 1}}"
    common = (f"seed={seed}", "data.eval=null", "trainer.eval_every=null")
    for name, thinking, train, recipe in (
        ("judge", "judge", f"data.train={taught}", "recipes/quickstart_dual_reward.yaml"),
        ("always", "think", f"data.train={{{SOURCE}}}", "recipes/quickstart.yaml"),
    ):
        sft, steps = (SHORT_STEPS, SHORT_STEPS) if short else (SFT_STEPS[name], STEPS[name])
        start, own = folder / f"{name}-sft", f"data.thinking={thinking}"
        teach = (own, train, "data.reasoning=terse", f"sft.max_completion_length={LENGTH[name]}")
        launch("sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", sft, *common, *teach, f"output_dir={start}")
        practise = (own, on_cards, f"rollout.max_completion_length={LENGTH[name]}", f"model={start}/final")
        launch("sail_rl/train_grpo.py", recipe, steps, *common, *practise, f"output_dir={folder / name}")
        for stage in (start, folder / name):
            ask(stage, seed, own, LENGTH[name], SHORT_QUESTIONS if short else QUESTIONS)
    return [{"seed": seed, "name": name} | figures(folder / name / "eval/predictions.jsonl") for name in NAMES]


def teacher_rows(folder: Path, seed: int, count: int) -> Path:
    """Rows of the picture task whose judgement, and with it the answer's form, is now and then the other one."""
    from sail_rl.data.pictures import JUDGEMENTS, picture_row

    file, draw = folder / "teacher/rows.jsonl", random.Random(seed)
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        row = picture_row("train", index, seed=seed, families=["cards"], levels=[1], forms=["number", "sum"])
        row["images"][0].save(file.parent / f"{index}.png")
        if draw.random() < WRONG:
            row["needs_thinking"] = not row["needs_thinking"]
            row["judgement"] = JUDGEMENTS["two_step" if row["needs_thinking"] else "direct"]
        kept = {name: row[name] for name in KEPT} | {"images": [f"{index}.png"]}
        lines.append(json.dumps(kept) + "\n")
    file.write_text("".join(lines))  # last: a file that is there is whole
    return file


def ask(stage: Path, seed: int, thinking: str, length: int, questions: int) -> None:
    """`sail-rl eval`, greedy."""
    changes = (f"model={stage}/final", f"seed={seed}", thinking, f"rollout.max_completion_length={length}")
    asked = f"data.eval={{{SOURCE}, rows: {questions}}}"
    command = [sys.executable, "-m", "sail_rl.cli", "eval", "recipes/quickstart.yaml", *changes, asked]
    subprocess.run([*command, "--output", str(stage / "eval")], check=True)


def figures(file: Path) -> dict[str, float]:
    """In percent, and the mean of tokens."""
    answered = [json.loads(line) for line in file.read_text().splitlines()]
    hard, easy = ([one for one in answered if one["needs_thinking"] is needed] for needed in (True, False))
    return {
        "accuracy": percent(answered, "correct"),
        "thinks_hard": percent(hard, "thought"),
        "thinks_easy": percent(easy, "thought"),
        "right_hard": percent(hard, "correct"),
        "right_easy": percent(easy, "correct"),
        "tokens": fmean(one["length"] for one in answered),
    }


def percent(answered: Sequence[Mapping[str, Any]], key: str) -> float:
    """Share of answers."""
    return 100 * fmean(one[key] for one in answered)


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds."""
    found = []
    for name, stage in NAMES.items():
        mine = [row for row in rows if row["name"] == name]
        values = {key: fmean(row[key] for row in mine) for key in mine[0] if key not in ("seed", "name")}
        found.append({"name": name, "stage": stage} | values)
    return found


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The tables as Markdown."""
    each = [row | {"stage": NAMES[row["name"]]} for row in rows]
    seeds = len({row["seed"] for row in rows})
    text = f"Greedy answers to unseen questions, half of them hard; means of {seeds} seeds."
    return f"{text}\n\n{markdown(means(rows), COLUMNS)}\nEach seed.\n\n{markdown(each, {'seed': 'seed'} | COLUMNS)}"


if __name__ == "__main__":
    main()
