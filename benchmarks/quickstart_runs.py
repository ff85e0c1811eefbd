"""Runs of the quickstart's real commands, kept in runs/benchmarks; a finished one is not run again."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.common import SHORT_RESULTS

STEPS, SHORT_STEPS = 400, 80  # of the SFT; the short form's model is a worse one


def sft_start(seed: int, short: bool) -> Path:
    """The checkpoint of the quickstart's SFT."""
    steps = SHORT_STEPS if short else STEPS
    folder = SHORT_RESULTS / f"sft{steps}_seed{seed}"
    launch("sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", steps, f"seed={seed}", f"output_dir={folder}")
    return folder / "final"


def launch(script: str, recipe: str, steps: int, *overrides: str) -> None:
    """One training run of so many steps."""
    limits = (f"trainer.max_steps={steps}", f"trainer.save_every={steps}")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, script, recipe, *limits, *overrides], check=True, env=environment)
