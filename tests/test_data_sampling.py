"""From known answers to a Think-Fusion model, by the real commands: `cot`, LongCoT SFT, `passrate` and `reject`,
`filter`, Think-Fusion SFT. The tiny model learns four rows by heart, two of which disagree."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from building import asked_text, data, dropped, read, says, write_rows
from conftest import ROOT, command
from judge_server import serve

from sail_rl.command_line import BadInput

SURE, SPLIT, WRONG = ("What is A plus B?", "What is A times B?", "What is B minus A?")
TAUGHT = [(SURE, "3"), (SPLIT, "4"), (SPLIT, "5"), (WRONG, "6")]
SMALL = ("trainer.mixed_precision='no'", "trainer.gradient_checkpointing=false", "optim.lr_scheduler_type=constant")


def row(question, answer, **more):
    return {"question": question, "answer": answer, "images": ["red.png"]} | more


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A folder with traces that `data cot` has had written, and a model that LongCoT SFT has made from them."""
    folder = tmp_path_factory.mktemp("chain")
    rows = write_rows(folder, [row(*one) for one in TAUGHT], "known.jsonl")

    def teacher(body, number):
        answer = asked_text(body).split("right answer to the question above is: ")[1][0]
        return says(f"<think>I look at both cards, and find {answer}.</think>\\boxed{{{answer}}}")

    with serve(teacher) as server:
        data("cot", rows, "--output", folder / "traces.jsonl", "--base-url", server.url, "--model", "teacher")
    run = folder / "longcot"
    model = ("model.path=null", "model.random_init=tiny", f"data.train={folder / 'traces.jsonl'}", f"output_dir={run}")
    learning = ("sft.samples_per_step=4", "optim.learning_rate=3e-3", "trainer.num_train_epochs=40")
    result = command("sail_rl/train_sft.py", "recipes/sft_longcot.yaml", *model, *learning, *SMALL)
    assert result.returncode == 0, result.stderr
    return folder


def recipe(folder, file, *more):
    """The recipe and its overrides, for the taught model and rows of a file."""
    overrides = (f"model={folder / 'longcot/final'}", f"data.train={file}", "rollout.max_completion_length=40")
    return (ROOT / "recipes/quickstart.yaml", *overrides, "data.eval=null", *more)


def test_questions_that_are_challenging_yet_solvable(taught, tmp_path):
    easy = {"needs_thinking": False}
    rows = [row(SURE, "3"), row(SPLIT, "4"), row(WRONG, "9"), row(WRONG, "9", **easy), {"question": "No answer?"}]
    output = tmp_path / "out.jsonl"
    data("passrate", *recipe(taught, write_rows(tmp_path, rows)), "--output", output, "--samples", 8)
    split, unsolved = read(output)
    assert (split["question"], split["samples"], split["correct"] / 8) == (SPLIT, 8, split["pass_rate"])
    assert 0 < split["correct"] < 8
    assert (unsolved["question"], unsolved["correct"], unsolved["pass_rate"]) == (WRONG, 0, 0)
    assert dropped(output) == {1: "always solved", 3: "never solved", 5: "malformed row"}
    report = json.loads(output.with_suffix(".report.json").read_text())
    assert report["figures"]["right of 8"] == {"0": 2, str(split["correct"]): 1, "8": 1}
    assert not output.with_suffix(".run").exists()


def test_right_traces_of_its_own_become_rows_for_think_fusion(taught, tmp_path):
    rows = [row(SURE, "3", id="sure"), row(SPLIT, "4"), row(WRONG, "9")]
    output = tmp_path / "traces.jsonl"
    data("reject", *recipe(taught, write_rows(tmp_path, rows)), "--output", output, "--samples", 8, "--keep", 2)
    assert dropped(output) == {3: "no attempt is right"}
    traces = read(output)
    assert {one["question"] for one in traces} == {SURE, SPLIT}
    assert all(one["kind"] == "cot" and f"find {one['answer']}" in one["reasoning"] for one in traces)
    data("filter", output, "--output", tmp_path / "clean.jsonl", "--needs-reasoning")
    run = tmp_path / "fusion"
    files = (f"data.train.0.path={write_rows(tmp_path, [row(SURE, '3')], 'direct.jsonl')}",)
    files += (f"data.train.1.path={tmp_path / 'clean.jsonl'}", "data.train.0.weight=1", "data.max_bad_rows=0")
    steps = ("trainer.num_train_epochs=null", "trainer.max_steps=2", "sft.samples_per_step=4")
    model = (f"model={taught / 'longcot/final'}", f"output_dir={run}")
    result = command("sail_rl/train_sft.py", "recipes/sft_think_fusion.yaml", *model, *files, *steps, *SMALL)
    assert result.returncode == 0, result.stderr
    records = read(run / "metrics.jsonl")
    assert [(one["samples/cot"], one["samples/direct"], one["data/bad_rows"]) for one in records] == [(2, 2, 0)] * 2
    assert records[0]["nll/cot"] < records[0]["nll/direct"]  # its own traces against what it never answered so


@pytest.mark.slow
def test_killed_at_work_the_attempts_are_the_same(taught, tmp_path):
    """The seeds of a row's attempts are its own, so what is done after an end is what would have been done before."""
    rows = [row(SPLIT, str(4 + n % 2), id=str(n)) for n in range(40)]
    file = write_rows(tmp_path, rows)
    chunks = ("rollout.batch_size=8", "seed=3")
    data("passrate", *recipe(taught, file, *chunks), "--output", tmp_path / "whole.jsonl")
    output = tmp_path / "out.jsonl"
    progress = output.with_name("out.jsonl.progress")
    arguments = ["data", "passrate", *recipe(taught, file, *chunks), "--output", output]
    begin = [sys.executable, "-m", "sail_rl.cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(begin, cwd=tmp_path, env=environment) as worker:
        end = time.monotonic() + 300
        while not (progress.is_file() and progress.read_bytes().count(b"\n") > 2) and time.monotonic() < end:
            time.sleep(0.01)
        worker.kill()
    assert worker.returncode == -signal.SIGKILL
    done = progress.read_bytes().count(b"\n") - 1
    assert 0 < done < 40
    data(*arguments[1:])
    assert read(output) == read(tmp_path / "whole.jsonl")
    assert dropped(output) == dropped(tmp_path / "whole.jsonl")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("passrate", ("--samples", "0"), "--samples 0"),
        ("reject", ("--keep", "9"), "--keep 9: give 1 to 4"),
        ("reject", ("data.thinking=judge",), "reject collects reasoning"),
        ("reject", ("data.train=none.jsonl",), "none.jsonl: there is no such file"),
        ("reject", ("model=runs/none",), "model.path = runs/none: there is no checkpoint"),
        ("passrate", ("rollout.engin=hf",), "rollout.engin = .*unknown key"),
        ("passrate", ("data.train=pictures",), "has no end; say how many rows with --limit"),
    ],
)
def test_mistakes_are_named(tmp_path, name, arguments, message):
    changes = [one for one in arguments if "=" in one]
    options = [one for one in arguments if "=" not in one]
    base = (ROOT / "recipes/quickstart.yaml", "model=some/name", f"data.train={write_rows(tmp_path, [row(SURE, '3')])}")
    with pytest.raises(BadInput, match=message):
        data(name, *base, *changes, "--output", tmp_path / "out.jsonl", *options)
