"""Checkpoints on the disk: whole or named, the newest and the best kept, and saves that fail."""

import os
import resource
import shutil
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue
from threading import Barrier, Thread
from types import SimpleNamespace

import pytest
import torch
from conftest import command
from tiny_models import dense, processor_for_questions

from sail_rl.checkpoint import MOST_FAILED, Progress, Saver, load_progress, newest_checkpoint, note_final_accuracy
from sail_rl.checkpoint_folder import (
    MANIFEST,
    begin_folder,
    complete_folder,
    fault_of,
    files_of,
    keep_newest,
    list_checkpoints,
    newest_whole,
    read_manifest,
)
from sail_rl.command_line import BadInput
from sail_rl.data.stream import Shard
from sail_rl.launch import Run
from sail_rl.sharding import Whole, load_deepspeed, save_deepspeed
from sail_rl.stopping import GivenUp

KILLS = 20


def write(folder: Path, step: int, accuracy: float | None = None) -> Path:
    """A small checkpoint of two files."""
    target = folder / f"step_{step}"
    temporary = begin_folder(target)
    (temporary / "state").mkdir()
    (temporary / "model.safetensors").write_bytes(bytes([step]) * 5000)
    (temporary / "state/rank_0.pt").write_text(str(step))
    complete_folder(target, {"processes": 2, "accuracy": accuracy})
    return target


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- one folder


def test_a_complete_folder(tmp_path):
    target = write(tmp_path, 7, accuracy=0.5)
    assert names(tmp_path) == {"step_7"}
    assert fault_of(target) is None
    manifest = read_manifest(target)
    assert manifest["files"]["model.safetensors"]["bytes"] == 5000
    assert set(manifest["files"]) == {"model.safetensors", "state/rank_0.pt"}
    assert (manifest["processes"], manifest["accuracy"]) == (2, 0.5)
    assert set(manifest["versions"]) == {"sail-rl", "torch", "transformers"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "name", "told"),
    [
        (truncate, "model.safetensors", "model.safetensors has 4,999 bytes instead of 5,000"),
        (flip, "model.safetensors", "model.safetensors has been changed since it was written"),
        (flip, "state/rank_0.pt", "state/rank_0.pt has been changed since it was written"),
        (Path.unlink, "state/rank_0.pt", "state/rank_0.pt is missing"),
        (lambda path: shutil.rmtree(path.parent), "state/rank_0.pt", "state/rank_0.pt is missing"),
        (truncate, MANIFEST, None),  # the end of its last line
        (flip, MANIFEST, "manifest.json is missing or has been changed"),
        (Path.unlink, MANIFEST, "manifest.json is missing or has been changed"),
    ],
)
@pytest.mark.fault(
    fault="checkpoint: torn",
    injected="weights, state or manifest truncated, a bit flipped, a file or a folder gone",
    expected="the checkpoint before is taken; the broken one is named with its fault and set aside",
)
def test_a_broken_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, capsys, harm, name, told):
    good, broken = write(tmp_path, 2), write(tmp_path, 4)
    keep_newest(tmp_path, 2)
    harm(broken / name)
    if told is None:
        assert newest_whole(tmp_path) == (broken, {})
        return
    assert newest_whole(tmp_path) == (good, {"step_4": told})
    assert f"step_4 is broken: its {told}" in capsys.readouterr().out
    assert names(tmp_path) == {"step_2", "step_4.broken", "latest"}
    assert os.readlink(tmp_path / "latest") == "step_2"
    assert newest_whole(tmp_path) == (good, {})


@pytest.mark.fault(
    fault="checkpoint: torn",
    injected="each byte of the manifest with a bit flipped",
    expected="no other meaning",
)
def test_no_bit_of_a_manifest_can_change_its_meaning(tmp_path):
    file = write(tmp_path, 1, accuracy=0.25) / MANIFEST
    content, meaning = file.read_bytes(), read_manifest(file.parent)
    for place in range(len(content)):
        changed = content[place] ^ (1 << place % 8)
        file.write_bytes(content[:place] + bytes([changed]) + content[place + 1 :])
        assert read_manifest(file.parent) in ({}, meaning)


def test_another_format_is_not_read(tmp_path):
    (target := begin_folder(tmp_path / "step_1")).joinpath("model.safetensors").touch()
    complete_folder(tmp_path / "step_1", {"format": 2})
    assert "format 2; this version reads 1" in str(fault_of(tmp_path / "step_1"))
    assert not target.exists()


# ---- all of a run's


@pytest.mark.fault(
    fault="checkpoint: torn",
    injected="no checkpoint that is whole",
    expected="the run is refused and names the faults; it never begins anew",
)
def test_a_run_with_nothing_whole_stops_and_changes_nothing(tmp_path):
    folder = tmp_path / "checkpoints"
    flip(write(folder, 1) / "model.safetensors")
    (write(folder, 2) / "state/rank_0.pt").unlink()
    run = Run(SimpleNamespace(), tmp_path, None, Shard())
    with pytest.raises(BadInput) as caught:
        newest_checkpoint(run)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"{folder} has no checkpoint that is whole; restore one")
    assert lines == [
        "  step_2: its state/rank_0.pt is missing",
        "  step_1: its model.safetensors has been changed since it was written",
    ]
    assert names(folder) == {"step_1", "step_2"}
    assert newest_checkpoint(Run(SimpleNamespace(), tmp_path / "new", None, Shard())) is None


