"""Rows prepared by worker processes: the same items as without, whatever becomes of them, and no process left over."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from multiprocessing import connection
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, SMALL_GRPO, command
from PIL import Image

from sail_rl.command_line import BadInput
from sail_rl.config_data import DataSection
from sail_rl.data.mixture import JoinedRows, Part
from sail_rl.data.sources import JsonLinesRows
from sail_rl.data.stream import RowStream, Shard
from sail_rl.data.workers import Workers

ROWS = 11
TORN, UNANSWERED = 6, 3  # the first is found when its picture is decoded


@pytest.fixture
def rows(tmp_path) -> Path:
    """Rows with a picture each, two of them bad."""
    for number in range(ROWS):
        Image.effect_noise((90 + number, 60), 60).convert("RGB").save(tmp_path / f"{number}.png")
    whole = (tmp_path / f"{TORN}.png").read_bytes()
    (tmp_path / f"{TORN}.png").write_bytes(whole[: len(whole) // 2])
    records = [{"question": f"What is {n}?", "image": f"{n}.png", "answer": str(n)} for n in range(ROWS)]
    del records[UNANSWERED]["answer"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path / "rows.jsonl"


@pytest.fixture
def workers():
    """Two processes, ended with the test."""
    pool = Workers(2)
    yield pool
    pool.close()


def question(example, position, processor):
    """As the trainers do it: imported in the worker, so that the other tests' processes do without torch."""
    from sail_rl.questions import make_question

    return make_question(example, position, processor, DataSection(train="rows.jsonl"))


def number_and_place(example, position):
    return int(example.columns["answer"]), position


def open_stream(rows, prepare, workers, **changed):
    keys = {"seed": 0, "shuffle": True, "max_bad_rows": 2, "quarantine_file": None, "shard": Shard()}
    return RowStream(JoinedRows([Part(JsonLinesRows(rows))]), prepare, **(keys | changed), workers=workers)


def contents(item):
    """All of a question, in a form that can be compared."""
    prompt, example = item.prompt, item.example
    tensors = {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in prompt.model_inputs.items()}
    pictures = [(picture.mode, picture.size, picture.tobytes()) for picture in (*prompt.images, *example.images)]
    rest = (example.id, example.messages, example.columns, example.conversational, example.videos)
    return prompt.id, prompt.token_ids, prompt.seed, prompt.token_inputs, tensors, pictures, rest


def test_items_order_bad_rows_and_positions_are_those_of_one_process(rows, workers, tmp_path):
    from tiny_models import processor_for_questions

    prepare = partial(question, processor=processor_for_questions())
    files = [tmp_path / "alone.jsonl", tmp_path / "with.jsonl"]
    alone, with_workers = (
        open_stream(rows, prepare, pool, quarantine_file=file)
        for pool, file in zip((None, workers), files, strict=True)
    )
    for _ in range(8):  # more than two epochs
        expected, found = alone.next_items(3), with_workers.next_items(3)
        assert [contents(item) for item in found] == [contents(item) for item in expected]
        assert all(item.prompt.model_inputs["pixel_values"].numel() for item in found)
        assert with_workers.position == alone.position
        assert with_workers.bad_rows == alone.bad_rows
    assert sorted(alone.bad_rows) == [UNANSWERED, TORN]
    assert files[0].read_text() == files[1].read_text() != ""


def test_position_may_be_set_at_any_time(rows, workers):
    alone, with_workers = (open_stream(rows, number_and_place, pool) for pool in (None, workers))
    for position in (0, 5, 0, 30, 29):  # as for a trial of the rewards, a resumed run, and every evaluation
        alone.position = with_workers.position = position
        assert [with_workers.next_items(n) for n in (2, 4)] == [alone.next_items(n) for n in (2, 4)]


def test_the_next_call_is_prepared_and_no_more(rows, workers):
    stream = open_stream(rows, number_and_place, workers, shuffle=False, one_pass=True)
    assert [row for row, _ in stream.next_items(4)] == [0, 1, 2, 4]
    coming = dict(stream.ahead._coming)
    assert list(coming) == [5, 6, 7, 8]
    assert "image 6.png cannot be read" in str(coming.pop(TORN).exception(timeout=60))
    assert [result.result(timeout=60) for result in coming.values()] == [(5, 5), (7, 7), (8, 8)]
    assert [row for row, _ in stream.next_items(4)] == [5, 9, 7, 8]  # in the place of the bad one
    assert list(stream.ahead._coming) == [10]  # the pass ends with row 10


def test_two_trainers_share_rows_as_they_do_without_workers(rows, workers):
    alone = open_stream(rows, number_and_place, None)
    expected = [alone.next_items(4) for _ in range(6)]
    barrier, slots = threading.Barrier(2, timeout=60), [None, None]

    def trainer(rank):
        def gather(items):
            slots[rank] = items
            barrier.wait()
            joined = slots[0] + slots[1]
            barrier.wait()
            return joined

        stream = open_stream(rows, number_and_place, workers, shard=Shard(rank, 2, gather))
        return [stream.next_items(4) for _ in range(6)]

    with ThreadPoolExecutor(2) as pool:
        seen = list(pool.map(trainer, range(2)))
    assert [first + second for first, second in zip(*seen, strict=True)] == expected


def die_once(example, position, marker):
    """Row 5 kills its process the first time."""
    if example.columns["answer"] == "5" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number_and_place(example, position)


def die(example, position):
    """Row 5 kills every process."""
    if example.columns["answer"] == "5":
        os.kill(os.getpid(), signal.SIGKILL)
    return number_and_place(example, position)


def crash(example, position):
    return 1 / (int(example.columns["answer"]) - 5)


