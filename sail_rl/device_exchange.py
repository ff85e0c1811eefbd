"""A sum over this machine's devices, each in a process of its own: what training on several of them needs first.

Started by `sail-rl doctor` under torch's launcher.
"""

import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from sail_rl.command_line import BadInput

LIMIT = 120.0  # seconds; starting eight processes takes twenty
NUMBERS = 1 << 26  # that each GPU sends: 256 MiB
FEW_NUMBERS = 1 << 16  # on a CPU
ROUNDS = 5


def exchange_between(backend: str, count: int, limit: float = LIMIT) -> str:
    """How fast it went; BadInput with what the library says, if it did not."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    try:
        ended = subprocess.run(
            [sys.executable, *launcher, str(Path(__file__)), backend, str(limit)],
            capture_output=True,
            text=True,
            timeout=limit + 30,  # the processes' own limit comes first, and says more
        )
    except subprocess.TimeoutExpired:
        raise BadInput(advice(backend, count, f"no answer within {limit:.0f} s")) from None
    told = [line for line in ended.stdout.splitlines() if line.startswith("exchanged")]
    if ended.returncode or not told:
        errors = [line for line in ended.stderr.splitlines() if "Error" in line]
        raise BadInput(advice(backend, count, errors[0].strip() if errors else f"exit code {ended.returncode}"))
    return told[0]


def advice(backend: str, count: int, fault: str) -> str:
    """What to try."""
    return (
        f"{count} processes cannot exchange tensors by {backend} ({fault}); NCCL_DEBUG=INFO says more; try "
        "NCCL_P2P_DISABLE=1, more shared memory (docker run --ipc=host), or NCCL_SOCKET_IFNAME=<this machine's network>"
    )


def main(backend: str, limit: float) -> None:
    """What each process does: add up, check the sum, and the first one tells the speed."""
    import torch
    import torch.distributed as dist

    dist.init_process_group(backend, timeout=timedelta(seconds=limit))
    rank, count = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    numbers = torch.full((NUMBERS if device.type == "cuda" else FEW_NUMBERS,), float(rank + 1), device=device)
    dist.all_reduce(numbers)
    if numbers.min() != count * (count + 1) / 2 or numbers.max() != numbers.min():
        raise ArithmeticError("the sum is wrong")
    started = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(numbers)
    numbers.sum().item()  # waits for them
    seconds = (time.perf_counter() - started) / ROUNDS
    if rank == 0:
        sent = 2 * (count - 1) / count * numbers.numel() * numbers.element_size()  # by each, around a ring
        print(f"exchanged by {count} processes with {backend}, {sent / seconds / 1e9:.1f} GB/s each", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
