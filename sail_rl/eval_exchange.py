"""`sail-rl eval-export` and `eval-import`: evaluations to and from VLMEvalKit's files of predictions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards import algebra_pool
from rewards.accuracy import PASSED, accuracy_verdicts
from rewards.answers import boxed_answers
from sail_rl.command_line import BadInput
from sail_rl.data.vlmevalkit import question_row, read_predictions, write_predictions
from sail_rl.eval import Prediction
from sail_rl.eval_command import thought
from sail_rl.eval_compare import read_evaluation
from sail_rl.eval_figures import all_figures, markdown_table
from sail_rl.run_folder import write_json, write_json_lines


def export_predictions(folder: Path, file: Path) -> None:
    """The first command; VLMEvalKit's files have one prediction of each question."""
    evaluation = read_evaluation(folder)
    if evaluation.samples > 1:
        raise BadInput(f"{folder}: {evaluation.samples} completions of each question; export one with --samples 1")
    write_predictions([completions[0] for completions in evaluation.questions], file)
    print(f"{file}: {len(evaluation.questions)} predictions")


def import_predictions(folder: Path, file: Path) -> None:
    """The second: predictions, judged by the accuracy reward, as a folder that `eval-compare` reads."""
    if (folder / "predictions.jsonl").exists():
        raise BadInput(f"{folder} already has predictions; name another folder")
    records = read_predictions(file)
    if not records:
        raise BadInput(f"{file}: there are no predictions in it")
    predictions = judged(records, file)
    folder.mkdir(parents=True, exist_ok=True)
    figures = all_figures(predictions, seed=0)
    write_json_lines(folder / "predictions.jsonl", predictions)
    (folder / "summary.md").write_text(f"# {file}\n\n{markdown_table(figures)}")
    write_json(folder / "summary.json", {"model": str(file), "samples": 1, "greedy": None} | figures)
    print(markdown_table(figures), end="")


def judged(records: Sequence[Mapping[str, Any]], file: Path) -> list[Prediction]:
    """Predictions as ours. Lengths in tokens and the form that was asked for are not known of them."""
    rows = [question_row({name: str(value) for name, value in one.items() if value not in (None, "")}, [])
            for one in records]  # fmt: skip
    for number, row in enumerate(rows, 1):
        if "answer" not in row:
            raise BadInput(f"{file}: row {number} has no `answer` to compare its prediction with")
    texts = [str(one["prediction"]) for one in records]
    names = ("answer", "answer_type", "options")
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
    try:
        verdicts = accuracy_verdicts([boxed(text) for text in texts], **columns)
    finally:
        algebra_pool.close()
    kept = ("id", "question", "answer", "answer_type", "options", "type", "category")
    return [
        {name: row.get(name) for name in kept}
        | {"position": number, "sample": 0, "completion": text, "correct": (verdict.value or 0) >= PASSED}
        | {"thought": thought(text), "images": []}
        for number, (row, text, verdict) in enumerate(zip(rows, texts, verdicts, strict=True))
    ]


def boxed(text: str) -> str:
    """A prediction as the reward reads it: many models answer without a box, and then mean all that they write."""
    return text if boxed_answers(text) else f"\\boxed{{{text.strip()}}}"
