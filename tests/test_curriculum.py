"""Prompts chosen by their pass rates: how likely each is asked, and that a stopped run goes on as if it had not."""

import json
from types import SimpleNamespace

import pytest
from conftest import SMALL_GRPO, command

from sail_rl.config_data import CurriculumSection
from sail_rl.data.curriculum import Curriculum
from sail_rl.data.mixture import JoinedRows, Part
from sail_rl.data.stream import RowStream, Shard
from sail_rl.questions import give_curriculum, note_passes

GROUP, ROWS, ASKED = 4, 10, 5
# Rows 0 to 3 are always solved, 4 to 7 never, 8 and 9 by half of the completions.
PASSES = [[1.0] * GROUP] * 4 + [[0.0] * GROUP] * 4 + [[1.0, 0.0, 1.0, 0.0]] * 2


@pytest.mark.parametrize(
    ("rate", "expected"), [(None, 1.0), (0.0, 0.1), (1.0, 0.1), (0.5, 7 / 8), (0.75, 1 - 0.75**4 - 0.25**4)]
)
def test_a_prompt_is_asked_as_likely_as_its_group_would_differ(rate, expected):
    curriculum = Curriculum(GROUP, least_share=0.1, seed=0)
    if rate is not None:
        curriculum.rates[7] = rate
    assert curriculum.probability(7) == pytest.approx(expected)
    asked = sum(curriculum.wants(position, 7) for position in range(4000)) / 4000
    assert asked == pytest.approx(expected, abs=0.03)  # the same in every run


def test_rates_run_and_leave_out_what_has_no_verdict():
    curriculum = Curriculum(GROUP, 0.1, 0)
    curriculum.note([3, 5], [1.0, 0.0, None, 0.0, None, None, None, None])
    assert curriculum.rates == {3: pytest.approx(1 / 3)}
    curriculum.note([3], [1.0] * GROUP)
    assert curriculum.rates == {3: pytest.approx(2 / 3)}


class Rows:
    """Rows of a source in memory."""

    name, folder, checked_at_start = "rows", None, 0

    def __len__(self):
        return ROWS

    def row(self, number):
        return {"question": str(number), "answer": "1"}


def begin(position=0, rates=()):
    """A stream with a curriculum, as train_grpo.py makes it, and the run."""
    section = SimpleNamespace(curriculum=CurriculumSection())
    recipe = SimpleNamespace(data=section, rollout=SimpleNamespace(num_generations=GROUP), seed=0)
    run = SimpleNamespace(recipe=recipe, shard=Shard())
    keys = {"seed": 0, "shuffle": True, "max_bad_rows": 0, "quarantine_file": None, "shard": Shard()}

    def prepare(example, place):
        return SimpleNamespace(row=int(example.question), prompt=SimpleNamespace(seed=place))

    stream = RowStream(JoinedRows([Part(Rows())]), prepare, **keys)
    stream.position = position
    give_curriculum(run, stream, dict(rates))
    return run, stream


def steps(run, stream, count):
    """The rows that each step asks, and where the run stands after it."""
    asked = []
    for _ in range(count):
        questions = stream.next_items(ASKED)
        rates = note_passes(run, stream, questions, [value for q in questions for value in PASSES[q.row]])
        asked.append(([q.row for q in questions], stream.position, rates))
    return asked


def test_the_first_pass_asks_all_and_later_ones_what_differs():
    asked = steps(*begin(), count=40)
    rows = [row for step, *_ in asked for row in step]
    assert sorted(rows[:ROWS]) == list(range(ROWS))
    assert {row: rate for row, rate in asked[1][2].items() if row > 7} == {8: 0.5, 9: 0.5}
    later = rows[ROWS:]
    assert sum(row > 7 for row in later) / len(later) > 0.5  # a fifth of the rows
    assert set(later) == set(range(ROWS))  # and none is forgotten
    assert asked[-1][1] > 2 * len(rows)  # at so many places it stood


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_a_stopped_run_goes_on_as_if_it_had_not(stop):
    whole = steps(*begin(), count=10)
    first = steps(*begin(), count=stop)
    _, position, rates = first[-1]
    assert first + steps(*begin(position, rates), count=10 - stop) == whole


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_real_run_stopped_and_resumed(start, mixed_rows, tmp_path):
    """In its second pass over 16 rows some are passed over, and the figures are those of one that was not stopped."""
    reward = mixed_rows / "passes.py"
    reward.write_text(
        "def passes(completions, answer, **columns):\n"
        "    return [[0.0, 1.0, float(len(t) % 2)][int(a) % 3] for t, a in zip(completions, answer)]\n"
    )
    common = [*SMALL_GRPO, f"model={start}", "data.eval=null", f"data.train={mixed_rows / 'rows.jsonl'}"]
    common += [f"rewards=[{{function: '{reward}:passes'}}]", "data.curriculum={reward: passes}"]
    common += ["optim.lr_scheduler_type=constant", "optim.warmup_steps=0", "trainer.save_every=1"]
    for name, last in (("whole", 8), ("parts", 6), ("parts", 8)):
        run = (f"output_dir={tmp_path / name}", f"trainer.max_steps={last}")
        result = command("sail_rl/train_grpo.py", "recipes/quickstart.yaml", *common, *run)
        assert result.returncode == 0, result.stderr[-5000:]
    whole, parts = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    assert all(record["data/passed_over"] == 0 for record in whole[:4])
    assert sum(record["data/passed_over"] for record in whole[4:]) > 4
    for ours, theirs in zip(whole, parts, strict=True):
        assert {k: v for k, v in ours.items() if "second" not in k} == {
            k: v for k, v in theirs.items() if "second" not in k
        }
