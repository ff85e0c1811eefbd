"""Memory that a step has freed is there for the next."""

import resource
import subprocess
import sys

import pytest

BLOCK = 2**24  # bytes
PAGES = """
import resource
import torch
from sail_rl.heap import keep_freed_memory
keep_freed_memory()
def step():
    held = [torch.ones(2**22) for _ in range(20)]
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_later_step_asks_the_system_for_little():
    """Left alone it would ask for nearly all of its 20 blocks."""
    faults = subprocess.run([sys.executable, "-c", PAGES], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert int(faults) < 20 * BLOCK / resource.getpagesize() / 4
