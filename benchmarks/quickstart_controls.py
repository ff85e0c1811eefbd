"""Does the quickstart's gain come from RL and from seeing? Three seeds, each with two controls.

    make controls        (about half an hour on 2 cores; finished runs are skipped, so it can be stopped and resumed)

For every seed: the SFT start, GRPO, the same GRPO with shuffled rewards, and the final model on blank pictures.
Writes benchmarks/results/quickstart_controls.{json,md}.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

from benchmarks.common import RESULTS
from sail_rl.command_line import load_recipe
from sail_rl.config import GrpoRecipe
from sail_rl.data.pictures import question_row

RUNS = Path("runs/controls")
SHUFFLED = "rewards=[{function: benchmarks/shuffled_rewards.py:shuffled, weight: 1.0}]"


def main() -> None:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=RESULTS / "quickstart_controls.json")
    arguments = parser.parse_args()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in arguments.seeds:
        rows.append(run_seed(seed))
        result = {"machine": machine(), "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
        arguments.json.with_suffix(".md").write_text(table(rows))
    print(table(rows))


def run_seed(seed: int) -> dict:
    """All four measurements of one seed."""
    sft, true, shuffled = (RUNS / f"seed{seed}" / name for name in ("sft", "grpo", "shuffled"))
    launch("sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", f"seed={seed}", f"output_dir={sft}")
    common = ("sail_rl/train_grpo.py", "recipes/quickstart.yaml", f"seed={seed}", f"model={sft / 'final'}")
    launch(*common, f"output_dir={true}")
    launch(*common, f"output_dir={shuffled}", SHUFFLED)
    summary = json.loads((true / "summary.json").read_text())
    return {
        "seed": seed,
        "before": summary["accuracy_before"],
        "after": summary["accuracy_after"],
        "novel_after": summary["accuracy_novel_after"],
        "well_formed_before": summary["well_formed_before"],
        "shuffled_after": json.loads((shuffled / "summary.json").read_text())["accuracy_after"],
        "blank_after": blank_accuracy(true),
        "majority_rate": majority_rate(true),
        "questions": summary["eval_questions"],
        "training_seconds": summary["seconds"],
    }


def launch(*arguments: str) -> None:
    """One training run through its real command; a finished one returns at once."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *arguments], check=True, env=environment)


def majority_rate(run: Path) -> float:
    """Accuracy of always giving the commonest answer."""
    answers = [json.loads(line)["answer"] for line in (run / "predictions_after.jsonl").read_text().splitlines()]
    return Counter(answers).most_common(1)[0][1] / len(answers)


def blank_accuracy(run: Path) -> float:
    """Accuracy of the final model on the same questions, every picture replaced by a grey one."""
    from rollouts.hf import HFEngine
    from sail_rl.config_data import ModelSection
    from sail_rl.data.stream import Shard
    from sail_rl.eval import evaluate, share
    from sail_rl.launch import Run
    from sail_rl.model.load import image_token_ids, load_model
    from sail_rl.questions import question_stream

    folder = run.parent / "blank"
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(GrpoRecipe, run / "config.yaml", [f"data.eval={write_blank_rows(run, folder)}"])
    model, processor = load_model(ModelSection(path=str(run / "final")), recipe.seed)
    blank_run = Run(recipe, folder, accelerator=None, shard=Shard())
    engine = HFEngine(model, processor.tokenizer, image_token_ids(model, processor))
    stream = question_stream(blank_run, "eval", processor)
    assert stream is not None
    return share(evaluate(blank_run, engine, stream)) or 0.0


def write_blank_rows(run: Path, folder: Path) -> Path:
    """The run's validation questions as a .jsonl file with one grey picture."""
    Image.new("RGB", (112, 112), (128, 128, 128)).save(folder / "blank.png")
    source = load_recipe(GrpoRecipe, run / "config.yaml").data.eval
    options = {"seed": source.seed, "families": source.families, "levels": source.levels, "forms": source.forms}
    rows = [question_row("validation", index, steps=tuple(source.steps), **options) for index in range(source.rows)]
    kept = ("id", "question", "answer", "answer_type", "options")
    lines = [json.dumps({key: row[key] for key in kept} | {"images": ["blank.png"]}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def machine() -> dict[str, str | int | None]:
    """Where the figures come from."""
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"cores": os.cpu_count(), "processor": platform.processor(), **versions}


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    names = list(rows[0])
    cells = [[f"{row[n]:.3f}" if isinstance(row[n], float) else str(row[n]) for n in names] for row in rows]
    lines = [names, ["---"] * len(names), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
