"""A step's questions with their completions; with `rollout.overlap = 1` the next step's are written while it trains.

A step then trains on completions of the weights before the newest ones, which importance sampling corrects. A
checkpoint holds the completions that were written ahead, so that a resumed run trains on them as well. Whole groups are
scored while others are written.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rollouts import Rollout, Sampling
from sail_rl.checkpoint import Progress
from sail_rl.data.stream import RowStream
from sail_rl.early_scores import EarlyScores
from sail_rl.launch import Run
from sail_rl.metrics import Stopwatch
from sail_rl.profiling import Profile
from sail_rl.questions import Question


@dataclass(frozen=True)
class Batch:
    """What a step trains on."""

    questions: list[Question]
    rollouts: list[Rollout]
    scoring: EarlyScores
    data_position: int
    """Rows read when the last of the questions had been."""


class Writer:
    """Has the engine write the batches of a run, one a step."""

    def __init__(
        self,
        run: Run,
        engine: Any,
        stream: RowStream[Question],
        sampling: Sampling,
        begin_scoring: Callable[[Sequence[Question], int], EarlyScores],
        watch: Stopwatch,
        profile: Profile,
    ):
        self.run, self.engine, self.stream, self.sampling = run, engine, stream, sampling
        self.begin_scoring, self.watch, self.profile = begin_scoring, watch, profile
        self.rollout = run.recipe.rollout
        self.batch: Batch | None = None  # of the first step that is not done, if it is written
        self.coming: tuple[list[Question], Any, EarlyScores, int] | None = None
        self.first: Batch | None = None  # of the step that is being done, with overlap

    def take_up(self, progress: Progress) -> None:
        """Go on with the completions that a checkpoint holds."""
        if progress.written_ahead:
            rollouts = [Rollout(**told) for told in self.run.shard.slice(list(progress.written_ahead))]
            questions, size = self._read(self.rollout.prompts_per_step), self.rollout.num_generations
            scoring = self.begin_scoring(questions, progress.step + 1)
            for place in range(len(questions)):
                scoring.add(place, rollouts[place * size : (place + 1) * size])
            self.batch = Batch(questions, rollouts, scoring, self.stream.position)

    def next(self, step: int) -> Batch:
        """The batch of this step; with overlap that of the next one is begun."""
        if not self.rollout.overlap:
            return self._written(self.rollout.prompts_per_step, step)
        self.first = self._taken(step)
        return self.first

    def more(self, count: int, step: int) -> Batch:
        """More questions for this step, so many; with overlap the batch that is written for the next step already."""
        if not self.rollout.overlap:
            return self._written(count, step)
        with self.watch.phase("rollout"):
            self._wait()
        return self._taken(step)

    def finish(self) -> None:
        """Wait for what is being written: after a step, before the weights change."""
        self.first = None
        self._wait()

    def _written(self, count: int, step: int) -> Batch:
        questions = self._read(count)
        scoring = self.begin_scoring(questions, step)
        with self.watch.phase("rollout"), self.profile.untraced():
            rollouts = self.engine.generate(*self._asked(questions), scoring.add)
        return Batch(questions, rollouts, scoring, self.stream.position)

    def _taken(self, step: int) -> Batch:
        if self.batch is None:
            self._begin(step)
            self._wait()
        assert self.batch is not None
        batch = self.batch
        self._begin(step + 1)
        return batch

    def _wait(self) -> None:
        if self.coming is None:
            return
        (questions, pending, scoring, position), self.coming, self.batch = self.coming, None, None
        self.batch = Batch(questions, self.engine.finish(pending), scoring, position)

    def recorded(self, progress: Progress) -> Progress:
        """Progress with the completions of the first step that is not done."""
        if not self.rollout.overlap:
            return progress
        batch = self.first or self.batch
        mine = [asdict(rollout) for rollout in batch.rollouts] if batch else []
        return progress.after(written_ahead=self.run.shard.gather(mine))

    def _read(self, count: int) -> list[Question]:
        with self.watch.phase("data"):
            return self.stream.next_items(count)

    def _asked(self, questions: Sequence[Question]) -> tuple[list[Any], int, Sampling]:
        return [question.prompt for question in questions], self.rollout.num_generations, self.sampling

    def _begin(self, step: int) -> None:
        questions = self._read(self.rollout.prompts_per_step)
        scoring = self.begin_scoring(questions, step)
        with self.watch.phase("rollout"):
            pending = self.engine.begin(*self._asked(questions), scoring.add)
            self.coming = questions, pending, scoring, self.stream.position
