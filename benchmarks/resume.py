"""Is a run that was killed and started again the run that was not? N steps against k steps, SIGKILL, and N - k steps.

python benchmarks/resume.py [--short] [--only WORDS]       rows that the results have are skipped
    --only "grpo vllm_server"    rows whose name has all these words

Tiny random models on the built-in pictures. Equal is equal bit by bit: every figure of metrics.jsonl but times, every
sampled token, every reward, every final weight. Of a row that is not, a second whole run says what differs without a
kill. The processes of a run are forked from this one, which has imported what they need: half a minute less for each.
"""

import argparse
import atexit
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import psutil

from benchmarks.common import machine, markdown, prepare_process, results_file, save
from benchmarks.overlap import free_port

STEPS, KILLED_AFTER = 4, 2
COLUMNS = {
    "trainer": "trainer",
    "engine": "engine",
    "processes": "processes",
    "then": "after the kill",
    "overlap": "overlap",
    "updates": "updates a batch",
    "figures": "figures",
    "tokens": "tokens",
    "rewards": "rewards",
    "weights": "weights",
    "once": "each step once",
    "note": "",
}
PARTS = ("figures", "tokens", "rewards", "weights")
# A reward that differs within a group and keeps what it was asked about.
REWARD = """
import json

def spread(completions, completion_ids, trainer_state, **columns):
    values = [float(sum(map(ord, text)) % 11) for text in completions]
    lines = [json.dumps([trainer_state.global_step, *pair]) + "\\n" for pair in zip(completion_ids, values)]
    with open(__file__ + ".jsonl", "a") as file:
        file.write("".join(lines))
    return values
"""
COMMON = ("data.eval=null", "model.path=null", "model.random_init=tiny", f"trainer.max_steps={STEPS}")
COMMON += (f"trainer.save_every={KILLED_AFTER}", "optim.lr_scheduler_type=constant", "optim.warmup_steps=0")
COMMON += ("optim.learning_rate=1e-3",)
GRPO = ("rollout.prompts_per_step=4", "rollout.num_generations=4", "rollout.max_completion_length=12", "grpo.beta=0.1")


@dataclass(frozen=True)
class Row:
    """One kind of run."""

    trainer: str
    engine: str
    processes: int = 1
    then: int = 1
    """Processes after the kill."""
    overlap: int = 0
    updates: int = 1
    """Optimizer steps on each batch of completions."""

    @property
    def name(self) -> str:
        """What tells it apart."""
        return " ".join(f"{key} {value}" for key, value in asdict(self).items())


ROWS = (
    *(Row("sft", "hf", n, n) for n in (1, 2)),
    *(Row("grpo", "hf", 1, 1, updates=updates) for updates in (1, 4)),
    Row("grpo", "hf", 2, 2),
    Row("grpo", "vllm_colocate", updates=4),
    *(Row("grpo", "vllm_server", overlap=overlap, updates=4) for overlap in (0, 1)),
    Row("grpo", "hf", 2, 1),
    Row("grpo", "hf", 2, 2, updates=4),
    *(Row("grpo", "vllm_server", 2, 2, overlap, updates=4) for overlap in (0, 1)),
    Row("grpo", "vllm_colocate", 2, 2, updates=4),
)
SHORT = (Row("sft", "hf"), Row("grpo", "hf", updates=4))


@dataclass(frozen=True)
class Trace:
    """What a finished run has done."""

    figures: list[dict[str, Any]]
    completions: list[Any]
    """Step, tokens and reward of each, sorted."""
    weights: bytes

    @classmethod
    def of(cls, folder: Path) -> "Trace":
        """Read from the run's folder."""
        records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        asked = folder / "mine.py.jsonl"
        completions = map(json.loads, set(asked.read_text().splitlines()) if asked.is_file() else ())
        return cls(
            [{key: value for key, value in record.items() if "second" not in key} for record in records],
            sorted(one for one in completions if one[0]),  # step 0 is the trial that every launch begins with
            (folder / "run/final/model.safetensors").read_bytes(),
        )


