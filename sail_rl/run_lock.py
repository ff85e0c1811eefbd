"""One run at a time in a folder: the first process holds a lock, which the kernel takes from it however it ends.

On network file systems: NFS and, mounted with `flock`, Lustre refuse a second launch on another machine as well; where
locks are of one machine alone (Lustre's `localflock`, NFS's `local_lock`), a launch elsewhere is not noticed.
"""

import fcntl
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

NAME = ".lock"
HELD: dict[Path, Any] = {}
"""The open file of each folder that this process holds."""


def hold(folder: Path) -> str | None:
    """Hold a folder until this process ends; what to say if another one does."""
    if folder.resolve() in HELD:
        return None
    file = (folder / NAME).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"output_dir = {folder}: {holder(file)} is at work there; wait for it, end it, or name another folder"
    except OSError as error:
        print(f"warning: {folder} is not locked against a second run: {error}", file=sys.stderr, flush=True)
    file.truncate(0)
    json.dump({"host": platform.node(), "pid": os.getpid()}, file)
    file.flush()
    HELD[folder.resolve()] = file
    return None


def holder(file: Any) -> str:
    """Who has written itself down; a process that has only just begun has not."""
    file.seek(0)
    text = file.read()
    return "process {pid} on {host}".format(**json.loads(text)) if text else "another process"
