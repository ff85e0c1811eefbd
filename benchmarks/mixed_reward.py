"""What the mixed reward adds to verifiable rewards: sound reasoning through a judge, and shorter answers.

    .venv/bin/python benchmarks/mixed_reward.py [--seeds 0 1 2]   (about ten minutes a seed on 2 quiet cores;
                                                                   finished runs are skipped, so it can be resumed)

For every seed one SFT start that imitates four teachers (terse; wordy; careless, who takes back what it found and yet
answers with it; hasty, who guesses), and from it GRPO with four rewards: sums of accuracy and format, with thinking
quality, with conciseness as well; and SAIL-RL's gated product, 0.9 * accuracy * thinking quality + 0.1 * format. The
judge is benchmarks/scene_judge.py, asked over HTTP.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import machine, markdown, results_file, save
from benchmarks.scene_judge import Cards, is_sound
from rewards.answers import split_completion
from sail_rl.command_line import load_recipe
from sail_rl.config import GrpoRecipe
from sail_rl.data.pictures import question_row

RUNS = Path("runs/mixed_reward")
QUESTIONS = 1000
START = "none: after SFT"
SFT = ("data.reasoning={terse: 1, wordy: 4, careless: 3, hasty: 2}", "sft.max_completion_length=72")
SFT_STEPS, STEPS, SHORT_STEPS = 400, 160, 2
REWARDS = {
    "accuracy, format": {"accuracy": 0.9, "format": 0.1},
    "with judge": {"accuracy": 0.7, "think_quality": 0.2, "format": 0.1},
    "with judge and conciseness": {"accuracy": 0.6, "think_quality": 0.2, "format": 0.1, "conciseness": 0.1},
    "gated product": {"accuracy": 1.0, "think_quality": 1.0, "format": 1.0},
}
MIX = {"gated product": ("reward_mix.mode=product", "reward_mix.factors=[accuracy, think_quality]")}  # else a sum
COLUMNS = {
    "seed": "seed",
    "rewards": "rewards",
    "steps": "steps",
    "accuracy": "accuracy",
    "length": "tokens",
    "sound": "sound",
    "sound_of_right": "sound, of the right ones",
    "seconds": "training, s",
}


def main() -> None:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--short", action="store_true", help="two steps each, to see that it works")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    path = arguments.json or results_file("mixed_reward", arguments.short)
    here, rows = machine(), []
    for seed in arguments.seeds:
        rows += run_seed(seed, arguments.short)
        result = {"machine": here, "questions": QUESTIONS, "rows": rows, "summary": summary(rows)}
        save(path, result, f"{markdown(rows, COLUMNS)}\n{markdown(summary(rows), SUMMARY_COLUMNS)}")


def run_seed(seed: int, short: bool) -> list[dict[str, Any]]:
    """The start and the three runs from it."""
    folder = RUNS / f"seed{seed}{'_short' if short else ''}"
    sft_steps, steps = (SHORT_STEPS, SHORT_STEPS) if short else (SFT_STEPS, STEPS)
    launch("sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", folder / "sft", seed, sft_steps, short, *SFT)
    rows = [row_of(seed, START, folder / "sft")]
    with scene_judge() as url:
        for name, weights in REWARDS.items():
            run = folder / name.replace(", ", "_").replace(" ", "_")
            changed = (f"model={folder / 'sft/final'}", f"judge.base_url={url}", f"rewards={entries(weights)}")
            changed += MIX.get(name, ())
            launch("sail_rl/train_grpo.py", "recipes/quickstart_mixed.yaml", run, seed, steps, short, *changed)
            rows.append(row_of(seed, name, run))
    return rows


def entries(weights: dict[str, float]) -> str:
    """The recipe's entries of these rewards, with the other keys that they have there."""
    shipped = {
        entry.name: entry.arguments for entry in load_recipe(GrpoRecipe, "recipes/quickstart_mixed.yaml").rewards
    }
    return json.dumps([{"function": name, "weight": weight} | shipped[name] for name, weight in weights.items()])


def launch(script: str, recipe: str, run: Path, seed: int, steps: int, short: bool, *overrides: str) -> None:
    """One training run through its real command; a finished one returns at once."""
    limits = (f"trainer.max_steps={steps}", f"trainer.save_every={steps}", f"seed={seed}", f"output_dir={run}")
    questions = f"data.eval.rows={8 if short else QUESTIONS}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, script, recipe, *limits, questions, *overrides], check=True, env=environment)


@contextmanager
def scene_judge() -> Iterator[str]:
    """The judge in a process of its own while runs ask it; its address."""
    server = subprocess.Popen(
        [sys.executable, "benchmarks/scene_judge.py", "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


def row_of(seed: int, name: str, run: Path) -> dict[str, Any]:
    """Figures of a run's final model, on unseen questions and greedy."""
    ended = json.loads((run / "summary.json").read_text())
    predictions = [json.loads(line) for line in (run / "predictions_after.jsonl").read_text().splitlines()]
    sound = [sound_prediction(prediction) for prediction in predictions]
    right = [s for s, prediction in zip(sound, predictions, strict=True) if prediction["correct"]]
    return {
        "seed": seed,
        "rewards": name,
        "steps": ended["steps"],
        "accuracy": len(right) / len(predictions),
        "length": mean(prediction["length"] for prediction in predictions),
        "sound": mean(sound),
        "sound_of_right": mean(right) if right else None,
        "seconds": ended["seconds_this_stage"],
    }


def sound_prediction(prediction: dict[str, Any]) -> bool:
    """Whether the reasoning passes the three checks, by the scene itself."""
    parts = split_completion(prediction["completion"])
    return is_sound(parts.think or "", parts.rest, scene_of(prediction["id"]), prediction["question"])


def scene_of(identity: str) -> Cards:
    """The cards of a validation question, drawn again from its id."""
    _, split, seed, index = identity.rsplit("-", 3)
    row = question_row(split, int(index), seed=int(seed), families=["cards"], levels=[1], forms=["sum"])
    assert row["id"] == identity
    return {card["label"]: card["digit"] for card in row["scene"]["cards"]}


SUMMARY_COLUMNS = {
    "rewards": "rewards",
    "seeds": "seeds",
    "accuracy": "accuracy",
    "noise": "two standard errors",
    "length": "tokens",
    "shorter": "shorter than with judge alone",
    "sound": "sound",
}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds. Noise is that of a difference between two accuracies over all questions."""
    means = []
    for name in (START, *REWARDS):
        mine = [row for row in rows if row["rewards"] == name]
        accuracy = mean(row["accuracy"] for row in mine)
        noise = 2 * (2 * accuracy * (1 - accuracy) / (QUESTIONS * len(mine))) ** 0.5
        values = {key: mean(row[key] for row in mine) for key in ("length", "sound")}
        means.append({"rewards": name, "seeds": len(mine), "accuracy": accuracy, "noise": noise, **values})
    longer = next(row["length"] for row in means if row["rewards"] == "with judge")
    return [row | {"shorter": 1 - row["length"] / longer} for row in means]


if __name__ == "__main__":
    main()
