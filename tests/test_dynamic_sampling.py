"""Dynamic sampling: how much more is asked for, what becomes of it, and that a stopped run goes on as if it had not."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from conftest import SMALL_GRPO, command, forked

from rewards.score import Scores, joined
from rollouts import Rollout, Sampling
from sail_rl.compare import compare
from sail_rl.config import GrpoRecipe
from sail_rl.data.stream import Shard
from sail_rl.dynamic_sampling import questions_to_ask, refill
from sail_rl.early_scores import EarlyScores
from sail_rl.metrics import Stopwatch
from sail_rl.overlap import Writer
from sail_rl.scoring import gather_outcomes

NAN = float("nan")
PLAIN = {"model": "owner/name", "data": {"train": "pictures"}, "rewards": [{"function": "accuracy"}]}


def recipe_of(**sections):
    required = {"output_dir": "runs/test", "trainer": {"max_steps": 2}}
    return GrpoRecipe.model_validate(PLAIN | required | sections)


@pytest.mark.parametrize(
    ("missing", "share", "most", "processes", "asked"),
    [(4, 0.5, 16, 1, 8), (3, 0.5, 16, 4, 8), (4, 0.0, 64, 1, 32), (4, 0.0, 16, 1, 16), (1, 1.0, 16, 1, 1)],
)
def test_as_many_are_asked_as_will_probably_do(missing, share, most, processes, asked):
    assert questions_to_ask(missing, share, most, processes) == asked


def scores_of(totals, **checks):
    verdicts = {"accuracy": [None] * len(totals)}
    return Scores(totals, {"accuracy": totals}, {"accuracy": [False] * len(totals)}, [], verdicts, checks)


def test_joined_scores_keep_their_places():
    parts = scores_of([1.0, 0.0], sound=[1.0, None]), scores_of([None, 0.5], terse=[0.0, 1.0])
    both = joined([(range(2), parts[0]), (range(2, 4), parts[1])])
    assert both.totals == both.parts["accuracy"] == [1.0, 0.0, None, 0.5]
    assert both.failed["accuracy"] == [False] * 4
    assert both.checks == {"sound": [1.0, None, None, None], "terse": [None, None, 0.0, 1.0]}


class Engine:
    """Writes for question n a group of two whose members differ where n is in `differing`."""

    def __init__(self, differing):
        self.differing = differing

    def generate(self, prompts, group_size, sampling, whole):
        groups = [[Rollout([p, i], [0.0] * 2, "", "stop", 0) for i in range(group_size)] for p in prompts]
        for place, group in enumerate(groups):
            whole(place, group)
        return [rollout for group in groups for rollout in group]

    begin = generate

    def finish(self, pending):
        return pending


class Stream:
    position = 0

    def next_items(self, count):
        self.position += count
        return [SimpleNamespace(prompt=place) for place in range(self.position - count, self.position)]


@pytest.fixture
def step():
    """A step with a bound of refills: (questions, rewards, refills, rows read) and the writer."""

    def one(differing, bound, overlap=0):
        sampling = {"prompts_per_step": 4, "num_generations": 2, "overlap": overlap}
        sampling |= {"engine": "vllm_server"} if overlap else {}
        run = SimpleNamespace(recipe=recipe_of(rollout=sampling, grpo={"dynamic_sampling": bound}), shard=Shard())

        def score(places, rollouts):
            values = [float(r.token_ids[1] and r.token_ids[0] in differing) for r in rollouts]
            verdicts = {"accuracy": [SimpleNamespace(outcome="correct", seconds=0.0)] * len(rollouts)}
            return Scores(values, {"accuracy": values}, {"accuracy": [False] * len(values)}, [], verdicts)

        def begin_scoring(questions, step):
            return EarlyScores(score, len(questions), early=False)

        profile = SimpleNamespace(untraced=nullcontext)
        writer = Writer(run, Engine(differing), Stream(), Sampling(1), begin_scoring, Stopwatch(), profile)
        batch, scores, refills = refill(run, [], writer, writer.next(1), 1)
        outcomes = gather_outcomes(Shard(), batch.rollouts, scores)
        return batch, compare(run.recipe, [], outcomes), refills, writer

    return one


def test_refills_end_when_there_are_enough(step):
    """Of the first four one has a signal; as many more are asked as a step has; then none has, and four more."""
    batch, advantages, refills, _ = step(differing={1, 8, 9, 10}, bound=5)
    assert refills == 2
    assert [question.prompt for question in batch.questions] == list(range(12))
    assert len(batch.rollouts) == 24
    assert batch.data_position == 12
    assert advantages.has_signal_P.nonzero().flatten().tolist() == [1, 8, 9, 10]
    assert advantages.scored_N.view(12, 2).any(1).tolist() == advantages.has_signal_P.tolist()
    assert [int(advantages.numbers_P[p]) for p in (1, 8, 9, 10)] == [0, 1, 2, 3]


def test_refills_are_bounded(step):
    batch, advantages, refills, _ = step(differing=set(), bound=2)
    assert (refills, len(batch.questions)) == (2, 12)
    assert not advantages.has_signal_P.any()
    assert step(differing=set(), bound=0)[2] == 0


def test_surplus_is_trained(step):
    """Two of four are missing; four are asked, all of which have a signal."""
    _, advantages, refills, _ = step(differing={0, 1, 4, 5, 6, 7}, bound=3)
    assert refills == 1
    assert int(advantages.has_signal_P.sum()) == 6


def test_with_overlap_the_next_batch_is_taken(step):
    batch, _, refills, writer = step(differing={0, 1, 4, 5}, bound=3, overlap=1)
    assert refills == 1
    assert [question.prompt for question in batch.questions] == list(range(8))
    assert batch.data_position == 8
    # A step that is broken off is done again from its own first batch; when it is done, the one after it comes.
    assert [r.token_ids[0] for r in writer.first.rollouts] == [0, 0, 1, 1, 2, 2, 3, 3]
    writer.finish()
    assert writer.first is None
    assert [r.token_ids[0] for r in writer.batch.rollouts[::2]] == [8, 9, 10, 11]


# Rewards of about half of the groups are all 0: by the answer, so that it is the same in every run.
REWARD = """
def sometimes(completions, answer, **columns):
    return [float(len(text) % 5) * (int(a) % 2) for text, a in zip(completions, answer)]
"""


def records(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


@pytest.mark.dist
def test_a_run_in_two_processes_stopped_and_resumed(start, tmp_path):
    """Its parts together are the run."""
    (tmp_path / "mine.py").write_text(REWARD)
    common = ["sail_rl/train_grpo.py", "recipes/quickstart.yaml", *SMALL_GRPO, f"model={start}", "data.eval=null"]
    common += [f"rewards=[{{function: '{tmp_path / 'mine.py'}:sometimes'}}]", "grpo.dynamic_sampling=3"]
    common += ["trainer.save_every=1", "optim.lr_scheduler_type=constant", "optim.warmup_steps=0"]
    common += ["grpo.mini_batches=2", "grpo.top_entropy_quantile=0.5"]
    for name, last in (("whole", 2), ("parts", 1), ("parts", 2)):
        run = (f"output_dir={tmp_path / name}", f"trainer.max_steps={last}")
        result = command(*common, *run, launcher=forked(2))
        assert result.returncode == 0, result.stderr[-5000:]
    whole = records(tmp_path / "whole")
    assert whole == records(tmp_path / "parts")
    assert all(record["groups/refills"] > 0 for record in whole)
    assert all(record["groups/total"] - record["groups/dropped"] >= 4 for record in whole)
