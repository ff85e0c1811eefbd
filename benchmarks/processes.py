"""One of several processes, each with one thread, that share a policy update; started by scaling.py.

torchrun --nproc_per_node 2 benchmarks/processes.py FILE ROUNDS      (writes the seconds of each round)
"""

import json
import sys
import time
from pathlib import Path

PROMPT, COMPLETION, GROUPS = 512, 128, 4


def main(file: Path, rounds: int) -> None:
    """All rounds after one for warming up; the first process notes the time between two meetings of all."""
    from benchmarks.common import prepare_process

    prepare_process()
    import torch
    from accelerate import Accelerator
    from accelerate.utils import gather_object

    from benchmarks.contestants import our_contestant
    from benchmarks.scaled_model import Cell, make_world
    from sail_rl.data.stream import Shard
    from sail_rl.launch import let_communication_end

    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)  # not before: accelerate sets the number, too
    alone = accelerator.num_processes == 1
    shard = Shard() if alone else Shard(accelerator.process_index, accelerator.num_processes, gather_object)
    world = make_world(Cell(PROMPT, COMPLETION, groups=GROUPS))
    update, seconds = our_contestant(world, "shared", accelerator=accelerator, shard=shard), []
    for _ in range(rounds + 1):
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        update.step()
        accelerator.wait_for_everyone()
        seconds.append(time.perf_counter() - started)
    if accelerator.is_main_process:
        file.write_text(json.dumps(seconds[1:]))
    let_communication_end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
