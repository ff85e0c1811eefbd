"""`sail-rl data cot`, `freeform` and `distill-answer` through the real client, against a scripted endpoint."""

import json
import os
import signal
import subprocess
import sys

import pytest
from building import asked_text, data, dropped, number_in, read, says, write_rows
from conftest import ROOT
from judge_server import serve, verdict

from rewards import endpoint
from sail_rl.command_line import BadInput

QUICK = ("--model", "m", "--tries", "2", "--call-seconds", "5")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)


def questions(count, **more):
    return [
        {"id": f"q{n}", "question": f"Question {n}", "answer": str(n), "images": ["red.png"]} | more
        for n in range(count)
    ]


def trace(number, thought="I see it in the picture, and count."):
    return says(f"<think>{thought}</think>\n\\boxed{{{number}}}")


def run(command, folder, rows, script, *more):
    """The output, the requests, and what the command raised."""
    output, problem = folder / "out.jsonl", None
    with serve(script) as server:
        try:
            data(command, write_rows(folder, rows), "--output", output, "--base-url", server.url, *QUICK, *more)
        except BadInput as mistake:
            problem = str(mistake)
    return output, server.requests, problem


def test_traces_are_kept_where_answer_and_form_are_right(tmp_path):
    replies = {
        0: trace(0),
        1: trace(7),
        2: says("It is \\boxed{2}."),
        3: trace(3, "We know the given answer, which must be three."),
        4: says("I cannot", refusal="no"),
        5: says("<think>I see", "length"),
        6: (400, '{"error": {"message": "the picture is too large"}}'),
    }
    output, requests, problem = run("cot", tmp_path, questions(7), lambda body, _: replies[number_in(body)])
    assert problem is None
    (row,) = read(output)
    assert (row["reasoning"], row["answer"], row["kind"]) == ("I see it in the picture, and count.", "0", "cot")
    assert (tmp_path / row["images"][0]).is_file()
    assert dropped(output) == {
        2: "its own answer is another one",
        3: "the form is wrong",
        4: "it speaks of the answer that it was told",
        5: "the model declined",
        6: "the reply was cut off",
        7: "the endpoint refuses the request",
    }
    assert len(requests) == 1 + 2 * 6  # two attempts, where the first is not right
    assert {body["seed"] for body in requests} == {1, 2}
    picture = requests[0]["messages"][0]["content"][0]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    report = json.loads(output.with_suffix(".report.json").read_text())
    assert (report["read"], report["written"], sum(report["dropped"].values())) == (7, 1, 6)
    assert "its own answer is another one" in output.with_suffix(".report.md").read_text()


def test_a_second_attempt_and_rows_that_need_none(tmp_path):
    rows = [*questions(2), *questions(1, reasoning="It has one.", id="known"), {"question": "no answer"}]
    rows += [{"messages": [{"role": "user", "content": "Question 1"}, {"role": "assistant", "content": "Who knows?"}]}]
    rows[-1] |= {"solution": "It is clear that \\boxed{1}"}
    output, requests, _ = run(
        "cot", tmp_path, rows, lambda body, number: trace(number_in(body) if body["seed"] == 2 else 99)
    )
    assert [row["reasoning"][:6] for row in read(output)] == ["I see ", "I see ", "It has", "I see "]
    assert len(requests) == 2 * 3
    turned = read(output)[-1]
    assert turned["prompt"] == [{"role": "user", "content": "Question 1"}]
    assert (turned["answer"], "messages" in turned, "solution" in turned) == ("1", False, False)
    assert dropped(output) == {4: "malformed row"}


