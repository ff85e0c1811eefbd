"""Rewards of groups that are whole, found while other completions are still being written.

What waits when the rewards are free is scored together: slow rewards get few calls, and wait for no slower completion.
"""

import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Lock

from rewards.load import Reward
from rewards.score import Scores, joined
from rollouts import Rollout
from rollouts.in_thread import in_thread
from sail_rl.launch import Run
from sail_rl.questions import Question
from sail_rl.scoring import score_rollouts
from sail_rl.watchdog import mark

Score = Callable[[Sequence[int], Sequence[Rollout]], Scores]
"""Of whole groups, by the places of their questions."""
TURN = Lock()  # of one step: what a function or a judge remembers belongs to one thread at a time


class EarlyScores:
    """The scores of one step."""

    def __init__(self, score: Score, groups: int, early: bool):
        self.score, self.groups = score, groups
        self.whole: SimpleQueue[tuple[int, list[Rollout]]] = SimpleQueue()
        self.seconds = 0.0
        """How long scoring took, whether or not anybody waited for it."""
        self.scores = in_thread(self._score_all) if early else None

    def add(self, place: int, group: list[Rollout]) -> None:
        """A group is whole. Called by engines, in any order and thread, once for each group."""
        mark("a group of completions was whole")
        self.whole.put((place, group))

    def result(self) -> Scores:
        """All scores, in the order of the questions, once all groups have been added."""
        return self.scores.result() if self.scores else self._score_all()

    def _score_all(self) -> Scores:
        scored: list[tuple[list[int], Scores]] = []
        done = 0
        while done < self.groups:
            groups = self._waiting()
            size = len(next(iter(groups.values())))
            with TURN:
                start = time.perf_counter()
                scores = self.score(list(groups), [rollout for group in groups.values() for rollout in group])
                self.seconds += time.perf_counter() - start
            scored.append(([place * size + member for place in groups for member in range(size)], scores))
            done += len(groups)
        return joined(scored)

    def _waiting(self) -> dict[int, list[Rollout]]:
        """At least one group, and all that have come by now, in the order of their questions."""
        groups = dict([self.whole.get()])
        while not self.whole.empty():
            groups.update([self.whole.get()])
        return dict(sorted(groups.items()))


def begin_scoring(run: Run, rewards: Sequence[Reward], questions: Sequence[Question], step: int) -> EarlyScores:
    """Ready for the groups of a step. What is written ahead of a step that will not be is not scored ahead."""

    def score(places: Sequence[int], rollouts: Sequence[Rollout]) -> Scores:
        return score_rollouts(run, rewards, [questions[place] for place in places], rollouts, step)

    early = step <= run.recipe.trainer.max_steps and not any(reward.at_once for reward in rewards)
    return EarlyScores(score, len(questions), early)
