"""Accuracy on unseen questions: greedy completions, judged by the accuracy and format rewards."""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from rewards import accuracy_reward, format_reward
from rewards.accuracy import PASSED, accuracy_verdicts
from rewards.load import Reward
from rewards.score import score
from rollouts import Rollout, RolloutEngine
from sail_rl.data.stream import RowStream
from sail_rl.launch import Run
from sail_rl.questions import Question, reward_columns, save_pictures
from sail_rl.run_folder import write_json_lines
from sail_rl.sampling import greedy_sampling
from sail_rl.stopping import GivenUp, give_up_if_asked
from sail_rl.watchdog import mark

Prediction = dict[str, Any]
# Of the data: what answers are told apart by, and what another tool needs to judge them.
KEPT_COLUMNS = (
    *("family", "form", "difficulty", "needs_thinking", "novel", "answer_type", "kind"),
    *("type", "category", "benchmark", "options"),
)


def evaluate(run: Run, engine: RolloutEngine, stream: RowStream[Question]) -> list[Prediction]:
    """Answer every question of the stream once; the same list on every process."""
    shard, count = stream.shard, len(stream.rows)
    stream.position = 0
    predictions: list[Prediction] = []
    sampling = greedy_sampling(run.recipe)
    while stream.position < count:
        give_up_if_asked(shard)
        mark(f"{stream.position} of {count} questions were answered in an evaluation")
        wanted = min(run.recipe.trainer.eval_batch_size, count - stream.position)
        questions = stream.next_items(wanted + -wanted % shard.world_size)
        # Beyond the end are rows read again: fillers for a last batch that cannot be shared equally.
        questions = [question for question in questions if question.prompt.seed < count]
        # Also without questions, which the last batch may leave a process: the engine may need all of them.
        rollouts = engine.generate([question.prompt for question in questions], 1, sampling)
        if questions:
            judged = judge(questions, rollouts, run.recipe.data.thinking, run.folder)
            pictures = [save_pictures(run.folder, question.example) for question in questions]
            predictions += [one | {"images": names} for one, names in zip(judged, pictures, strict=True)]
    return sorted(shard.gather(predictions), key=lambda prediction: prediction.pop("position"))


def judge(questions: list[Question], rollouts, thinking: str, run: Path) -> list[Prediction]:
    """One prediction per question."""
    columns = reward_columns(questions, rollouts, run)
    judges = [Reward("accuracy", accuracy_reward), Reward("format", format_reward, arguments={"contract": thinking})]
    scores = score(judges, columns, group_size=1)
    for error in scores.errors:
        print(f"warning: in the evaluation: {error}; its answers count as wrong", file=sys.stderr, flush=True)
    return [
        {
            "position": question.prompt.seed,
            "id": question.example.id,
            "question": question.example.question,
            "answer": question.example.columns["answer"],
            "completion": rollout.text,
            "correct": is_right(scores.parts["accuracy"][i], question, rollout),
            "well_formed": bool(scores.parts["format"][i]),
            "finish_reason": rollout.finish_reason,
            "length": len(rollout.token_ids),
            **{name: columns[name][i] for name in KEPT_COLUMNS if name in columns},
        }
        for i, (question, rollout) in enumerate(zip(questions, rollouts, strict=True))
    ]


def is_right(value: float | None, question: Question, rollout: Rollout) -> bool:
    """Whether the answer is the row's, or one of its `alternatives`, which benchmarks have."""
    others = list(question.example.columns.get("alternatives") or [])
    if (value or 0) >= PASSED or not others:
        return (value or 0) >= PASSED
    types = [question.example.columns.get("answer_type")] * len(others)
    texts, reasons = [rollout.text] * len(others), [rollout.finish_reason] * len(others)
    verdicts = accuracy_verdicts(texts, answer=others, answer_type=types, finish_reason=reasons)
    return any((verdict.value or 0) >= PASSED for verdict in verdicts)


def predictions_once(
    run: Run, moment: str, engine: RolloutEngine, stream: RowStream[Question] | None
) -> list[Prediction]:
    """Evaluate and write `predictions_<moment>.jsonl`; a resumed run reads what it wrote before."""
    if stream is None:
        return []
    file = run.folder / f"predictions_{moment}.jsonl"
    done = run.shard.gather([file.is_file()])[0]
    if done and moment == "before":
        return [json.loads(line) for line in file.read_text().splitlines()]
    if run.is_main:
        print(f"evaluating on {len(stream.rows)} questions ({moment} training)", flush=True)
    predictions = evaluate(run, engine, stream)
    if run.is_main:
        write_json_lines(file, predictions)
        print(f"greedy validation accuracy {moment} training: {share(predictions):.3f}", flush=True)
    return predictions


def accuracy_now(run: Run, step: int, engine: RolloutEngine, stream: RowStream[Question] | None) -> dict[str, Any]:
    """`eval/accuracy` at the steps of `trainer.eval_every`; the last one is evaluated after the run anyway."""
    trainer = run.recipe.trainer
    if stream is None or trainer.eval_every is None or step % trainer.eval_every or step == trainer.max_steps:
        return {}
    try:
        return {"eval/accuracy": share(evaluate(run, engine, stream))}
    except GivenUp:  # the step itself is done, and has to be saved
        return {}


def share(predictions: list[Prediction], key: str = "correct") -> float | None:
    """The share of predictions for which `key` holds."""
    return sum(bool(p[key]) for p in predictions) / len(predictions) if predictions else None


def majority_rate(predictions: list[Prediction]) -> float | None:
    """The accuracy of always giving the commonest answer."""
    commonest = Counter(p["answer"] for p in predictions).most_common(1)
    return commonest[0][1] / len(predictions) if commonest else None


def summarise(before: list[Prediction], after: list[Prediction]) -> dict[str, Any]:
    """Accuracies for summary.json, also by family and by kind where the data has them."""
    return {
        "accuracy_before": share(before),
        "accuracy_after": share(after),
        "well_formed_before": share(before, "well_formed"),
        "well_formed_after": share(after, "well_formed"),
        "accuracy_novel_after": share([p for p in after if p.get("novel")]),
        "eval_questions": len(after),
        "majority_rate": majority_rate(after),
        "families": by_column("family", before, after),
        "kinds": by_column("kind", before, after),
    }


def by_column(name: str, before: list[Prediction], after: list[Prediction]) -> dict[str, dict[str, Any]]:
    """Accuracies of the rows with each value of a column; empty where no row has it."""
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for moment, predictions in (("before", before), ("after", after)):
        for value in sorted({p[name] for p in predictions if p.get(name)}):
            members = [p for p in predictions if p.get(name) == value]
            groups[value] |= {moment: share(members), "questions": len(members)}
    return dict(groups)
