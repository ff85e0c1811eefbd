"""Tokens per second of every engine on the same prompts with pictures: `hf`, `vllm_colocate`, and TRL 1.16's vLLM.

    python benchmarks/rollout_speed.py [--short] [--json PATH]

The model is that of update.py, with random weights; groups of eight, completions of one length, since end tokens are
suppressed. Each round asks other questions, the same of every engine, so nothing is found in a cache. Medians of rounds
in turn. TRL has bfloat16 alone; what is mended on its side is in vllm_sides.py. `push` is the time to take weights.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import machine, markdown, prepare_process, results_file, save, timed

ROUNDS, SHORT_ROUNDS = 7, 2


@dataclass(frozen=True)
class Writer:
    """An engine with the model's weights."""

    name: str
    dtype: str
    write: Callable[[list[Any]], list[int]]
    """Of prompts; the lengths of all completions."""
    push: Callable[[], object] | None
    """None where the engine's model is the trainer's."""


def main() -> None:
    """Both tasks, every engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two rounds of the first task")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prepare_process()
    from benchmarks.step import long_task, picture_task
    from benchmarks.vllm_sides import prepare_vllm

    prepare_vllm()
    tasks = {"pictures": picture_task} if arguments.short else {"pictures": picture_task, "long prompts": long_task}
    rounds = SHORT_ROUNDS if arguments.short else ROUNDS
    result: dict[str, Any] = {"machine": machine()}
    result["rows"] = [row for name, make in tasks.items() for row in measure(name, make(arguments.short), rounds)]
    save(arguments.json or results_file("rollouts", arguments.short), result, table(result["rows"]))


def measure(name: str, task, rounds: int) -> list[dict[str, Any]]:
    """A row for each engine."""
    from benchmarks.full_step import new_run
    from sail_rl.questions import question_stream

    print(f"{name}: starting the engines", flush=True)
    writers = make_writers(task)
    stream = question_stream(new_run(task.recipe), "train", task.processor)
    rollout, seconds, pushes = task.recipe.rollout, [[] for _ in writers], [[] for _ in writers]
    for number in range(rounds + 1):
        prompts = [question.prompt for question in stream.next_items(rollout.prompts_per_step)]
        for place, writer in enumerate(writers):
            push, wall = one_round(writer, prompts, rollout)
            print(f"{writer.name} {writer.dtype}: {wall:.2f} s, push {push or 0:.2f} s", flush=True)
            if number:  # the first one warms up
                seconds[place].append(wall)
                pushes[place].append(push)
    tokens = rollout.prompts_per_step * rollout.num_generations * rollout.max_completion_length
    return [
        {
            "task": name,
            "engine": writer.name,
            "dtype": writer.dtype,
            "prompt": len(prompts[0].token_ids),
            "completion": rollout.max_completion_length,
            "rollouts": tokens // rollout.max_completion_length,
            "seconds": median(of_writer),
            "tokens_per_second": tokens / median(of_writer),
            "push": median(times) if writer.push else None,
        }
        for writer, of_writer, times in zip(writers, seconds, pushes, strict=True)
    ]


def one_round(writer: Writer, prompts: list[Any], rollout) -> tuple[float | None, float]:
    """Seconds of a push, if there is one, and of the completions, whose lengths are checked."""
    push = timed(writer.push).wall if writer.push else None
    lengths: list[int] = []
    wall = timed(lambda: lengths.extend(writer.write(prompts))).wall
    expected = [rollout.max_completion_length] * len(prompts) * rollout.num_generations
    if lengths != expected:
        raise RuntimeError(f"{writer.name} wrote completions of other lengths: {lengths}")
    return push, wall


def make_writers(task) -> list[Writer]:
    """Every engine of the comparison, all in this process."""
    from benchmarks.full_step import never_written
    from benchmarks.vllm_sides import our_engine, trl_with_vllm
    from rollouts.hf import HFEngine
    from sail_rl.checkpoint import full_parameters
    from sail_rl.sampling import training_sampling

    sampling, size = training_sampling(task.recipe), task.recipe.rollout.num_generations

    def ours(name: str, engine, dtype: str) -> Writer:
        def write(prompts: list[Any]) -> list[int]:
            return [len(rollout.token_ids) for rollout in engine.generate(prompts, size, sampling)]

        push = None if name == "hf" else lambda: engine.load_weights(full_parameters(task.model), version=1)
        return Writer(name, dtype, write, push)

    hf = HFEngine(task.model, task.processor.tokenizer, never_written(task))
    engines = [ours("vllm_colocate", our_engine(task, task.model, dtype), dtype) for dtype in ("float32", "bfloat16")]
    generation = trl_with_vllm(task).vllm_generation

    def write_trl(prompts: list[Any]) -> list[int]:
        rows = [prompt for prompt in prompts for _ in range(size)]
        ids, images = [list(prompt.token_ids) for prompt in rows], [list(prompt.images) for prompt in rows]
        return [len(completion) for completion in generation.generate(ids, images, size)[1]]

    return [ours("hf", hf, "float32"), *engines, Writer("TRL's vLLM", "bfloat16", write_trl, generation.sync_weights)]


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each engine and task."""
    columns = {"task": "task", "engine": "engine", "dtype": "precision", "prompt": "prompt", "completion": "completion"}
    columns |= {"rollouts": "rollouts", "seconds": "seconds", "tokens_per_second": "tokens/s", "push": "push, s"}
    return f"Median seconds in which each engine writes a step's completions.\n\n{markdown(rows, columns)}"


if __name__ == "__main__":
    main()