def test_rows_that_cannot_be_asked_about(tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no picture")
    rows = [*questions(1), *questions(1, images=["none.png"]), *questions(1, images=["torn.png"])]
    rows.append({"question": "<video>Why?", "answer": "1", "videos": ["a.mp4"]})
    output, requests, problem = run("cot", tmp_path, rows, lambda body, _: trace(0))
    assert (problem, len(requests), len(read(output))) == (None, 1, 1)
    assert dropped(output) == {2: "malformed row", 3: "malformed row", 4: "cannot be asked about"}


def test_an_output_without_rows_says_so(tmp_path):
    output, _, problem = run("cot", tmp_path, questions(2), lambda *_: trace(9))
    assert "has no rows: all 2 were dropped" in problem
    assert read(output) == []
    assert dropped(output) == dict.fromkeys((1, 2), "its own answer is another one")
    assert not output.with_name("out.jsonl.progress").exists()


@pytest.mark.fault(
    fault="data building: its endpoint fails",
    injected="errors for some rows",
    expected="no row is lost",
)
def test_an_endpoint_that_fails_costs_no_row(tmp_path):
    """What is done is kept, what is not is asked about by the same command, later."""
    state = {"up": True}

    def script(body, number):
        return trace(number_in(body)) if state["up"] and number <= 6 else (503, "{}")

    output, requests, problem = run("cot", tmp_path, questions(12), script, "--concurrency", 1)
    assert "rows could not be done" in problem or "fails: status: 503" in problem
    assert not output.exists()
    begun = len(read(output.with_name("out.jsonl.progress"))) - 1
    assert begun == 6
    output, requests, problem = run("cot", tmp_path, questions(12), lambda body, _: trace(number_in(body)))
    assert (problem, len(requests)) == (None, 6)
    assert [row["id"] for row in read(output)] == [f"q{n}" for n in range(12)]
    assert not output.with_name("out.jsonl.progress").exists()
    _, requests, _ = run("cot", tmp_path, questions(12), lambda *_: (500, "{}"))  # finished: nothing is asked
    assert requests == []


@pytest.mark.parametrize("reply", [(401, "{}"), (404, '{"error": {"message": "no such model"}}'), (400, "{}")])
def test_an_endpoint_that_refuses_everything_drops_nothing(tmp_path, reply):
    output, requests, problem = run("cot", tmp_path, questions(40), lambda *_: reply, "--concurrency", 2)
    assert f"status: {reply[0]}" in problem
    assert len(requests) == 8  # one chunk
    assert len(read(output.with_name("out.jsonl.progress"))) == 1


def test_other_settings_do_not_go_on(tmp_path):
    run("cot", tmp_path, questions(3), lambda body, number: trace(0) if number < 2 else (503, "{}"), "--concurrency", 1)
    _, _, problem = run("cot", tmp_path, questions(3), lambda *_: trace(0), "--attempts", 3)
    assert "other settings" in problem
    assert "attempts: it was 2, now 3" in problem
    output, _, problem = run("cot", tmp_path, questions(3), lambda body, _: trace(number_in(body)))
    assert (problem, len(read(output))) == (None, 3)
    _, _, problem = run("cot", tmp_path, questions(4), lambda *_: trace(0))
    assert "input: it was" in problem


@pytest.mark.fault(
    fault="data building: killed",
    injected="SIGKILL at work",
    expected="goes on where it was",
)
def test_killed_at_work_it_goes_on(tmp_path):
    rows, output = write_rows(tmp_path, questions(12)), tmp_path / "out.jsonl"

    def script(body, number):
        if number == 11:
            worker.kill()  # in the middle of the third chunk of four
            return "hang"
        return trace(number_in(body))

    with serve(script) as server:
        arguments = ["data", "cot", rows, "--output", output, "--base-url", server.url, *QUICK, "--concurrency", "1"]
        command = [sys.executable, "-m", "sail_rl.cli", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        worker = subprocess.Popen(command, cwd=tmp_path, env=environment)
        assert worker.wait(120) == -signal.SIGKILL
        progress = output.with_name("out.jsonl.progress")
        assert len(read(progress)) == 1 + 8
        with progress.open("a") as file:
            file.write('{"row": 8, "id": "q8", "ke')  # as an end in the middle of writing would leave it
        server.script, before = lambda body, _: trace(number_in(body)), len(server.requests)
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert "8 of 12 rows are done" in result.stdout
        assert len(server.requests) - before == 4
    assert [row["id"] for row in read(output)] == [f"q{n}" for n in range(12)]
    assert [row["answer"] for row in read(output)] == [str(n) for n in range(12)]


# freeform

CIRCLE = "What is the area of the square?\nA. 4\nB. 9 cm\nC. 16\nD. 25"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": CIRCLE, "answer": "C"}, ("What is the area of the square?", "16", "number")),
        ({"question": CIRCLE, "answer": "(B)"}, ("What is the area of the square?", "9 cm", "unit")),
        ({"question": CIRCLE, "answer": "25"}, ("What is the area of the square?", "25", "number")),
        (
            {"question": "Find $x$.", "options": ["3", "2\\sqrt{2}"], "answer": "B"},
            ("Find $x$.", "2\\sqrt{2}", "number"),
        ),
        (
            {"question": "<image>How long is AB? Choices: (A) 3 (B) 4 (C) 5", "answer": "A"},
            ("<image>How long is AB?", "3", "number"),
        ),
        (
            {
                "question": "How many? Answer with the option's letter from the given choices.",
                "answer": "A",
                "options": {"A": "1", "B": "2"},
            },
            ("How many?", "1", "number"),
        ),
        ({"question": "Question: 3 (A) or more?", "answer": "yes"}, "not multiple choice"),
        ({"question": "Which of the following is prime?\nA. 4\nB. 5", "answer": "B"}, "needs a model"),
        ({"question": "What could be x?\nA. 4\nB. 5", "answer": "B"}, "needs a model"),
        ({"question": "What colour is it?\nA. red\nB. blue", "answer": "B"}, "needs a model"),
        ({"question": "What is x?\nA. 4\nB. None of the above", "answer": "B"}, "its right option speaks of others"),
        ({"question": "What is x?\nA. 4\nB. 5", "answer": "E"}, "its answer is none of its options"),
        ({"question": "What is x?", "answer": "B", "answer_type": "letter"}, "its options are not there"),
        ({"question": "What are x and y?\nA. 4\nB. 5", "answer": "A, B"}, "several of its options are right"),
    ],
)
def test_what_is_sure_without_a_model(tmp_path, row, expected):
    output, filler = tmp_path / "out.jsonl", {"question": "Why?", "answer": "1"}
    row = {"images": ["red.png"]} | row
    data("freeform", write_rows(tmp_path, [row, filler]), "--output", output)
    rows, reasons = read(output), dropped(output)
    if isinstance(expected, tuple):
        assert (rows[0]["question"], rows[0]["answer"], rows[0]["answer_type"]) == expected
        assert "options" not in rows[0]
        assert rows[0]["choice"]["answer"] == row["answer"]
    elif expected == "not multiple choice":
        assert rows[0] == row | {"images": ["red.png"]}
    else:
        assert reasons[1].startswith(expected)
    assert rows[-1]["question"] == "Why?"


