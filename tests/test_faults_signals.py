"""Signals to a run: it ends with everything saved, whatever it was at, and goes on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from pkgutil import resolve_name

import psutil
import pytest
from conftest import ROOT, torchrun
from safetensors.torch import load_file

from sail_rl import stopping
from sail_rl.command_line import load_recipe
from sail_rl.config import GrpoRecipe, SftRecipe
from sail_rl.data.stream import Shard
from sail_rl.launch import run_recipe
from sail_rl.stopping import PREEMPTED, Asked, GivenUp

pytestmark = pytest.mark.usefixtures("one_thread", "signals_as_before")
STEPS = 3
SFT = ["sft.samples_per_step=2", "sft.max_completion_length=4"]
GRPO = ["model={random_init: tiny}", "rollout.prompts_per_step=2", "rollout.num_generations=2"]
GRPO += ["rollout.max_completion_length=4", "grpo.beta=0.1"]
COMMON = [f"trainer.max_steps={STEPS}", "data.eval.rows=2", "trainer.eval_every=2", "trainer.save_every=100"]
# Where the signal comes: what is patched, at which of its calls, and the step that is saved.
PLACES = {
    "sft": {
        "start": ("sail_rl.optimizer.make_optimizer", 1, 0),
        "update": ("sail_rl.update_sft.update_supervised", 2, 2),
        "evaluation": ("sail_rl.eval.judge", 1, 2),
        "save": ("sail_rl.checkpoint.save_whole", 1, 3),
    },
    "grpo": {
        "completions": ("rollouts.hf.HFEngine._generate_batch", 4, 1),
        "update": ("sail_rl.update.update_policy", 2, 2),
    },
}
SELDOM = (("sft", "start"), ("sft", "save"), ("grpo", "update"))  # in the slow tests


def recipe_of(trainer, folder):
    kind, name, overrides = (SftRecipe, "quickstart_sft", SFT) if trainer == "sft" else (GrpoRecipe, "quickstart", GRPO)
    return load_recipe(kind, ROOT / f"recipes/{name}.yaml", [*COMMON, *overrides, f"output_dir={folder}"])


def run(trainer, folder):
    """A run, in this process."""
    import sail_rl.train_grpo
    import sail_rl.train_sft

    run_recipe(getattr(sail_rl, f"train_{trainer}").train, recipe_of(trainer, folder))


def outcome(folder):
    """What a run computes: figures that are no times, and the final weights."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = [[record["step"], record["loss"], record["grad_norm"]] for record in records]
    return figures, load_file(folder / "final/model.safetensors")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Of each trainer an uninterrupted run, made when first asked for."""
    folders = {}

    def of(trainer):
        if trainer not in folders:
            folders[trainer] = tmp_path_factory.mktemp(trainer)
            run(trainer, folders[trainer])
        return outcome(folders[trainer])

    return of


@pytest.mark.parametrize(
    ("trainer", "place"),
    [
        pytest.param(trainer, place, marks=[pytest.mark.slow] if (trainer, place) in SELDOM else [])
        for trainer in PLACES
        for place in PLACES[trainer]
    ],
)
@pytest.mark.fault(
    fault="signal: SIGTERM at the start, among completions, in an update, in an evaluation, in a save",
    injected="to the trainer's own process, in the place itself",
    expected="exit code 75; the same command goes on to bit-equal losses and weights",
)
def test_a_signal_loses_nothing(trainer, place, straight, tmp_path, monkeypatch, capsys):
    patched, call, saved = PLACES[trainer][place]
    calls, real = [], resolve_name(patched)

    def interrupted(*arguments, **named):
        calls.append(place)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **named)

    monkeypatch.setattr(patched, interrupted)
    with pytest.raises(SystemExit) as end:
        run(trainer, tmp_path)
    assert end.value.code == PREEMPTED
    assert [folder.name for folder in (tmp_path / "checkpoints").glob("step_*")] == [f"step_{saved}"] * (saved > 0)
    told = capsys.readouterr().out
    assert ("goes on from the newest checkpoint" if saved else "begins anew") in told
    monkeypatch.undo()
    Asked.number = None
    run(trainer, tmp_path)
    (figures, weights), (expected, expected_weights) = outcome(tmp_path), straight(trainer)
    assert figures == expected
    assert all((weights[name] == tensor).all() for name, tensor in expected_weights.items())


@pytest.mark.fault(
    fault="signal: one that reaches one process of several",
    injected="to the other one",
    expected="both learn of it at the end of the step, and in an evaluation after a batch",
)
def test_processes_stop_together():
    assert not stopping.asked(Shard(0, 2, lambda own: [*own, False]))
    assert stopping.asked(Shard(0, 2, lambda own: [*own, True]))
    with pytest.raises(GivenUp):
        stopping.give_up_if_asked(Shard(0, 2, lambda own: [*own, True]))


SECOND = """
import sys, time
from sail_rl import stopping
stopping.listen()
with stopping.waiting():
    print("ready", flush=True)
    time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.fault(
    fault="signal: a second one",
    injected="while the first waits for the end of the step; once at the same time, as launchers send it, once later",
    expected="the doubled one counts as one; the later one ends the process at once",
)
def test_a_second_signal_ends_at_once(number):
    process = subprocess.Popen([sys.executable, "-c", SECOND], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    process.stderr.readline()
    assert number.name.encode() in process.stderr.readline()
    process.send_signal(number)
    time.sleep(2 * stopping.TOGETHER)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(60) == -number
    process.communicate()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.fault(
    fault="signal: SIGTERM to one of two trainers",
    injected="to the second process of a real run, by its number",
    expected="both end after the same step with code 75, which the launcher shows; nothing is left running",
)
def test_a_real_run_of_two_processes(tmp_path):
    overrides = [*SFT, "data.eval=null", "trainer.max_steps=100000", f"output_dir={tmp_path / 'run'}"]
    arguments = [*torchrun(2), "sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", *overrides]
    launcher = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.is_file() or metrics.read_text().count("\n") < 3:
        assert launcher.poll() is None, launcher.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    trainers = {rank_of(process): process for process in psutil.Process(launcher.pid).children()}
    assert sorted(trainers) == ["0", "1"]
    trainers["1"].send_signal(signal.SIGTERM)
    told, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert "exitcode  : 75" in errors
    assert "ended by a signal; the same command goes on" in told
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert [folder.name for folder in (tmp_path / "run/checkpoints").glob("step_*")] == [f"step_{last}"]
    assert not psutil.wait_procs(trainers.values(), timeout=60)[1]


def rank_of(process):
    return process.environ().get("RANK")


STAGE = """
import signal, subprocess, sys, time
trainer = '''
import signal, sys, time
def save(number, frame):
    time.sleep(2)
    open(sys.argv[1], "w").write(str(number))
    sys.exit(75)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(300)
'''
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.exit(subprocess.call([sys.executable, "-c", trainer, sys.argv[1]]))
"""
PIPELINE = """
import sys, signal
from sail_rl import pipeline
signal.signal(signal.SIGTERM, signal.default_int_handler)
pipeline.LAUNCH[:] = [sys.executable, "-c", sys.argv[1]]
pipeline.run_command("stage", pipeline.Command(list(pipeline.LAUNCH), [sys.argv[2]]), "the same command")
"""


@pytest.mark.fault(
    fault="signal: SIGTERM to `sail-rl pipeline`",
    injected="while a stage's trainer runs behind its launcher",
    expected="the trainer alone is told, once, and waited for until it has saved",
)
def test_a_pipeline_lets_its_stage_save(tmp_path):
    words = [sys.executable, "-c", PIPELINE, STAGE, str(tmp_path / "saved")]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert any(line == "ready\n" for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    assert "interrupted in stage; `the same command` goes on from there" in process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGINT))
