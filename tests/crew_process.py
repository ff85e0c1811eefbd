"""One of two trainer processes before a rollout server that is not there, or whose first process hangs.

python tests/crew_process.py RANK FOLDER HOW, with HOW `absent` or `hanging`
"""

import sys
import time
from datetime import timedelta
from pathlib import Path

from torch import distributed

from rollouts import wire
from rollouts.picture_tokens import PictureTokens
from rollouts.vllm_compat import EngineSettings
from rollouts.vllm_server import Crew, Limits, ServerEngine
from sail_rl.command_line import BadInput
from sail_rl.data.stream import Shard
from sail_rl.engines import patient_gather

NOBODY = "http://127.0.0.1:9"


def main(rank: int, folder: Path, how: str) -> None:
    """Both make the engine together; what comes of it is printed."""
    distributed.init_process_group(
        "gloo", f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    if how == "hanging" and rank == 0:
        ServerEngine._make_ready = lambda engine: time.sleep(600)
    limits = Limits(start=3, push=1, request=1, restarts=1)
    crew = Crew(rank, 2, patient_gather(Shard(rank, 2), wait=10))
    setup = wire.Setup({}, [1], [], ["weight"], PictureTokens(9, None), EngineSettings("float32", 10))
    try:
        ServerEngine(setup, 9, [NOBODY], folder, limits, crew, give_up=BadInput)
    except (BadInput, RuntimeError) as end:
        print(f"{type(end).__name__}: {end}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
