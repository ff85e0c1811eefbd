"""The benchmarks on a model of a few thousand weights: both sides do equal work, and every cell is in the result."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import command
from tiny_models import completion_logits
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import contestants, memory, scaled_model, scaling, sft_packing, sft_sides, step, think_fusion, update
from benchmarks.common import Timing, markdown, medians
from benchmarks.flops import costs_of, tower_share, work_of
from benchmarks.turns import own_process, pages_of
from sail_rl.batch import Group, make_batch
from sail_rl.heap import LARGE_PAGES, TUNABLES
from sail_rl.model.sizes import sail_vl2_config

pytestmark = pytest.mark.usefixtures("one_thread", "few_weights")
CELLS = ((256, 8), (384, 5))


@pytest.fixture
def few_weights(monkeypatch):
    """The scaled-down model, scaled down further."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 512}
    monkeypatch.setattr(scaled_model, "VISION", scaled_model.VISION | vision)
    monkeypatch.setattr(scaled_model, "TEXT", scaled_model.TEXT | text)
    monkeypatch.setattr(scaled_model, "VOCABULARY", 512)


def test_update_gives_every_cell(monkeypatch, tmp_path):
    """The whole command; memory is measured in this process."""
    monkeypatch.setattr(update, "CELLS", CELLS)
    monkeypatch.setattr(update, "ROUNDS", 1)
    monkeypatch.setattr(memory, "peak_in_own_process", lambda *cell: memory.measure(*cell) / memory.MEGABYTE)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["update.py", "--json", str(tmp_path / "update.json")])
    update.main()
    result = json.loads((tmp_path / "update.json").read_text())
    assert [(row["prompt"], row["completion"]) for row in result["rows"]] == list(CELLS)
    for row in result["rows"]:
        assert row["seconds"].keys() == row["cpu_seconds"].keys() == set(contestants.VARIANTS)
        assert row["ratio_vs_trl"] == pytest.approx(row["seconds"]["trl"] / row["seconds"]["shared"])
        assert row["theory_vs_trl"] > row["theory_vs_packed"] > 4
        assert 0 < row["memory_ratio"] < 2
    lines = (tmp_path / "update.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in lines if line.startswith(("| 256", "| 384"))] == 2 * [
        [f"| {prompt}", str(completion)] for prompt, completion in CELLS
    ]
    assert "per_device_train_batch_size" in "".join(lines)


def test_equal_work_with_several_groups():
    """Each side cuts the step into micro-batches of its own; prompts and completions are as long as was asked."""
    world = scaled_model.make_world(scaled_model.Cell(256, 8, groups=2))
    assert [len(prompt.token_ids) for prompt in world.prompts] == [256, 256]
    assert len(world.rollouts) == 16
    assert (min(world.lengths), max(world.lengths)) == (3, 8)
    sides = {name: contestants.make_contestant(name, world) for name in ("trl", "padded")}
    outcomes = {name: side.step() for name, side in sides.items()}
    assert outcomes["trl"].grad_norm > 0.01
    assert contestants.check_equal_work(sides, outcomes)["padded"] < 1e-5


def test_unequal_work_is_refused():
    """A side that trains on other rewards, and one whose numbers agree but not its gradient."""
    world = scaled_model.make_world(scaled_model.Cell(256, 4))
    other = copy.copy(world)
    object.__setattr__(other, "rewards_N", world.rewards_N.flip(0))
    sides = {name: contestants.make_contestant(name, side) for name, side in (("trl", world), ("padded", other))}
    outcomes = {name: side.step() for name, side in sides.items()}
    with pytest.raises(RuntimeError, match="unequal work"):
        contestants.check_equal_work(sides, outcomes)
    with pytest.raises(RuntimeError, match="unequal work"):
        contestants.check_equal_work(sides, outcomes | {"padded": outcomes["trl"]})


def test_flops_are_those_that_torch_counts():
    """Of a padded batch, whose attention computes the whole square."""
    world = scaled_model.make_world(scaled_model.Cell(256, 8))
    batch = make_batch([Group(world.prompts[0], [rollout.token_ids for rollout in world.rollouts])])
    world.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        completion_logits(world.model, batch)
    work = work_of("padded", 256, world.lengths, world.tiles)
    square = len(world.lengths) * batch.input_ids_RT.shape[1] ** 2
    costs = costs_of(world.model.config)
    expected = work.flops(costs) + (square - work.pairs) * costs.pair
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_theory_by_hand():
    """One tile; a prompt of 10 tokens; completions of 2 and 4."""
    shared, packed, padded, trl = (work_of(name, 10, [2, 4], 1) for name in ("shared", "packed", "padded", "trl"))
    assert (shared.tiles, shared.tokens, shared.pairs, shared.scored) == (1, 16, 55 + 23 + 50, 6)
    assert (packed.tiles, packed.tokens, packed.pairs, packed.scored) == (2, 26, 78 + 105, 6)
    assert (padded.tiles, padded.tokens, padded.pairs, padded.scored) == (2, 28, 105 + 105, 10)
    assert (trl.tiles, trl.tokens, trl.pairs, trl.scored) == (2, 28, 105 + 105, 26)
    assert tower_share(sail_vl2_config("2b")) == pytest.approx(2.1, abs=0.05)


