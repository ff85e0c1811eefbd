"""The end of a run: the final model, summary.json, report.html and the last lines in the terminal."""

import json
from pathlib import Path

from sail_rl.checkpoint import Progress, Saver, note_final_accuracy, save_model
from sail_rl.eval import Prediction, share, summarise
from sail_rl.launch import Run, let_communication_end, result_lines
from sail_rl.report import write_report
from sail_rl.run_folder import write_json


def finish_run(run: Run, saver: Saver, progress: Progress, before: list[Prediction], after: list[Prediction]) -> None:
    """Write what a finished run leaves behind and say what came of it."""
    with saver.whole.weights():
        if run.is_main:
            save_model(run.folder / "final", saver.whole.model, saver.processor)
    if run.is_main:
        earlier = seconds_of_start(run.recipe.model.path)
        summary = summarise(before, after) | {
            "steps": progress.step,
            "seconds": progress.seconds + earlier,
            "seconds_this_stage": progress.seconds,
        }
        note_final_accuracy(run, progress.step, share(after))
        write_json(run.folder / "summary.json", summary)
        write_report(run.folder)
        print(result_lines(run.recipe.output_dir, summary), flush=True)
    run.accelerator.wait_for_everyone()
    if run.shard.world_size > 1:
        let_communication_end()
    run.accelerator.end_training()
    saver.hub.finish(run.folder / "final")  # last: nobody waits for what may take long


def seconds_of_start(model_path: str | None) -> float:
    """Training seconds of the run that made the starting checkpoint, when it is one of ours (`<run>/final`)."""
    summary = Path(model_path).parent / "summary.json" if model_path else None
    return json.loads(summary.read_text()).get("seconds", 0.0) if summary and summary.is_file() else 0.0
