"""How long a step waits for its pictures, with and without `data.workers`.

    python benchmarks/data_waiting.py [--workers 0 1 2] [--prompts 4] [--step-seconds 4]

Photographs of 1600 x 1200 pixels (JPEG) go through SAIL-VL2's processor into 13 tiles of 448 pixels; as a second case
the quickstart's pictures through its own processor. What the accelerator does meanwhile is stood in for by sleeping.
Writes benchmarks/results/data_waiting.{json,md}.
"""

import argparse
import json
import os
import pickle
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
from PIL import Image

from benchmarks.common import RESULTS
from sail_rl.config_data import DataSection, FileSource, PictureSource
from sail_rl.data.mixture import JoinedRows, Part
from sail_rl.data.sources import Rows, open_rows
from sail_rl.data.stream import RowStream, Shard
from sail_rl.data.workers import Workers, packed

PICTURES, STEPS = 8, 6


def main() -> None:
    """Measure all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=4, help="in each step")
    parser.add_argument("--step-seconds", type=float, default=4.0, help="of the accelerator's work in each step")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name, rows, processor in (photographs(Path(folder)), quickstart()):
            for count in arguments.workers:
                results.append({"pictures": name} | measure(rows, processor, count, arguments))
                print(json.dumps(results[-1]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    machine = {"cores": len(os.sched_getaffinity(0)), "prompts": arguments.prompts, "step": arguments.step_seconds}
    (RESULTS / "data_waiting.json").write_text(json.dumps({"machine": machine, "rows": results}, indent=2) + "\n")
    names = list(results[0])
    lines = [names, ["---"] * len(names), *([str(result[name]) for name in names] for result in results)]
    (RESULTS / "data_waiting.md").write_text("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")


def photographs(folder: Path) -> tuple[str, Rows, object]:
    """Smooth noise, which costs a JPEG decoder about what a photograph does; 13 tiles each."""
    from sail_rl.model.processing_sail_vl2 import SailVL2Processor, tiling_image_processor
    from sail_rl.model.tiny import tiny_tokenizer

    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        small = Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8))
        small.resize((1600, 1200), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    rows = [{"question": "What is this?", "image": f"{number}.jpg", "answer": "7"} for number in range(PICTURES)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    processor = SailVL2Processor(tiling_image_processor(448, 12), tiny_tokenizer(["What is this?"] * 3), 256)
    source = FileSource(path=str(folder / "rows.jsonl"))
    return "1600 x 1200 photograph, 13 tiles", open_rows(source, "train", "data.train"), processor


def quickstart() -> tuple[str, Rows, object]:
    """The picture task and the tiny model's processor."""
    from sail_rl.model.load import picture_corpus
    from sail_rl.model.tiny import tiny_processor

    source = PictureSource(families=["cards"], levels=[1], forms=["sum"])
    return "quickstart", open_rows(source, "train", "data.train"), tiny_processor(picture_corpus())


def measure(rows: Rows, processor, count: int, arguments: argparse.Namespace) -> dict:
    """Seconds that a step waits; the first step, which also starts the processes, apart."""
    from sail_rl.questions import make_question

    data = DataSection(train="pictures", max_prompt_length=8192)
    workers = Workers(count) if count else None
    options = {"seed": 0, "shuffle": True, "max_bad_rows": 0, "quarantine_file": None}
    prepare = partial(make_question, processor=processor, data=data)
    stream = RowStream(JoinedRows([Part(rows)]), prepare, **options, shard=Shard(), workers=workers)
    waited = []
    for _ in range(STEPS):
        started = time.perf_counter()
        items = stream.next_items(arguments.prompts)
        waited.append(time.perf_counter() - started)
        time.sleep(arguments.step_seconds)
    if workers:
        workers.close()
    started = time.perf_counter()
    reply = packed(items[0])
    pickle.loads(reply)
    return {
        "workers": count,
        "first step waits, s": round(waited[0], 3),
        "later steps wait, s": round(mean(waited[1:]), 3),
        "MB per item": round(len(reply) / 1e6, 2),
        "packing and unpacking, ms": round(1000 * (time.perf_counter() - started), 1),
    }


if __name__ == "__main__":
    main()
