"""Samples of what the model wrote, with pictures and the reward breakdown, for people and for the report."""

from collections.abc import Sequence

from rewards.score import Scores
from rollouts import Rollout
from sail_rl.advantage import Advantages
from sail_rl.launch import Run
from sail_rl.questions import Question, save_pictures
from sail_rl.run_folder import write_json_lines

GROUPS_KEPT = 4


def save_transcript(
    run: Run,
    step: int,
    questions: Sequence[Question],
    rollouts: Sequence[Rollout],
    scores: Scores,
    advantages: Advantages,
) -> None:
    """Write `transcripts/step_N.jsonl`: whole groups of the first few questions of the first process."""
    if not run.is_main:
        return
    values = run.shard.slice(advantages.values_N.tolist())
    group_size = len(rollouts) // len(questions)
    rows = []
    for i, rollout in enumerate(rollouts[: GROUPS_KEPT * group_size]):
        question = questions[i // group_size]
        rows.append(
            {
                "step": step,
                "id": question.example.id,
                "question": question.example.question,
                "answer": question.example.columns["answer"],
                "completion": rollout.text,
                "finish_reason": rollout.finish_reason,
                "reward": scores.totals[i],
                "rewards": {name: values[i] for name, values in (scores.parts | scores.checks).items()},
                "outcomes": {name: str(given[i].outcome) for name, given in scores.verdicts.items()},
                "advantage": values[i],
                "family": question.example.columns.get("family"),
                "images": save_pictures(run.folder, question.example),
            }
        )
    write_json_lines(run.folder / "transcripts" / f"step_{step:06d}.jsonl", rows)