def test_the_scaled_model_has_the_share_of_the_2b(monkeypatch):
    monkeypatch.undo()
    config = scaled_model.scaled_config(scaled_model.scaled_processor())
    assert tower_share(config) == pytest.approx(tower_share(sail_vl2_config("2b")), rel=0.05)


def test_memory_grows_with_the_batch():
    few, many = (memory.measure("padded", 256, completion) for completion in (8, 256))
    assert few < many


def test_scaling_gives_every_point(monkeypatch, tmp_path):
    """The whole command; theory is that of the shapes which were measured."""
    monkeypatch.setattr(scaling, "MIDDLE", {"prompt": 256, "completion": 8, "size": 4, "tiles": 2, "depth": 1})
    axes = {"prompt": (256, 384), "completion": (8, 16), "size": (2, 4), "tiles": (2,), "depth": (1, 2)}
    monkeypatch.setattr(scaling, "AXES", axes)
    monkeypatch.setattr(scaling, "measure_processes", lambda rounds: [])  # has a test of its own
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--short", "--json", str(tmp_path / "scaling.json")])
    scaling.main()
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [(row["axis"], row["value"]) for row in rows] == [(axis, v) for axis, values in axes.items() for v in values]
    theory = {(row["axis"], row["value"]): row["theory"] for row in rows}
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 and row["gflop"] > 0 for row in rows)
    for row in rows:
        if row["value"] == scaling.MIDDLE[row["axis"]]:
            assert row["growth"] == row["theory"] == 1
    assert 1.3 < theory["prompt", 384] < 1.8  # five tiles instead of three
    # Head, adapter and embedding of patches, a third of this model, stay single.
    assert theory["depth", 2] == pytest.approx(1.6895, abs=1e-4)
    assert theory["size", 2] < 1 < theory["completion", 16]
    assert "| depth | 2 |" in (tmp_path / "scaling.md").read_text()


def test_packed_and_padded_sft_do_equal_work(monkeypatch, tmp_path):
    """The whole command: text alone and pictures, padded by TRL and packed by us."""
    monkeypatch.setattr(sft_packing, "SHORT_SAMPLES", 4)
    monkeypatch.setattr(sft_packing, "TRL_BATCH", 2)
    monkeypatch.setattr(sft_sides, "TOKEN_BUDGET", 700)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["sft_packing.py", "--short", "--json", str(tmp_path / "packing.json")])
    sft_packing.main()
    result = json.loads((tmp_path / "packing.json").read_text())
    rows = {row["variant"]: row for row in result["rows"]}
    assert rows.keys() > {sft_packing.BASE, sft_packing.OURS}
    assert rows[sft_packing.BASE]["padding"] > 0.1
    assert rows[sft_packing.OURS]["padding"] == rows["TRL, single samples"]["padding"] == 0
    for row in rows.values():
        assert row["samples_per_second"] == pytest.approx(4 / row["seconds"])
        assert row["difference"] < 1e-5
    for row in result["spread"]:
        assert row["tiles_before"] > row["tiles_after"] < 1.05
        assert row["tokens_before"] > row["tokens_after"] < 1.05
    assert "| ours, packed |" in (tmp_path / "packing.md").read_text()


def test_unequal_sft_is_refused():
    """A side that trains on other answers."""
    world = sft_sides.make_sft_world([sft_sides.Shape(2, 5, 4), sft_sides.Shape(0, 9, 6)])
    other = copy.copy(world)
    object.__setattr__(other, "groups", [world.groups[0], replace(world.groups[1], completions=[[5] * 6])])
    ours, theirs = sft_sides.our_side(other, "packed"), sft_sides.trl_side(world, 2)
    with pytest.raises(RuntimeError, match="unequal work"):
        sft_sides.relative_difference(ours, ours.step(), theirs, theirs.step())


@pytest.mark.dist
def test_two_processes_share_an_update():
    assert min(scaling.seconds_of_processes(2, rounds=1)) > 0
    assert scaling.PROCESSES == (1, 2)