@pytest.mark.fault(
    fault="checkpoint: killed while saving",
    injected="a half-written folder and link",
    expected="cleared away; the one before is taken",
)
def test_what_a_killed_run_was_writing_is_cleared_away(tmp_path):
    good = write(tmp_path, 1)
    (begin_folder(tmp_path / "step_2") / "model.safetensors").touch()
    (tmp_path / ".latest.tmp").symlink_to("step_9")
    assert newest_whole(tmp_path) == (good, {})
    assert names(tmp_path) == {"step_1", "latest"}


@pytest.mark.parametrize(
    ("accuracies", "kept", "best"),
    [
        ([None] * 4, [3, 4], None),
        ([0.5, 0.9, 0.8, 0.7], [2, 3, 4], "step_2"),
        ([0.5, None, 0.5, None], [1, 3, 4], "step_1"),
        ([0.1, 0.2, 0.3, 0.4], [3, 4], "step_4"),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, accuracies, kept, best):
    for step, accuracy in enumerate(accuracies, start=1):
        write(tmp_path, step, accuracy)
        keep_newest(tmp_path, 2)
        assert os.readlink(tmp_path / "latest") == f"step_{step}"
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == kept
    assert (os.readlink(tmp_path / "best") if (tmp_path / "best").exists() else None) == best


def test_links_of_a_best_that_broke(tmp_path):
    write(tmp_path, 1)
    flip(write(tmp_path, 2, accuracy=0.9) / "model.safetensors")
    keep_newest(tmp_path, 2)
    newest_whole(tmp_path)
    assert names(tmp_path) == {"step_1", "step_2.broken", "latest"}


@pytest.mark.fault(
    fault="checkpoint: killed while saving",
    injected="SIGKILL at random instants of saves, again and again",
    expected="after each a whole checkpoint, `latest` valid",
)
def test_killed_at_any_moment(tmp_path):
    result = command("tests/kill_while_saving.py", tmp_path / "checkpoints", KILLS)
    assert result.returncode == 0, result.stderr
    assert f"killed {KILLS} times" in result.stdout


# ---- a run's saves


@pytest.fixture(scope="module")
def model():
    processor = processor_for_questions()
    return dense(processor), processor


def saver_of(folder: Path, model, shard: Shard | None = None, optimizer=None, **trainer) -> Saver:
    """As a trainer makes it, of one plain process or several."""
    (folder / "metrics.jsonl").touch()
    policy, processor = model
    recipe = SimpleNamespace(
        trainer=SimpleNamespace(**{"save_total_limit": 2, "eval_every": 1, "push_to_hub": None} | trainer)
    )
    accelerator = SimpleNamespace(distributed_type="NO")
    optimizer = optimizer or torch.optim.AdamW(policy.parameters())
    return Saver(Run(recipe, folder, accelerator, shard or Shard()), Whole(policy, nullcontext), processor, optimizer)


def test_saves_and_the_last_steps_accuracy(tmp_path, model):
    saver = saver_of(tmp_path, model)
    folder = tmp_path / "checkpoints"
    for step, accuracy in ((0, None), (1, 0.6), (2, 0.5), (3, None), (4, 0.4)):
        saver.save(Progress(step, data_position=4 * step), accuracy)
    assert names(folder) == {"step_1", "step_3", "step_4", "latest", "best"}
    assert os.readlink(folder / "best") == "step_1"
    note_final_accuracy(saver.run, 4, 0.7)
    assert names(folder) == {"step_3", "step_4", "latest", "best"}
    assert os.readlink(folder / "best") == "step_4"
    found = newest_checkpoint(saver.run)
    assert found == folder / "step_4"
    assert load_progress(saver.run, found, saver.optimizer) == Progress(4, data_position=16)
    manifest = read_manifest(found)
    assert set(manifest["files"]) == set(files_of(found))
    assert {"model.safetensors", "trainer_state.pt", "config.json", "tokenizer.json"} <= set(manifest["files"])


def test_another_number_of_processes_is_told(tmp_path, model, capsys):
    saver = saver_of(tmp_path, model)
    saver.save(Progress(1))
    other = saver_of(tmp_path, model, Shard(0, 2))
    load_progress(other.run, tmp_path / "checkpoints/step_1", other.optimizer)
    assert "written by 1 processes, going on with 2" in capsys.readouterr().out


@pytest.fixture
def limit_files():
    """Let no file be longer than so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def sizes(checkpoint: Path) -> dict[str, int]:
    return {name: path.stat().st_size for name, path in files_of(checkpoint).items()}


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.pt", "tokenizer.json"])
@pytest.mark.fault(
    fault="checkpoint: full disk",
    injected="a limit on file sizes, for each kind of file",
    expected="the checkpoint before is intact, nothing of the new one is left, the run goes on and says so",
)
def test_a_save_that_fails_costs_nothing_else(tmp_path, model, capsys, limit_files, name):
    """Whichever file the disk refuses; the next save is a whole one again."""
    saver = saver_of(tmp_path, model)
    saver.save(Progress(1))
    folder = tmp_path / "checkpoints"
    largest = sizes(folder / "step_1")
    limit_files(largest[name] - 1)
    if name == "tokenizer.json":
        limit_files(max(size for file, size in largest.items() if size < largest[name]) + 1)
    saver.save(Progress(2))
    limit_files(resource.RLIM_INFINITY)
    assert "step_2 could not be saved: " in capsys.readouterr().err
    assert names(folder) == {"step_1", "latest"}
    assert fault_of(folder / "step_1") is None
    saver.save(Progress(3))
    assert (saver.failed, saver.in_a_row) == (1, 0)
    assert os.readlink(folder / "latest") == "step_3"


@pytest.mark.fault(
    fault="checkpoint: a folder that cannot be written",
    injected="`checkpoints` is a file",
    expected="the run ends after two failed saves in a row",
)
def test_two_failures_in_a_row_stop_the_run(tmp_path, model):
    """Nothing can be written where `checkpoints` is a file."""
    saver = saver_of(tmp_path, model)
    (tmp_path / "checkpoints").touch()
    saver.save(Progress(1))
    with pytest.raises(BadInput, match=r"saves that failed in a row: 2, the last one with .*Not a directory"):
        saver.save(Progress(2))
    assert saver.failed == MOST_FAILED
    saver.save_after(BadInput("two have failed"), Progress(2))  # as after any mistake: tried once more, without another
    with pytest.raises(BadInput, match="saves that failed in a row"):
        saver.save_after(GivenUp(), Progress(2))  # its exit code would say that all is saved


class Failing:
    """An optimizer of which one process cannot write its part."""

    def state_dict(self):
        raise OSError(28, "No space left on device")


@pytest.mark.fault(
    fault="checkpoint: full disk for one of two processes",
    injected="ENOSPC in the second one's part",
    expected="neither waits for the other; nothing is left",
)
def test_processes_agree(tmp_path, model):
    """One of two fails, the second, whose files are its own: neither waits for the other, and nothing is left."""
    waiting, everyone = Barrier(2, timeout=60), [[], []]

    def gather(rank):
        def exchange(mine):
            everyone[rank] = mine
            waiting.wait()
            found = everyone[0] + everyone[1]
            waiting.wait()
            return found

        return exchange

    told: SimpleQueue[str | None] = SimpleQueue()

    def save(rank):
        saver = saver_of(tmp_path, model, Shard(rank, 2, gather(rank)), Failing() if rank else None)
        told.put(saver.save_if_possible(Progress(1)))

    threads = [Thread(target=save, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [told.get(), told.get()] == 2 * ["OSError: [Errno 28] No space left on device"]
    assert names(tmp_path / "checkpoints") == set()


class Program:
    """What is pickled of it would leave a file when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return Path.touch, (self.folder / "was_run",)


@pytest.mark.fault(
    fault="hostile: a pickle as a run's state",
    injected="trainer_state.pt that makes a file when it is unpickled, with a valid manifest",
    expected="refused; nothing is run",
)
def test_nothing_pickled_is_run(tmp_path, model):
    """A state that would run a program when it is unpickled is refused, whatever its manifest says."""

    target = tmp_path / "checkpoints/step_1"
    torch.save({"progress": Program(tmp_path)}, begin_folder(target) / "trainer_state.pt")
    complete_folder(target, {})
    saver = saver_of(tmp_path, model)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_progress(saver.run, newest_checkpoint(saver.run), saver.optimizer)
    assert not (tmp_path / "was_run").exists()


def test_deepspeeds_files(tmp_path):
    """A process that cannot write one of them goes along to the end; and nothing in them is run."""
    pytest.importorskip("deepspeed")
    done = []

    def save_checkpoint(folder, **settings):
        engine.checkpoint_engine.save({"step": torch.ones(1)}, f"{folder}/none/state.pt")
        engine.checkpoint_engine.save({"step": torch.ones(1)}, f"{folder}/state.pt")
        done.append("waited for the others")

    def load_checkpoint(folder, **settings):
        return engine.checkpoint_engine.load(f"{folder}/state.pt")

    engine = SimpleNamespace(
        checkpoint_engine=SimpleNamespace(), save_checkpoint=save_checkpoint, load_checkpoint=load_checkpoint
    )
    with pytest.raises(OSError, match="No such file or directory"):
        save_deepspeed(engine, tmp_path)
    assert done == ["waited for the others"]
    load_deepspeed(engine, tmp_path)
    torch.save({"step": Program(tmp_path)}, tmp_path / "state.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_deepspeed(engine, tmp_path)
    assert not (tmp_path / "was_run").exists()
