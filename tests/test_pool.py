"""Workers for rewards: what bounds a job, what a worker's end does to others, and who ends with whom."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from test_accuracy import HOSTILE_COMPLETIONS, HOSTILE_GOLDS, PAIRS

from rewards import algebra_pool
from rewards.accuracy import accuracy_reward, accuracy_verdicts
from rewards.load import RewardError, load_reward
from rewards.pool import Pool
from rewards.score import score
from rewards.symbolic import Question
from rewards.verdict import Outcome
from rewards.worker import Job

SECONDS = 60.0  # for what takes a few on a quiet machine
JOBS = """
import os, pathlib, signal, sys, time

def act(what):
    if what == "spin":
        while True:
            pass
    if what == "power":
        return 9 ** 9 ** 9 % 7  # never comes back to the interpreter
    if what == "sleep":
        time.sleep(600)
    if what == "memory":
        return [bytearray(1 << 24) for _ in range(1 << 20)]
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        return {}["key"]
    if what == "lambda":
        return lambda: 0
    if what.startswith("/") and not pathlib.Path(what).exists():
        pathlib.Path(what).touch()
        os._exit(3)
    return what, os.getpid()
"""
REWARDS = """
import asyncio, os, time
calls = []

def pid(completions, **columns):
    return [float(os.getpid())] * len(completions)

def count(completions, **columns):
    calls.append(len(completions))
    return [float(len(calls))] * len(completions)

async def later(completions, **columns):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]

def stuck(completions, **columns):
    while "spin" in completions:
        pass
    if "sleep" in completions:
        time.sleep(600)
    return [1.0] * len(completions)

def picky(completions, **columns):
    return [1 / (text != "bad") for text in completions]
"""


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """Makes pools whose workers do as they are told."""
    (tmp_path / "pool_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(workers=2, **changed):
        made.append(Pool("pool_jobs:act", workers, **{"memory": 1 << 29} | changed))
        return made[-1]

    yield make
    for one in made:
        one.close()


def run(pool, *whats, cpu=0.5, wall=60.0):
    return pool.run([Job((what,), cpu, wall) for what in whats])


def test_results_come_in_the_order_of_the_jobs(pool):
    results = run(pool(), *map(str, range(100)))
    assert [result.done.value[0] for result in results] == list(map(str, range(100)))
    assert len({result.done.value[1] for result in results}) == 2
    assert os.getpid() not in {result.done.value[1] for result in results}


@pytest.mark.fault(
    fault="reward: hangs, fills the memory, dies or raises",
    injected="jobs that loop, take a power tower, allocate without end, kill their process",
    expected="time-out for those of CPU time, infra_error for memory and death, each alone; the next job is done",
)
def test_cpu_time_is_the_jobs_fault_and_all_else_is_not(pool):
    whats = ["a", "spin", "b", "power", "c", "memory", "d", "die", "e", "raise", "f", "lambda", "g"]
    results = run(pool(1), *whats)
    found = {what: result.problem for what, result in zip(whats, results, strict=True)}
    assert found == dict.fromkeys(whats) | {
        "spin": Outcome.TIMEOUT,
        "power": Outcome.TIMEOUT,
        "memory": Outcome.INFRA_ERROR,
        "die": Outcome.INFRA_ERROR,
    }
    assert [result.done.value[0] for result in results if result.done.value] == list("abcdefg")
    assert "KeyError: 'key' (pool_jobs.py, line" in str(results[9].done.error)
    assert "cannot be passed between processes" in str(results[11].done.error)
    assert "memory" in results[5].why
    assert "SIGKILL" in results[7].why


@pytest.mark.fault(
    fault="reward: sleeps for ever",
    injected="a job that sleeps 600 s with 0.5 s allowed",
    expected="its worker is ended; infra_error; the next job is done",
)
def test_a_job_that_waits_is_stopped_by_the_clock(pool):
    start = time.monotonic()
    slept, after = run(pool(1), "sleep", "after", wall=0.5)
    assert (slept.problem, after.problem) == (Outcome.INFRA_ERROR, None)
    assert time.monotonic() - start < SECONDS


@pytest.mark.fault(
    fault="reward: its worker dies once",
    injected="os._exit in the middle of a batch",
    expected="the job is done once more by a new process; no result lost or doubled",
)
def test_a_job_whose_worker_ends_once_is_done_again(pool, tmp_path):
    marker = str(tmp_path / "marker")
    results = run(pool(1), "before", marker, "after")
    assert [result.done.value[0] for result in results] == ["before", marker, "after"]
    assert results[0].done.value[1] != results[1].done.value[1] == results[2].done.value[1]


def test_workers_are_replaced_after_so_many_jobs(pool):
    few = pool(1, recycle_after=2)
    pids = [run(few, "a")[0].done.value[1] for _ in range(5)]
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]


@pytest.mark.fault(
    fault="reward: closed in the middle of a job",
    injected="close() while a job sleeps",
    expected="infra_error, at once",
)
def test_what_is_under_way_when_a_pool_is_closed_counts_as_failed(pool):
    one = pool(1)
    threading.Timer(1.0, one.close).start()
    (result,) = run(one, "sleep")
    assert result.problem == Outcome.INFRA_ERROR
    with pytest.raises(RewardError, match="closed"):
        run(one, "a")


@pytest.mark.parametrize("what", ["sleep", "power"])
@pytest.mark.fault(
    fault="orphans: reward workers",
    injected="SIGKILL of the trainer while a job sleeps or computes",
    expected="no worker is left",
)
def test_workers_end_with_the_trainer(tmp_path, what):
    (tmp_path / "pool_jobs.py").write_text(JOBS)
    script = f"""