def test_medians_and_tables():
    runs = {"trl": [Timing(9.0, 1.0), Timing(1.0, 3.0), Timing(2.0, 2.0)], "shared": [Timing(1.0, 1.0)]}
    assert medians(runs, "wall") == {"trl": 2.0, "shared": 1.0}
    assert medians(runs, "cpu") == {"trl": 2.0, "shared": 1.0}
    assert update.ratios({"trl": 6.0, "shared": 2.0}, "ratio") == {"ratio_vs_trl": 3.0, "ratio_vs_packed": None}
    assert update.ratios({"trl": 6.0, "shared": 2.0, "packed": 5.0}, "ratio")["ratio_vs_packed"] == 2.5
    assert markdown([{"a": 1.234, "b": None}], {"a": "first", "b": "second"}).splitlines()[-1] == "| 1.23 | - |"


def in_this_process(sides, rounds, warm_up):
    """The sides' steps, which see what a test has changed."""
    made = {name: make_step(*arguments) for name, (make_step, *arguments) in sides.items()}
    return {name: [own() for _ in range(rounds + warm_up)][warm_up:] for name, own in made.items()}


def test_a_whole_step_of_both_sides(monkeypatch, tmp_path):
    """The long prompts, from pictures in files to the optimizer step."""
    monkeypatch.setattr(step, "SHORT_RESULTS", tmp_path)
    monkeypatch.setattr(step, "LONG_PROMPT", 256)
    monkeypatch.setattr(step, "LONG_COMPLETION", 4)
    monkeypatch.setattr(step, "take_turns", in_this_process)
    row = step.measure("long prompts", step.long_task, short=True, vllm=False)
    assert row["rollouts"] == 16
    for phases in row["seconds"].values():
        assert phases.keys() == {"rollout", "reward", "update"}
        assert min(phases.values()) > 0
    seconds = {side: sum(phases.values()) for side, phases in row["seconds"].items()}
    assert row["ratio_vs_trl"] == pytest.approx(seconds["trl"] / seconds["ours"])
    lines = step.phase_table([row]).splitlines()
    sides = [*row["seconds"], "TRL / ours"]
    assert sides[:2] == ["ours", "trl"]
    assert [line.split(" | ")[1] for line in lines[-len(sides) :]] == sides


@pytest.mark.slow
def test_learning_curves(monkeypatch, tmp_path, start):
    """Both training loops, from one checkpoint, evaluated at the same numbers of rollouts."""
    from benchmarks import learning_curve

    monkeypatch.setattr(learning_curve, "EVAL_EVERY", 1)
    monkeypatch.setattr(learning_curve, "QUESTIONS", 200)
    monkeypatch.setattr(learning_curve, "SHORT_RESULTS", tmp_path)
    monkeypatch.setattr(learning_curve, "SHORT_STEPS", 2)
    monkeypatch.setattr(learning_curve, "sft_start", lambda seed, short: start)
    points = learning_curve.curve([3], short=True)
    assert [point["rollouts"] for point in points] == 2 * [0, 128, 256]
    assert [point["side"] for point in points] == 3 * ["ours"] + 3 * ["trl"]
    assert points[0]["accuracy"] == points[3]["accuracy"]  # the same model, questions and judge
    assert learning_curve.curve([3], short=True) == points  # from the files
    assert "| 256 |" in learning_curve.curve_table(points)


def test_sides_end_with_a_benchmark_that_is_killed(tmp_path):
    """They held gigabytes each until someone noticed."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal\nfrom benchmarks.turns import own_process\nif __name__ == '__main__':\n"
        "    print(own_process().submit(os.getpid).result(), flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = command(script)
    assert result.returncode == -signal.SIGKILL, result.stderr
    command_line = Path(f"/proc/{result.stdout.strip()}/cmdline")  # empty once it has ended and nobody has asked how
    deadline = time.monotonic() + 30
    while (is_there := command_line.exists() and command_line.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_there


def test_large_pages_are_asked_for_our_sides_alone(monkeypatch):
    """TRL's trainer does not ask for them, and is slower with them."""
    monkeypatch.setenv(TUNABLES, LARGE_PAGES)
    told = {}
    for side in ("trl", "shared"):
        with pages_of(side), own_process() as process:
            told[side] = process.submit(os.getenv, TUNABLES).result()
        assert os.environ[TUNABLES] == LARGE_PAGES
    assert told == {"trl": None, "shared": LARGE_PAGES}
    monkeypatch.setenv(TUNABLES, "glibc.malloc.perturb=0")  # a user's own holds for everybody
    with pages_of("trl"):
        assert os.environ[TUNABLES] == "glibc.malloc.perturb=0"


