"""What several test files share: running our commands as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
# A step of the quickstart made as small as it goes.
SMALL = ("data.eval.rows=8", "trainer.max_steps=2", "trainer.eval_every=null")
SMALL_GRPO = (*SMALL, "rollout.prompts_per_step=4", "rollout.num_generations=4", "rollout.max_completion_length=12")


def command(*arguments: object, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess:
    """Run one of our commands from the repository's root; output and errors as text."""
    return subprocess.run(
        [*launcher, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=540,
    )


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


@pytest.fixture(scope="module")
def one_thread():
    """The model is too small to share out: on a busy machine, threads that wait for each other are ten times slower."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
