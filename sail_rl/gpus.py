"""GPUs by name: memory and peak rates, from the makers' data sheets. Imports no torch."""

import re
from dataclasses import dataclass

from sail_rl.command_line import BadInput


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    memory_gib: float
    """As the driver tells it, a little less than the name says."""
    tflops: float
    """Dense, in bfloat16."""
    bandwidth: float
    """Of its memory, in GB/s."""

    @property
    def flops(self) -> float:
        """FLOP/s."""
        return self.tflops * 1e12


# A name that is part of another stands after it: a device's is matched with the first that it contains.
GPUS = (
    Gpu("H100 PCIe", 79.2, 756, 2000),
    Gpu("H100 NVL", 93.1, 835, 3900),
    Gpu("H200 NVL", 139.8, 835, 4800),
    Gpu("H100", 79.2, 989, 3350),
    Gpu("H200", 139.8, 989, 4800),
    Gpu("B200", 178.4, 2250, 8000),
    Gpu("A100-40GB", 39.4, 312, 1555),
    Gpu("A100", 79.2, 312, 2039),
    Gpu("L40S", 44.4, 362, 864),
    Gpu("L4", 22.5, 121, 300),
    Gpu("A10", 22.5, 125, 600),
    Gpu("RTX 4090", 23.5, 165, 1008),
)


def named_in(device: str) -> Gpu | None:
    """The GPU that a driver calls so, such as `NVIDIA H100 80GB HBM3`."""
    words = device.replace("-SXM4", "")  # A100-SXM4-40GB
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu.name}\b", words)), None)


def parse_gpus(text: str, memory_gib: float | None = None, tflops: float | None = None) -> tuple[int, Gpu]:
    """`8xH100` or `H100`; a GPU that is not in the table needs its memory and speed."""
    found = re.fullmatch(r"(?:(\d+) ?x ?)?(.+)", text.strip(), re.IGNORECASE)
    count, name = int(found[1] or 1) if found else 0, found[2] if found else ""
    if count < 1:
        raise BadInput(f"--gpus {text}: write it as 8xH100")
    known = {gpu.name.lower(): gpu for gpu in GPUS}.get(name.lower())
    if known is None and (memory_gib is None or tflops is None):
        names = ", ".join(gpu.name for gpu in GPUS)
        raise BadInput(f"--gpus {text}: {name} is not in the table; give --memory-gib and --tflops, or one of {names}")
    memory, speed = memory_gib or (known.memory_gib if known else 0), tflops or (known.tflops if known else 0)
    # An unknown GPU is taken to read its memory as fast as others of its speed: an H100 has 3.4 GB/s for each TFLOP/s.
    return count, Gpu(known.name if known else name, memory, speed, known.bandwidth if known else 3.4 * speed)
