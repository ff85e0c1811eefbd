"""A Python that has loaded torch and our modules, and forks a process for each command that a test runs.

Most of a tiny run's time is the loading. A fork runs the script as `python script` does: its own arguments,
environment, `__main__`, `sys.path`, exit handlers and exit code. A line of JSON asks for a run.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOADED: tuple[str, ...] = (
    "torch._dynamo",
    "datasets",
    "sail_rl.model.load",
    "sail_rl.scoring",
    "sail_rl.engines",
    "sail_rl.finish",
)
LOADED += ("sail_rl.cli", "sail_rl.doctor", "deepspeed", "cv2", "transformers.tokenization_mistral_common")
LOADED += ("sail_rl.update", "sail_rl.update_sft", "sail_rl.overlap", "sail_rl.eval", "sail_rl.transcripts")


def next_command() -> dict:
    """Load everything, then answer; returns in the fork alone."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # modules greet
    for name in LOADED:
        importlib.import_module(name)
    importlib.import_module("sail_rl.model.load").picture_corpus()  # remembered
    threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    others = sorted(set(threads) - {"jemalloc_bg_thd"})  # that of pyarrow's allocator, which knows of forks
    if len(others) > 1:
        print(f"tests start every command anew: threads do not survive a fork: {others}", file=sys.stderr)
        sys.exit(1)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        forks = []
        for place in places(command["processes"]):
            forks.append(os.fork())
            if forks[-1] == 0:
                replies.close()
                return command | {"environment": command["environment"] | place}
        print(json.dumps(forks), file=replies, flush=True)
        print(json.dumps(first_failure(forks)), file=replies, flush=True)
    sys.exit()


def places(processes: int) -> list[dict[str, str]]:
    """What each of several processes is told, as torchrun does; nothing for one alone."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    return [shared | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(processes)]


def first_failure(forks: list[int]) -> int:
    """The first exit code that is not 0, after which the others are killed; else 0."""
    left, code = set(forks), 0
    while left:
        ended, status = os.wait()
        left.discard(ended)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            for fork in left:
                os.kill(fork, signal.SIGKILL)
    return code


def become(command: dict) -> None:
    """This process, as if it had just been started."""
    for number, (path, mode) in enumerate(
        ((os.devnull, os.O_RDONLY), *((p, os.O_WRONLY | os.O_APPEND) for p in command["output"]))
    ):
        file = os.open(path, mode)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0)  # what the pipe has brought already is not this process's
    os.environ.clear()
    os.environ.update(command["environment"])
    os.chdir(ROOT)


if __name__ == "__main__":
    COMMAND = next_command()
    become(COMMAND)
    ARGUMENTS = COMMAND["arguments"]
    if ARGUMENTS[0] == "-m":
        sys.path[0], sys.argv = str(ROOT), ARGUMENTS[1:]
        sys.modules.pop(ARGUMENTS[1], None)  # as loaded it is not the main module
        runpy.run_module(ARGUMENTS[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str((ROOT / ARGUMENTS[0]).parent), ARGUMENTS
        runpy.run_path(ARGUMENTS[0], run_name="__main__")