def unpicklable(example, position):
    return io.StringIO if example.columns["answer"] != "5" else (lambda: None)


def mistake(example, position):
    raise BadInput("model: its processor cannot be used")


@pytest.mark.fault(
    fault="data: its worker is killed",
    injected="SIGKILL in the middle of a row, and while idle",
    expected="the row is prepared by a new process; one warning; no row lost or doubled",
)
def test_a_process_that_is_killed_is_replaced_without_loss(rows, workers, tmp_path, capfd):
    stream = open_stream(rows, partial(die_once, marker=tmp_path / "died"), workers, shuffle=False)
    assert [row for row, _ in stream.next_items(4)] == [0, 1, 2, 4]
    wait(stream.ahead._coming.values(), timeout=60)
    assert (tmp_path / "died").exists()
    for worker in list(workers._started):  # idle by now
        os.kill(worker.process.pid, signal.SIGKILL)
        connection.wait([worker.process.sentinel], timeout=60)
    assert [row for row, _ in stream.next_items(4)] == [5, 9, 7, 8]
    assert [row for row, _ in stream.next_items(2)] == [10, 0]
    warnings = capfd.readouterr().err.splitlines()
    first = f"warning: a data worker ended at row 6 of {rows} (SIGKILL: out of memory?); a new one goes on"
    assert warnings.count(first) == 1
    others = {line.split(" (")[0] for line in warnings if line != first}
    assert others == {"warning: a data worker ended while idle"}


@pytest.mark.fault(
    fault="data: a row that kills every worker",
    injected="SIGKILL at each try",
    expected="set aside after two tries",
)
def test_a_row_that_ends_every_process_is_a_bad_row(rows, workers):
    message = r"(?s)3 rows cannot be used.*row 6 \(id -\): 2 processes have ended while preparing it \(SIGKILL"
    with pytest.raises(BadInput, match=message):
        open_stream(rows, die, workers).next_items(ROWS - 2)
    stream = open_stream(rows, die, workers, max_bad_rows=3, shuffle=False)
    assert [row for row, _ in stream.next_items(5)] == [0, 1, 2, 7, 4]


@pytest.mark.fault(
    fault="data: a worker raises",
    injected="ZeroDivisionError, what cannot be pickled",
    expected="the row is named",
)
def test_what_goes_wrong_in_a_process_names_the_row(rows, workers):
    with pytest.raises(RuntimeError, match=r"(?s)row 6 of .* cannot be prepared:.*in crash.*ZeroDivisionError"):
        open_stream(rows, crash, workers).next_items(ROWS - 2)
    with pytest.raises(BadInput, match=r"row 6 \(id -\): it cannot be passed between processes .*data.workers=0"):
        open_stream(rows, unpicklable, workers).next_items(ROWS - 2)
    with pytest.raises(BadInput, match=r"^model: its processor cannot be used$"):
        open_stream(rows, mistake, workers).next_items(1)


def test_a_bad_row_keeps_its_words(rows, workers):
    reasons = []
    for pool in (None, workers):
        stream = open_stream(rows, number_and_place, pool, max_bad_rows=0)
        with pytest.raises(BadInput) as caught:
            stream.next_items(ROWS)
        reasons.append(str(caught.value))
    assert reasons[0] == reasons[1]
    assert "image 6.png cannot be read" in reasons[0] or "no `answer`" in reasons[0]


def records(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


@pytest.mark.slow
def test_both_trainers_compute_the_same_with_workers(start, tmp_path):
    sft = command(
        *("sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", *SMALL, "data.workers=2"),
        f"output_dir={tmp_path / 'sft'}",
    )
    assert sft.returncode == 0, sft.stderr
    assert records(tmp_path / "sft") == records(start.parent)
    for count in (0, 2):
        grpo = command(
            *("sail_rl/train_grpo.py", "recipes/quickstart.yaml", *SMALL_GRPO, f"data.workers={count}"),
            *(f"model={start}", f"output_dir={tmp_path / str(count)}"),
        )
        assert grpo.returncode == 0, grpo.stderr
    assert records(tmp_path / "0") == records(tmp_path / "2")
    environment = json.loads((tmp_path / "2/environment.json").read_text())
    assert environment["data_workers"] == 2
    predictions = [(tmp_path / name / "predictions_after.jsonl").read_text() for name in ("0", "2")]
    assert predictions[0] == predictions[1]


def living(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        stat = entry / "stat"
        if entry.name.isdigit() and stat.exists():
            state, _parent, _group, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("end", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
@pytest.mark.fault(
    fault="orphans: data workers",
    injected="SIGKILL (slow: SIGINT) of the trainer",
    expected="no process of its session is left",
)
def test_no_process_outlives_the_trainer(end, start, tmp_path):
    overrides = [*SMALL_GRPO, "trainer.max_steps=10000", f"model={start}", f"output_dir={tmp_path}", "data.workers=2"]
    trainer = subprocess.Popen(
        [sys.executable, "sail_rl/train_grpo.py", "recipes/quickstart.yaml", *overrides],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its children can be told by their session, whoever adopts them
    )
    wait_until(lambda: (tmp_path / "metrics.jsonl").exists() or trainer.poll() is not None)
    assert len(living(trainer.pid)) >= 3
    if end == signal.SIGINT:
        os.killpg(trainer.pid, end)  # as a terminal does it: everyone gets it
    else:
        trainer.send_signal(end)
    _, errors = trainer.communicate(timeout=60)
    assert trainer.returncode == (75 if end == signal.SIGINT else -end), errors
    assert "Traceback" not in errors
    wait_until(lambda: not living(trainer.pid))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
