"""What several test files share: running our commands as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fault_matrix import pytest_addoption, pytest_collection_modifyitems, pytest_terminal_summary  # noqa: F401
from PIL import Image

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
# A step of the quickstart made as small as it goes.
SMALL = ("data.eval.rows=8", "trainer.max_steps=2", "trainer.eval_every=null")
SMALL_GRPO = (*SMALL, "rollout.prompts_per_step=4", "rollout.num_generations=4", "rollout.max_completion_length=12")
REWARD = "def spread(completions, **columns):\n    return [float(sum(map(ord, text)) % 11) for text in completions]\n"


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
