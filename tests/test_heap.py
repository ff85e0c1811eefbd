"""Memory that a step has freed is there for the next, and comes in large pages."""

import os
import resource
import subprocess
import sys

import pytest

from sail_rl.heap import LARGE_PAGES, OFFER, TUNABLES

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
LARGE = """
import os, sys
from pathlib import Path
from sail_rl.heap import keep_freed_memory, use_large_pages
use_large_pages()
import torch
keep_freed_memory()
held = [torch.ones(2**16) for _ in range(2**10)]  # 256 KiB each, as many weights are
lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
large = next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))
print(large * 1024, os.environ.get("GLIBC_TUNABLES"), sys.flags.dev_mode, *sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_later_step_asks_the_system_for_little():
    """Left alone it would ask for nearly all of its 20 blocks."""
    faults = subprocess.run([sys.executable, "-c", PAGES], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert int(faults) < 20 * BLOCK / resource.getpagesize() / 4


def answer_of(tmp_path, environment: dict[str, str]) -> list[str]:
    """What a program says that asks for large pages, begun with a flag and arguments."""
    (tmp_path / "large.py").write_text(LARGE)
    command = [sys.executable, "-X", "dev", "-W", "ignore", tmp_path / "large.py", "one", "two words"]
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES} | environment
    environment |= {"PYTHONPATH": os.getcwd()}
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


@pytest.mark.skipif(not OFFER.exists() or "[madvise]" not in OFFER.read_text(), reason="Linux offers none on request")
def test_a_program_begins_again_with_large_pages_and_the_same_command_line(tmp_path):
    large, *told = answer_of(tmp_path, {})
    assert int(large) > 2**28 / 2
    assert told == [LARGE_PAGES, "True", "one", "two", "words"]


@pytest.mark.skipif(not OFFER.exists(), reason="no Linux with large pages")
def test_what_the_user_has_chosen_is_left_alone(tmp_path):
    large, *told = answer_of(tmp_path, {TUNABLES: "glibc.malloc.perturb=0"})
    assert told[0] == "glibc.malloc.perturb=0"
    assert int(large) < 2**28 / 2 or "[always]" in OFFER.read_text()  # without having been asked


def test_a_program_that_is_no_script_goes_on():
    code = "import os, sail_rl.heap as heap; heap.use_large_pages(); print(os.environ.get(heap.TUNABLES))"
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    told = subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert told.stdout == "None\n"
