"""What several test files share: running our commands as a user would."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from fault_matrix import pytest_addoption, pytest_collection_modifyitems, pytest_terminal_summary  # noqa: F401
from PIL import Image

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
# A step of the quickstart made as small as it goes.
SMALL = ("data.eval.rows=8", "trainer.max_steps=2", "trainer.eval_every=null")
SMALL_GRPO = (*SMALL, "rollout.prompts_per_step=4", "rollout.num_generations=4", "rollout.max_completion_length=12")
FORKED = "forked"
LONGEST = 540  # seconds, of a command
REWARD = "def spread(completions, **columns):\n    return [float(sum(map(ord, text)) % 11) for text in completions]\n"


ONE = (sys.executable,)


def command(*arguments: object, launcher: tuple[str, ...] = ONE) -> subprocess.CompletedProcess:
    """Run one of our commands from the repository's root; output and errors as text."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if launcher == ONE or launcher[:1] == (FORKED,):
        processes = 1 if launcher == ONE else int(launcher[1])
        # What has seen a GPU cannot be forked.
        if shutil.which("nvidia-smi") is None and (warm := WarmPython.the_one()).is_ready:
            return warm.run([*map(str, arguments)], environment, processes)
        launcher = ONE if processes == 1 else torchrun(processes)
    return subprocess.run(
        [*launcher, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )


class WarmPython:
    """tests/warm_process.py, one for all tests of this process."""

    running: "WarmPython | None" = None

    @classmethod
    def the_one(cls) -> "WarmPython":
        if cls.running is None or (cls.running.is_ready and cls.running.process.poll() is not None):
            cls.running = cls()
        return cls.running

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/warm_process.py")],
            cwd=ROOT,
            # No threads of numpy's, which would not be in the forks.
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.is_ready = self.process.stdout.readline() == "ready\n"
        self.one_at_a_time = threading.Lock()

    def run(self, arguments: list[str], environment: dict[str, str], processes: int) -> subprocess.CompletedProcess:
        """Exit code and output of a fork, or of several that find each other as torchrun's processes do."""
        with tempfile.TemporaryDirectory() as folder, self.one_at_a_time:
            files = [Path(folder) / name for name in ("output", "errors")]
            for file in files:
                file.touch()
            asked = {"arguments": arguments, "environment": environment, "output": [*map(str, files)]}
            asked["processes"] = processes
            assert self.process.stdin
            assert self.process.stdout
            print(json.dumps(asked), file=self.process.stdin, flush=True)
            forks = json.loads(self.process.stdout.readline())
            killing = threading.Timer(LONGEST, lambda: [os.kill(fork, signal.SIGKILL) for fork in forks])
            killing.start()
            code = json.loads(self.process.stdout.readline())
            killing.cancel()
            return subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in files))


def forked(processes: int) -> tuple[str, ...]:
    """The same processes as torchrun's, without their loading; for where the launcher is not what is tested."""
    return (FORKED, str(processes))


def torchrun(processes: int) -> tuple[str, ...]:
    """The launcher of several processes on one machine."""
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """A tiny checkpoint, two steps old, made by the real SFT command."""
    run = tmp_path_factory.mktemp("runs") / "sft"
    result = command("sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", *SMALL, f"output_dir={run}")
    assert result.returncode == 0, result.stderr
    return run / "final"


@pytest.fixture(scope="session")
def mixed_rows(tmp_path_factory):
    """Rows with and without a picture, in runs, so that some process has text alone."""
    folder = tmp_path_factory.mktemp("rows")
    for number, colour in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (56, 56), colour).save(folder / f"{number}.png")
    rows = [
        {"question": f"Question {i}: what is it?", "answer": str(i), "reasoning": f"It is {i}, as can be seen."}
        | {"kind": "cot" if i % 4 < 2 or i == 15 else "direct"}
        | ({"images": [f"{i % 3}.png"]} if i % 4 < 2 else {})
        for i in range(16)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "mine.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """The model is too small to share out: on a busy machine, threads that wait for each other are ten times slower."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def signals_as_before():
    """A trainer that runs in the tests' own process answers signals until that ends."""
    from sail_rl import stopping

    before = {number: signal.getsignal(number) for number in stopping.HEARD}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    stopping.Asked.number, stopping.Asked.waits = None, False