def main() -> None:
    """Run what is missing, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    preload()
    file = arguments.output or results_file("resume", arguments.short)
    result = json.loads(file.read_text()) if file.is_file() else {"machine": machine(), "rows": {}}
    for row in SHORT if arguments.short else ROWS:
        if row.name not in result["rows"] and all(word in row.name.split() for word in arguments.only.split()):
            print(f"running {row.name}", flush=True)
            result["rows"][row.name] = asdict(row) | measure(row)
            save(file, result, told(result["rows"]))


def preload() -> None:
    """Import what trainers need."""
    prepare_process()
    for name in ("train_sft", "train_grpo", "finish", "engines", "update", "update_sft"):
        import_module(f"sail_rl.{name}")


def told(rows: dict[str, dict[str, Any]]) -> str:
    """The table."""
    words = {"True": "yes", "False": "**no**"}
    shown = [{key: words.get(str(value), value) for key, value in row.items()} for row in rows.values()]
    return (
        f"# {STEPS} steps against {KILLED_AFTER} steps, SIGKILL, and {STEPS - KILLED_AFTER} steps\n\n"
        f"{markdown(shown, COLUMNS)}\n"
        "Equal bit by bit, or not. Figures: all of metrics.jsonl but times; tokens and rewards: of every completion of "
        "every process;\nweights: those of the final model. Four updates a batch: two mini-batches, twice.\n"
    )


def measure(row: Row) -> dict[str, Any]:
    """Whether the killed run equals the whole one; of one that does not, whether two whole ones do."""
    with tempfile.TemporaryDirectory() as home:
        folders = [Path(home) / name for name in ("whole", "killed", "again")]
        finish(row, folders[0], row.processes)
        kill(row, folders[1])
        finish(row, folders[1], row.then)
        whole, killed = Trace.of(folders[0]), Trace.of(folders[1])
        found = compared(whole, killed) | {"once": [one["step"] for one in killed.figures] == list(range(1, STEPS + 1))}
        if all(found[part] for part in PARTS):
            return found | {"note": ""}
        finish(row, folders[2], row.processes)
        return found | {
            "note": f"{difference(whole, killed)}; two runs without a kill: {difference(whole, Trace.of(folders[2]))}"
        }


def compared(one: Trace, two: Trace) -> dict[str, bool]:
    """Which parts are equal."""
    tokens, rewards = (
        [[(step, part[place]) for step, *part in trace.completions] for trace in (one, two)] for place in (0, 1)
    )
    return {
        "figures": one.figures == two.figures,
        "tokens": tokens[0] == tokens[1],
        "rewards": rewards[0] == rewards[1],
        "weights": one.weights == two.weights,
    }


def difference(one: Trace, two: Trace) -> str:
    """How far two runs are apart, for people."""
    pairs = [(a, b) for a, b in zip(one.figures, two.figures, strict=True) if a != b]
    if not pairs:
        return "equal" if all(compared(one, two).values()) else "equal figures"
    keys = [key for key, value in pairs[0][0].items() if value != pairs[0][1].get(key)]
    same = sum(completion in two.completions for completion in one.completions)
    loss = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    return (
        f"apart from step {pairs[0][0]['step']} on ({', '.join(keys[:3])}), losses by {loss:.1e} at most, "
        f"{same} of {len(one.completions)} completions the same"
    )


# ---- runs


def arguments_of(row: Row, folder: Path) -> list[str]:
    """The command line of a run of this kind in a folder of its own."""
    changes = [*COMMON, f"output_dir={folder / 'run'}"]
    if row.trainer == "sft":
        return ["recipes/quickstart_sft.yaml", *changes, "sft.samples_per_step=8"]
    (folder / "mine.py").write_text(REWARD)
    changes += [*GRPO, f"rewards=[{{function: '{folder / 'mine.py'}:spread'}}]", f"rollout.overlap={row.overlap}"]
    changes += [f"rollout.engine={row.engine}"]
    if row.updates == 4:
        changes += ["grpo.mini_batches=2", "grpo.num_iterations=2"]
    if row.engine == "vllm_server":
        changes += [f"rollout.server.urls=[{server()}]"]
    return ["recipes/quickstart.yaml", *changes]


@cache
def server() -> str:
    """A server that outlives the kills, as on a node of its own; it ends with this process."""
    port = free_port()
    started = subprocess.Popen([sys.executable, "-m", "sail_rl.cli", "serve-rollouts", "--port", str(port)])
    atexit.register(kill_all, [started.pid])
    return f"http://127.0.0.1:{port}"


def start(row: Row, folder: Path, processes: int) -> list[int]:
    """Begin a run, or go on with it; its processes."""
    folder.mkdir(exist_ok=True)
    arguments, port = arguments_of(row, folder), str(free_port())
    pids = []
    for rank in map(str, range(processes)):
        if pid := os.fork():
            pids.append(pid)
            continue
        if processes > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            os.environ |= names | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        be_trainer(row.trainer, arguments, folder / "log.txt")
    return pids


def be_trainer(trainer: str, arguments: list[str], log: Path) -> NoReturn:
    """In a forked process: what the command does."""
    from sail_rl import train_grpo, train_sft
    from sail_rl.command_line import parse_command_line
    from sail_rl.config import GrpoRecipe, SftRecipe
    from sail_rl.launch import run_recipe

    with log.open("a") as file:
        for output in (1, 2):
            os.dup2(file.fileno(), output)
    sys.argv = [trainer, *arguments]
    code: Any = 1
    try:
        if trainer == "sft":
            run_recipe(train_sft.train, parse_command_line(SftRecipe, ""))
        else:
            run_recipe(train_grpo.train, parse_command_line(GrpoRecipe, ""))
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(row: Row, folder: Path, processes: int) -> None:
    """Run to the end."""
    for pid in start(row, folder, processes):
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError(f"{row.name}: {(folder / 'log.txt').read_text()[-4000:]}")


def kill(row: Row, folder: Path) -> None:
    """Begin a run and kill all of its processes as soon as it has saved, in the middle of the step after that."""
    pids, run = start(row, folder, row.processes), folder / "run"
    while not (run / f"checkpoints/step_{KILLED_AFTER}").is_dir():
        if os.waitpid(pids[0], os.WNOHANG)[0]:
            raise RuntimeError(f"{row.name}: {(folder / 'log.txt').read_text()[-4000:]}")
        time.sleep(0.01)
    kill_all(pids)
    if (run / f"checkpoints/step_{STEPS}").is_dir():
        raise RuntimeError(f"{row.name}: the run was over before it could be killed")


def kill_all(pids: list[int]) -> None:
    """SIGKILL for processes and all that they have started."""
    parents = [psutil.Process(pid) for pid in pids]
    family = [*parents, *(child for parent in parents for child in parent.children(recursive=True))]
    for process in family:
        process.kill()
    psutil.wait_procs(family)


if __name__ == "__main__":
    main()