import sys, threading, time
sys.path.insert(0, {str(tmp_path)!r})
from rewards.pool import Pool
from rewards.worker import Job
pool = Pool("pool_jobs:act", 1, 1 << 29)
print(pool.run([Job(("a",), 600.0, 600.0)])[0].done.value[1], flush=True)
threading.Thread(target=pool.run, args=([Job(({what!r},), 600.0, 600.0)],), daemon=True).start()
time.sleep(600)
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())
    time.sleep(0.3)  # until it is at the job
    assert Path(f"/proc/{worker}").exists()
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + SECONDS
    while running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(worker)


def running(process: int) -> bool:
    """A zombie, which whoever adopted it has yet to bury, does not run."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The accuracy reward in the pool


def pair_verdicts():
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    found = accuracy_verdicts([row["completion"] for row in rows], answer=[row["gold"] for row in rows])
    assert sum(one.value == float(row["correct"]) for one, row in zip(found, rows, strict=True)) >= 0.97 * len(rows)
    assert max(one.seconds for one in found) < algebra_pool.WALL_SECONDS
    return [one.outcome for one in found]


def adversarial_rows():
    """Golds with the contents of boxes that are right and wrong, or with whole completions."""
    lines = map(json.loads, (PAIRS.parent / "adversarial_answers.jsonl").read_text("utf-8").splitlines())
    for line in lines:
        row = {key: line.get(key) for key in ("gold", "options", "answer_type", "tolerance")}
        if "completion" in line:
            yield row | {"completion": line["completion"], "correct": line["correct"]}
        for side in ("right", "wrong"):
            for box in line.get(side, ()):
                yield row | {"completion": f"\\boxed{{{box}}}", "correct": side == "right"}


def adversarial_verdicts(rows):
    columns = {key: [row[key] for row in rows] for key in ("options", "answer_type", "tolerance")}
    found = accuracy_verdicts([row["completion"] for row in rows], [row["gold"] for row in rows], **columns)
    pairs = zip(rows, found, strict=True)
    assert [(row["gold"], row["completion"][:80]) for row, one in pairs if one.value != float(row["correct"])] == []
    assert max(one.seconds for one in found) < algebra_pool.WALL_SECONDS
    return [one.outcome for one in found]


@pytest.mark.fault(
    fault="property: callers",
    injected="accuracy from thread, coroutine and main thread, 1 and 8 workers",
    expected="identical verdicts",
)
def test_the_same_verdicts_everywhere():
    async def coroutine():
        return pair_verdicts()

    async def thread_of_a_coroutine():
        return await asyncio.to_thread(pair_verdicts)

    def thread():
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(pair_verdicts).result()

    callers = [pair_verdicts, thread, lambda: asyncio.run(coroutine()), lambda: asyncio.run(thread_of_a_coroutine())]
    found, adversarial, rows = [], [], list(adversarial_rows())
    for workers in (1, 8):
        algebra_pool.use_workers(workers)
        for caller in callers:
            algebra_pool._REPLIES.clear()  # else only the first would ask
            found.append(caller())
        adversarial.append(adversarial_verdicts(rows))
    assert found == found[:1] * 8
    assert adversarial[0] == adversarial[1]
    algebra_pool.close()


@pytest.mark.parametrize(
    ("limit", "value", "outcome"),
    [("CPU_SECONDS", 0.0, Outcome.TIMEOUT), ("WALL_SECONDS", None, Outcome.INFRA_ERROR)],
)
@pytest.mark.fault(
    fault="reward: algebra over its limits",
    injected="limits of CPU and wall time of 10 microseconds",
    expected="0 for CPU time, masked for wall time; exact answers untouched",
)
def test_limits_of_algebra(monkeypatch, limit, value, outcome):
    algebra_pool.use_workers(1)
    monkeypatch.setattr(algebra_pool, limit, 1e-5)
    rows = {"completions": [r"\boxed{(x+1)^2}", r"\boxed{5}"], "answer": ["x^2+2x+1", "5"]}
    verdict, exact = accuracy_verdicts(**rows)
    assert (verdict.value, verdict.outcome) == (value, outcome)
    assert exact.outcome == Outcome.CORRECT
    scores = score([load_reward("accuracy", "accuracy", 1.0, {})], rows, 2)
    assert scores.totals == [value, 1.0]
    assert scores.failed["accuracy"] == [outcome == Outcome.INFRA_ERROR, False]
    algebra_pool.close()


def test_exact_types_start_no_process_and_replies_are_remembered(monkeypatch):
    algebra_pool.close()
    exact = [("12", "12"), ("12 cm", "0.12 m"), ("B", "(B)"), ("1,2", "2,1"), ("yes", "Yes"), ("1/3", "0.333333")]
    assert accuracy_reward([rf"\boxed{{{text}}}" for _, text in exact], answer=[gold for gold, _ in exact]) == [1.0] * 6
    assert not algebra_pool._POOLS
    question = Question("same", ("x+1", "1+x"))
    (reply,) = algebra_pool.ask_algebra([question])
    assert reply.value is True
    monkeypatch.setattr(algebra_pool, "_pool", None)
    assert algebra_pool.ask_algebra([question, question]) == [reply, reply]


@pytest.mark.fault(
    fault="reward: 512 pathological answers",
    injected="power towers, deep nesting, 100,000 braces, in the accuracy reward",
    expected="all 0; the trainer's thread never waits; the next batch is right",
)
def test_the_trainer_goes_on_while_hostile_completions_are_scored():
    hard = [rf"\boxed{{e^{{\pi^{{{n}.5}}}}+\sqrt[{n}]{{7}}}}" for n in range(40)]  # not refused, so algebra is asked
    completions = (HOSTILE_COMPLETIONS + hard) * 20
    rows = [(text, HOSTILE_GOLDS[i % len(HOSTILE_GOLDS)]) for i, text in enumerate(completions[:512])]
    beats, stopped = [time.monotonic()], threading.Event()

    def beat():
        while not stopped.wait(0.01):
            beats.append(time.monotonic())

    thread = threading.Thread(target=beat)
    thread.start()
    scores = accuracy_reward([text for text, _ in rows], answer=[gold for _, gold in rows])
    stopped.set()
    thread.join()
    assert scores == [0.0] * 512
    assert max(after - before for before, after in itertools.pairwise(beats)) < 20.0  # 0.02 on a quiet machine
    assert accuracy_reward([r"\boxed{\sqrt{12}}", r"\boxed{5}"], answer=[r"2\sqrt{3}", "5"]) == [1.0, 1.0]


def test_a_script_without_a_main_guard_can_use_it(tmp_path):
    script = "from rewards import accuracy_reward\nprint(accuracy_reward([r'\\boxed{1+x}'], answer=['x+1']))\n"
    (tmp_path / "script.py").write_text(script)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for arguments in ([str(tmp_path / "script.py")], ["-"]):
        given = script if arguments == ["-"] else None
        result = subprocess.run(
            [sys.executable, *arguments], input=given, capture_output=True, text=True, env=env, timeout=SECONDS
        )
        assert (result.stdout, result.stderr) == ("[1.0]\n", "")


# Users' functions in the pool


@pytest.fixture
def reward(tmp_path):
    """Loads functions of a user's file."""
    (tmp_path / "mine.py").write_text(REWARDS)
    made = []

    def load(name, **keys):
        made.append(load_reward(f"{tmp_path / 'mine.py'}:{name}", name, 1.0, {}, **keys))
        return made[-1]

    yield load
    for one in made:
        one.close()