def rephrased(question, answer, possible=True):
    return says(json.dumps({"possible": possible, "question": question, "answer": answer}))


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (rephrased("Which prime lies between 4 and 6?", "5"), None),
        (rephrased("Which prime is it?", "7"), "the model's answer is another one"),
        (rephrased("Which of the options is prime?", "5"), None),  # the old question leant on them, too
        (rephrased("Is 5 the prime?", "5"), "the model's question gives the answer away"),
        (rephrased("<image>Which prime?", "5"), "the model's question has marks of its own"),
        (rephrased("", "", possible=False), "the model finds it cannot be free form"),
        (says("Sure! Here it is."), "the reply cannot be read"),
        (says('```json\n{"possible": true, "question": "Which prime?", "answer": "5"}\n```'), None),
    ],
)
def test_what_a_model_puts_in_other_words(tmp_path, reply, reason):
    rows = [{"question": "<image>Which of the following is prime?\nA. 4\nB. 5", "answer": "B", "images": ["red.png"]}]
    rows.append({"question": "Why?", "answer": "1"})
    output, (body,), problem = run("freeform", tmp_path, rows, lambda *_: reply)
    assert problem is None
    assert "of which B is right" in asked_text(body)
    if reason:
        assert dropped(output) == {1: reason}
    else:
        row = read(output)[0]
        assert row["question"].startswith("<image>Which")
        assert (row["answer"], row["answer_type"]) == ("5", "number")


