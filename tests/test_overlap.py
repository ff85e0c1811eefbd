"""Batches that are written ahead: by which weights, in what order, and again after a stop in the middle."""

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import SMALL_GRPO, command

from rewards.score import Scores
from rollouts import Rollout, Sampling
from sail_rl.checkpoint import Progress
from sail_rl.command_line import BadInput
from sail_rl.data.stream import Shard
from sail_rl.early_scores import EarlyScores
from sail_rl.metrics import Stopwatch
from sail_rl.overlap import Writer


class Engine:
    """Writes at once, or when it is asked to finish: each completion is its prompt and the weights' version."""

    version = 0
    begun: list | None = None

    def begin(self, prompts, group_size, sampling, finished):
        assert self.begun is None
        self.begun = [Rollout([p], [0.0], "", "stop", self.version) for p in prompts for _ in range(group_size)]
        for place in reversed(range(len(prompts))):
            finished(place, self.begun[place * group_size : (place + 1) * group_size])
        return self.begun

    def finish(self, pending):
        assert pending is self.begun
        self.begun = None
        return pending

    def generate(self, *asked):
        return self.finish(self.begin(*asked))

    def load_weights(self, version):
        assert self.begun is None, "weights change while completions are written"
        self.version = version


class Stream:
    position = 0

    def next_items(self, count):
        self.position += count
        return [SimpleNamespace(prompt=place) for place in range(self.position - count, self.position)]


def begin_scoring(questions, step):
    """The score of a completion is its prompt, and the step that it is for."""

    def score(places, rollouts):
        values = [(rollout.token_ids[0], step) for rollout in rollouts]
        return Scores(values, {}, {}, [])

    return EarlyScores(score, len(questions), early=step % 2)


def begin(overlap, progress=None, shard=None):
    """A writer as train_grpo.py makes it, and its engine."""
    progress = progress or Progress()
    rollout = SimpleNamespace(overlap=overlap, prompts_per_step=2, num_generations=2)
    run = SimpleNamespace(recipe=SimpleNamespace(rollout=rollout), shard=shard or Shard())
    engine, stream, profile = Engine(), Stream(), SimpleNamespace(untraced=nullcontext)
    stream.position = progress.data_position
    engine.load_weights(progress.step)
    writer = Writer(run, engine, stream, Sampling(1), begin_scoring, Stopwatch(), profile)
    writer.take_up(progress)
    return writer, engine, progress


def steps(writer, engine, progress, until):
    """Of each step: the prompts, and the versions that wrote their completions; at last what a checkpoint records."""
    trained = []
    for step in range(progress.step + 1, until + 1):
        batch = writer.next(step)
        assert batch.scoring.result().totals == [(q.prompt, step) for q in batch.questions for _ in range(2)]
        assert len(batch.rollouts) == 2 * len(batch.questions)
        assert [rollout.token_ids[0] for rollout in batch.rollouts[::2]] == [q.prompt for q in batch.questions]
        trained.append(([q.prompt for q in batch.questions], {rollout.weight_version for rollout in batch.rollouts}))
        progress = progress.after(step=step, data_position=batch.data_position)
        writer.finish()
        engine.load_weights(step)
    return trained, writer.recorded(progress)


PROMPTS = [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(("overlap", "versions"), [(0, [0, 1, 2, 3]), (1, [0, 0, 1, 2])])
def test_which_weights_write(overlap, versions):
    trained, recorded = steps(*begin(overlap), until=4)
    assert trained == [(prompts, {version}) for prompts, version in zip(PROMPTS, versions, strict=True)]
    assert recorded.data_position == 8
    assert [told["weight_version"] for told in recorded.written_ahead] == [3] * (4 * overlap)


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_trains_on_the_same(overlap, stop):
    whole, end = steps(*begin(overlap), until=4)
    first, recorded = steps(*begin(overlap), until=stop)
    recorded = Progress(**json.loads(json.dumps(vars(recorded))))
    second, same_end = steps(*begin(overlap, recorded), until=4)
    assert first + second == whole
    assert same_end == end


def test_a_step_that_is_broken_off_is_done_again():
    """Its own completions are recorded, not those that were begun for the step after it."""
    writer, engine, progress = begin(1)
    whole, _ = steps(*begin(1), until=4)
    first, after = steps(writer, engine, progress, until=1)
    writer.next(2)  # the second step's, whose reward fails
    second, _ = steps(*begin(1, writer.recorded(replace(after, written_ahead=[]))), until=4)
    assert first + second == whole


def test_processes_record_all_completions_and_take_up_their_own():
    both = [{**vars(Rollout([place], [0.0], "", "stop", 0))} for place in (0, 0, 1, 1)]
    writer, _, _ = begin(1, Progress(step=1, data_position=0, written_ahead=both), Shard(1, 2))
    assert [rollout.token_ids for rollout in writer.batch.rollouts] == [[1], [1]]


def test_an_engine_that_gives_up_leaves_no_half_batch():
    writer, engine, progress = begin(1)
    writer.next(1)

    def give_up(pending):
        raise BadInput("the server is gone")

    engine.finish = give_up
    with pytest.raises(BadInput, match="the server is gone"):
        writer.finish()
    assert writer.recorded(progress.after(step=1)).written_ahead == []


def records(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(500)
def test_a_real_run_stopped_and_resumed(start, tmp_path):
    """The figures of one that was not stopped. Only the first step trains on completions of the newest weights."""
    (tmp_path / "mine.py").write_text(
        "def spread(completions, **columns):\n    return [float(sum(map(ord, text)) % 11) for text in completions]\n"
    )
    changes = [*SMALL_GRPO, f"model={start}", "rollout.engine=vllm_server", "rollout.overlap=1"]
    changes += ["optim.lr_scheduler_type=constant", "optim.warmup_steps=0", "optim.learning_rate=1e-3"]
    changes += ["trainer.save_every=1", f"rewards=[{{function: '{tmp_path / 'mine.py'}:spread'}}]"]
    for name, last in (("whole", 4), ("parts", 2), ("parts", 4)):
        run = (f"output_dir={tmp_path / name}", f"trainer.max_steps={last}")
        result = command("sail_rl/train_grpo.py", "recipes/quickstart.yaml", *changes, *run)
        assert result.returncode == 0, result.stderr[-5000:]
    assert records(tmp_path / "whole") == records(tmp_path / "parts")
    gaps = [record["parity/max"] for record in records(tmp_path / "whole")]
    assert gaps[0] < 1e-4 < 1e-2 < min(gaps[1:])
