"""Kills a process at random moments while it writes one checkpoint after another, and looks at what it leaves behind.

python tests/kill_while_saving.py FOLDER TIMES      (imports no torch, so that it is quick)
"""

import os
import random
import signal
import sys
import time
from itertools import count
from pathlib import Path

from sail_rl.checkpoint_folder import (
    begin_folder,
    complete_folder,
    fault_of,
    keep_newest,
    list_checkpoints,
    newest_whole,
)


def write_forever(folder: Path, first: int, told: int) -> None:
    """Each in two files; every third is the best so far. Steps that are complete are told, a byte each."""
    for step in count(first):
        target = folder / f"step_{step}"
        temporary = begin_folder(target)
        for name in ("model.safetensors", "deepspeed/rank_0.pt"):
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(f"{step}\n" * 100)
        complete_folder(target, {"accuracy": step / 1e9 if step % 3 == 0 else None})
        os.write(told, b".")
        keep_newest(folder, 2)


def main(folder: Path, times: int) -> None:
    """Links always lead to whole checkpoints, and the newest that was complete is found."""
    chance, complete = random.Random(0), 0
    folder.mkdir()
    for _ in range(times):
        (reading, telling), begun = os.pipe(), time.perf_counter()
        child = os.fork()
        if not child:
            write_forever(folder, complete + 1, telling)
        os.close(telling)
        first = os.read(reading, 1)
        time.sleep(chance.random() * 2 * (time.perf_counter() - begun))  # at any moment of the next two
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        complete += len(first) + len(os.read(reading, 1 << 16))
        os.close(reading)
        links = [folder / name for name in ("latest", "best") if (folder / name).is_symlink()]
        assert all(fault_of(path) is None for path in (*links, *list_checkpoints(folder)))
        newest, faults = newest_whole(folder)
        assert newest is not None
        assert not faults
        assert not list(folder.glob(".*"))
        step = int(newest.name[5:])
        assert step in (complete, complete + 1), (step, complete)  # killed before it was told
        complete = step
    print(f"killed {times} times, {complete} checkpoints", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