# distill-answer


def test_wordy_answers_become_short_where_both_say_the_same(tmp_path):
    long = "After a good look at the picture it must be said that there are {} cards in all."
    rows = [{"question": f"Question {n}", "answer": long.format(n), "id": f"q{n}"} for n in range(6)]
    parts = [{"type": "text", "text": "Two"}, {"type": "text", "text": "parts?"}]
    rows.append({"prompt": [{"role": "user", "content": parts}], "answer": long.format(1)})
    rows += [
        {"question": "Short?", "answer": "5 cm"},
        {"question": "Boxed?", "solution": "So it is \\boxed{3}, as said."},
    ]
    replies = {0: "0", 1: "1 card", 2: "99", 3: "", 4: "4 of the cards that are in all of them", 5: "5"}

    def script(body, number):
        if "json_schema" in str(body) and "is_same_answer" in str(body["response_format"]):
            return verdict("\n5\n" not in asked_text(body))
        return says(json.dumps({"answer": replies[number_in(body)]}))

    output, requests, problem = run("distill-answer", tmp_path, rows, script)
    assert problem is None
    assert [row["answer"] for row in read(output)] == ["0", "1 card", "5 cm", "3"]
    assert read(output)[0]["wordy_answer"] == long.format(0)
    assert dropped(output) == {
        3: "the model's answer has a number that is not in the text",
        4: "the model finds no short answer in it",
        5: "the model's answer is wordy, too",
        6: "the short answer is not the same",
        7: "cannot be asked about",
    }
    assert len(requests) == 6 + 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cot", "none.jsonl", "--base-url", "http://x/v1", "--model", "m"), "none.jsonl: there is no such file"),
        (("cot", "rows.jsonl", "--base-url", "x", "--model", "m"), "--base-url x: it must begin with http"),
        (("cot", "rows.jsonl", "--base-url", "http://x/v1", "--model", "m", "--api-key-env", "NO_KEY"), "NO_KEY"),
        (("cot", "rows.jsonl", "--base-url", "http://x/v1", "--model", "m", "--attempts", "0"), "--attempts 0"),
        (("freeform", "rows.jsonl", "--model", "m"), "--base-url and --model: give both"),
        (("filter", "rows.jsonl", "--columns", "question"), "write each as ours=theirs"),
        (("filter", "rows.jsonl", "--overlap", "2"), "--overlap 2.0"),
        (("filter", "pictures"), "has no end; say how many rows with --limit"),
        (("filter", "out.jsonl"), "there is no such file"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path, questions(1))
    with pytest.raises(BadInput, match=message):
        data(*arguments, "--output", "out.jsonl")


def test_an_output_that_is_the_input_or_someone_elses_is_refused(tmp_path):
    rows = write_rows(tmp_path, questions(1))
    with pytest.raises(BadInput, match="it is the input"):
        data("filter", rows, "--output", rows)
    (tmp_path / "mine.jsonl").write_text("{}\n")
    with pytest.raises(BadInput, match="there is a file of that name, without a report"):
        data("filter", rows, "--output", tmp_path / "mine.jsonl")
    with pytest.raises(BadInput, match=r"must end in \.jsonl"):
        data("filter", rows, "--output", tmp_path / "rows.parquet")