def test_a_users_function_has_a_process_of_its_own(reward):
    elsewhere, here, counting = reward("pid"), reward("pid", in_process=True), reward("count")
    columns = {"completions": ["a", "b"]}
    assert score([elsewhere], columns, 2).totals[0] != float(os.getpid())
    assert score([here], columns, 2).totals == [float(os.getpid())] * 2
    assert [score([counting], columns, 2).totals[0] for _ in range(3)] == [1.0, 2.0, 3.0]  # it remembers
    assert score([reward("later")], {"completions": ["a", "bb"]}, 2).totals == [1.0, 2.0]


@pytest.mark.fault(
    fault="reward: a user's function never ends",
    injected="an endless loop in a user's file, timeout 0.3 s",
    expected="0 for that completion with outcome time-out; the others scored",
)
def test_a_completion_that_keeps_a_function_busy_scores_zero(reward):
    scores = score([reward("stuck", timeout=0.3)], {"completions": ["a", "b", "spin", "c"]}, 2)
    assert scores.totals == [1.0, 1.0, 0.0, 1.0]
    assert [str(one.outcome) for one in scores.verdicts["stuck"]] == ["scored", "scored", "timeout", "scored"]
    assert not any(scores.failed["stuck"])
    assert "took more than 0.3 s of CPU time" in scores.errors[0]