def test_how_far_two_curves_are_apart():
    """Three seeds by hand; the noise is that of a difference of two means."""
    from benchmarks.learning_curve import curve_line

    accuracies = {"ours": (0.5, 0.6, 0.7), "trl": (0.4, 0.6, 0.8)}
    points = [
        {"side": side, "rollouts": 512, "accuracy": accuracy, "seconds": 3.0}
        for side, three in accuracies.items()
        for accuracy in three
    ]
    line = curve_line(points)
    assert (line["ours"], line["trl"], line["difference"]) == ("0.600 ± 0.100", "0.600 ± 0.200", "+0.000")
    assert float(line["two standard errors"]) == pytest.approx(2 * (0.05 / 3) ** 0.5, abs=1e-3)


def test_table_of_the_quickstart_s_time():
    """Each run, a median of each code, and how many times faster it is now."""
    from benchmarks.quickstart_time import table

    rows = [{"code": code, "grpo": seconds} for code, seconds in [("before", 8.0), ("now", 2.0), ("before", 4.0)]]
    lines = table({"before": "5cd1344", "rows": rows}).splitlines()
    assert lines[-3:] == ["| before, median | 6.00 |", "| now, median | 2.00 |", "| before / now | 3.00 |"]


@pytest.mark.slow
def test_the_quickstart_s_time(tmp_path):
    """The short form against the last commit; the worktree it made is gone afterwards."""
    result = command("benchmarks/quickstart_time.py", "HEAD", "--short", "--json", tmp_path / "time.json")
    assert result.returncode == 0, result.stderr[-5000:]
    rows = json.loads((tmp_path / "time.json").read_text())["rows"]
    assert [row["code"] for row in rows] == ["before", "now"]
    for row in rows:
        assert all(0 < row[f"{stage} training"] < row[f"{stage} command"] for stage in ("sft", "grpo"))
    trees = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert "/before" not in trees


@pytest.mark.slow
@pytest.mark.vllm
def test_rollouts_of_every_engine(tmp_path):
    """The short form, as a command."""
    result = command("benchmarks/rollout_speed.py", "--short", "--json", tmp_path / "rollouts.json")
    assert result.returncode == 0, result.stderr[-5000:]
    rows = json.loads((tmp_path / "rollouts.json").read_text())["rows"]
    assert [row["engine"] for row in rows] == ["hf", "vllm_colocate", "vllm_colocate", "TRL's vLLM"]
    assert [row["dtype"] for row in rows] == ["float32", "float32", "bfloat16", "bfloat16"]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["rollouts"] * row["completion"] / row["seconds"])
        assert (row["push"] is None) == (row["engine"] == "hf")


def test_answers_by_mode_and_question_and_what_they_show():
    """Two seeds by hand: means, a difference in points and its noise."""
    answered = [
        {"kind": mode, "needs_thinking": two_steps, "correct": n < right}
        for (mode, two_steps), right in {("direct", False): 4, ("direct", True): 1, ("cot", False): 3}.items()
        for n in range(4)
    ]
    cells = think_fusion.cells([*answered, {"kind": "cot", "needs_thinking": True, "correct": True}])
    expected = {"direct, one look": 1, "direct, two steps": 0.25, "thinking, one look": 0.75, "thinking, two steps": 1}
    assert cells == expected
    rows = [{"seed": seed, "name": name} | cells for seed in (0, 1) for name in think_fusion.NAMES]
    rows[0] = rows[0] | {"direct, two steps": 0.75}  # basic SFT, seed 0
    averages = think_fusion.means(rows)
    assert (averages[0]["direct, two steps"], averages[0]["seeds"]) == (0.5, 2)
    claims = think_fusion.claims(averages, 1000)
    assert claims[0]["points"] == 50  # LongCoT, thinking, over basic SFT, direct
    assert claims[0]["noise"] == pytest.approx(200 * (0.25 / 1000) ** 0.5)  # 2 x 500 questions; the other has no spread
    assert [claim["points"] for claim in claims[2:4]] == [0, 0]
    assert claims[4]["points"] == -25
    assert "| soup of the two | 100.00 | 25.00 |" in think_fusion.report(rows, 1000)


@pytest.mark.slow
def test_every_stage_of_think_fusion(monkeypatch, tmp_path):
    """pytest -m slow tests/test_benchmarks.py -k stage: two steps of each, and nothing is run twice."""
    monkeypatch.setattr(think_fusion, "SHORT_RESULTS", tmp_path)
    rows = think_fusion.run_seed(0, short=True)
    assert [row["name"] for row in rows] == [*think_fusion.STEPS, "soup"]
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.jsonl")}
    assert think_fusion.run_seed(0, short=True) == rows
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.jsonl")} == written
