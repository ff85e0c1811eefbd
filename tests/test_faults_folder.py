"""Two runs in one folder: the second is refused, and the lock ends with its process, however that ends."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from sail_rl import run_lock
from sail_rl.command_line import BadInput
from sail_rl.data.stream import Shard
from sail_rl.launch import make_folder

HOLDER = """
import sys, time
from pathlib import Path
from sail_rl.run_lock import hold
assert hold(Path(sys.argv[1])) is None
print("held", flush=True)
time.sleep(300)
"""


def told_by_first(told):
    """What a gather gives when the first process has this to say."""
    return lambda own: [told, *own]


@pytest.mark.fault(
    fault="run folder: two launches on one output_dir",
    injected="a second process while the first holds the folder; the first then ends by SIGKILL",
    expected="the second is refused with host and process; nothing is written; after the kill it may begin",
)
def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE)
    assert first.stdout
    assert first.stdout.readline() == b"held\n"
    shard = Shard()
    second = SimpleNamespace(folder=tmp_path, shard=shard, is_main=True, recipe=None)
    with pytest.raises(BadInput) as refused:
        make_folder(second)
    assert f"output_dir = {tmp_path}: process {first.pid} on {platform.node()} is at work there" in str(refused.value)
    assert [file.name for file in tmp_path.iterdir()] == [run_lock.NAME]
    first.kill()
    first.communicate()
    assert run_lock.hold(tmp_path) is None
    assert run_lock.hold(tmp_path) is None  # a process does not keep itself out
    run_lock.HELD.pop(tmp_path.resolve()).close()


@pytest.mark.fault(
    fault="run folder: two launches on one output_dir, each of several processes",
    injected="the first process of the second launch is refused",
    expected="the others end with it, and do not wait",
)
def test_all_processes_of_a_second_run_are_refused(tmp_path):
    other = SimpleNamespace(folder=tmp_path, shard=Shard(1, 2, told_by_first("it is held")), is_main=False, recipe=None)
    with pytest.raises(BadInput, match="it is held"):
        make_folder(other)


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def unknown(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", unknown)
    assert run_lock.hold(tmp_path) is None
    assert "is not locked against a second run: [Errno 38] Function not implemented" in capsys.readouterr().err
    run_lock.HELD.pop(tmp_path.resolve()).close()