@pytest.mark.fault(
    fault="reward: a user's function sleeps",
    injected="sleep 600 s in a user's file, timeout 0.3 s",
    expected="that completion is masked; the others scored",
)
def test_a_completion_that_has_a_function_wait_is_masked(reward):
    scores = score([reward("stuck", timeout=0.3)], {"completions": ["a", "b", "sleep", "c"]}, 2)
    assert scores.totals == [1.0, 1.0, None, 1.0]
    assert scores.failed["stuck"] == [False, False, True, False]
    assert "took more than 1.6 s for a job" in scores.errors[0]


def test_what_a_function_raises_is_named_with_its_line(reward):
    scores = score([reward("picky")], {"completions": ["a", "bad", "c", "d"]}, 2)
    assert scores.totals == [1.0, None, 1.0, 1.0]
    assert "reward 'picky': ZeroDivisionError: division by zero (mine.py, line" in scores.errors[0]


def test_a_column_that_cannot_go_elsewhere_is_named(reward):
    columns = {"completions": ["a", "b"], "lock": threading.Lock()}
    assert "set in_process: true" in score([reward("pid")], columns, 2).errors[0]
    assert score([reward("pid", in_process=True)], columns, 2).totals == [float(os.getpid())] * 2


def test_a_time_limit_needs_a_process_to_end(reward):
    with pytest.raises(RewardError, match="in_process: true has no process to end"):
        reward("pid", timeout=1.0, in_process=True)
    with pytest.raises(RewardError, match="it bounds functions of your own"):
        load_reward("accuracy", "accuracy", 1.0, {}, timeout=1.0)


@pytest.mark.fault(
    fault="reward: its worker is killed while idle",
    injected="SIGKILL of the worker",
    expected="a new worker does the next job",
)
def test_ctrl_c_is_for_the_trainer_alone(pool):
    one = pool(1)
    worker = run(one, "a")[0].done.value[1]
    assert os.getpgid(worker) != os.getpgid(0)
    os.kill(worker, signal.SIGKILL)
    assert run(one, "b")[0].done.value[0] == "b"
