"""Runs with rollout servers, by the real commands: servers that end with the trainer, are killed, or are the user's."""

import json
import socket
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, SMALL_GRPO, command, forked

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

CLOSE = 1e-4  # log-probabilities in float32


STARTER = """
import sys, time
from pathlib import Path
from rollouts.server_link import OwnLink

link = OwnLink(Path(sys.argv[1]), 0)
link.start()
print(link.process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.fault(
    fault="orphans: rollout servers",
    injected="SIGKILL of the trainer, also of one with a stopped server",
    expected="no server is left",
)
def test_servers_die_with_a_trainer_that_is_killed(stopped, tmp_path):
    """While they load, by the pipe from it, and hanging, by the kernel."""
    trainer = subprocess.Popen([sys.executable, "-c", STARTER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    server = psutil.Process(int(trainer.stdout.readline()))
    log = tmp_path / "server_0.log"
    if stopped:
        wait_until(lambda: "waiting for a trainer" in log.read_text(), 100)
        server.suspend()
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE, 100)


@pytest.mark.fault(
    fault="server: port taken",
    injected="a socket that listens there already",
    expected="exit code 2 that names the port",
)
def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = command("-m", "sail_rl.cli", "serve-rollouts", "--port", port)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --host 127.0.0.1 --port {port}: Address already in use")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("how", ["absent", "hanging"])
@pytest.mark.fault(
    fault="server: fails for one of two trainers",
    injected="no server is there, or the first trainer process hangs",
    expected="both end",
)
def test_processes_do_not_wait_for_ever(how, tmp_path):
    """`pytest -m slow tests/test_server_runs.py -k wait_for_ever`

    While the first one tries to reach a server, the other waits, and ends with the same words; if it hangs, the other
    ends with words of its own.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "tests/crew_process.py", str(rank), str(tmp_path), how],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [processes[1].communicate(timeout=200)[0]]
        if how == "absent":
            told.append(processes[0].communicate(timeout=200)[0])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    words = {
        "absent": "BadInput: rollout server http://127.0.0.1:9/start: ConnectionRefusedError",
        "hanging": "RuntimeError: process 1 has lost another one: it has ended, or did nothing for 10 s",
    }
    assert all(one.startswith(words[how]) for one in told), told


def wait_until(done, seconds):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)


def grpo(folder, *changes, launcher=(sys.executable,)):
    """A run whose completions get rewards that differ."""
    (folder / "mine.py").write_text(KILLING)
    changes = ["rollout.engine=vllm_server", f"rewards=[{{function: '{folder / 'mine.py'}:spread'}}]", *changes]
    return command("sail_rl/train_grpo.py", "recipes/quickstart.yaml", *SMALL_GRPO, *changes, launcher=launcher)


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


KILLING = """
from pathlib import Path
import psutil

def servers():
    for trainer in psutil.Process().parents():
        yield from (child.pid for child in trainer.children() if "rollouts.vllm_serving" in child.cmdline())

def spread(completions, trainer_state, **columns):
    named = Path(__file__).with_name("pid")
    if trainer_state.global_step == 2 and named.exists():
        pid = named.read_text() or next(servers())
        named.unlink()
        psutil.Process(int(pid)).kill()
    return [float(sum(map(ord, text)) % 11) for text in completions]
"""


@pytest.mark.slow
@pytest.mark.fault(
    fault="server: killed",
    injected="SIGKILL during a run, real command",
    expected="the run ends well, with the steps of a run without",
)
def test_a_run_whose_server_is_killed(start, tmp_path):
    """The real command: it finishes with the figures of a run that nobody disturbed, and says what happened."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        if folder == killed:
            (folder / "pid").touch()
        result = grpo(folder, f"model={start}", f"output_dir={folder / 'run'}", "trainer.max_steps=4")
        assert result.returncode == 0, result.stderr[-5000:]
    assert "it was killed by signal 9" in result.stderr
    assert result.stderr.count("try 1 of 3: the server is started anew") == 1
    ours, theirs = (
        [{k: v for k, v in r.items() if "second" not in k} for r in records(folder / "run")]
        for folder in (killed, whole)
    )
    assert ours == theirs
    assert all(record["parity/max"] < CLOSE and record["grad_norm"] > 0 for record in ours)
    assert not (killed / "run/server/weights").exists()


@pytest.mark.slow
def test_a_server_of_the_users(start, tmp_path):
    """Started by the documented command; when it stays away the run stops with a checkpoint, and goes on later."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serving = [sys.executable, "-m", "sail_rl.cli", "serve-rollouts", "--port", str(port)]
    changes = [f"model={start}", f"output_dir={tmp_path / 'run'}", f"rollout.server.urls=[http://127.0.0.1:{port}]"]
    changes += ["rollout.server.start_limit=60", "rollout.server.restarts=1", "trainer.max_steps=3"]
    for code in (2, 0):
        server = subprocess.Popen(serving, cwd=ROOT)
        if code:
            (tmp_path / "pid").write_text(str(server.pid))
        result = grpo(tmp_path, *changes)
        server.kill()
        server.wait()
        assert result.returncode == code, result.stderr[-5000:]
        assert "Traceback" not in result.stderr
        if code:
            assert f"rollout server http://127.0.0.1:{port}/start: ConnectionRefusedError" in result.stderr
            assert {folder.name for folder in (tmp_path / "run/checkpoints").iterdir()} == {"latest", "step_2"}
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_share_a_server(start, tmp_path):
    """The losses of one process."""
    for name, launcher in (("one", (sys.executable,)), ("two", forked(2))):
        result = grpo(tmp_path, f"model={start}", f"output_dir={tmp_path / name}", launcher=launcher)
        assert result.returncode == 0, result.stderr[-5000:]
    assert json.loads((tmp_path / "two/environment.json").read_text())["processes"] == 2
    for ours, theirs in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        for name in ("loss", "grad_norm", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6)
        assert ours["completion/length"] == theirs["completion/length"]
        assert theirs["parity/max"] < CLOSE
