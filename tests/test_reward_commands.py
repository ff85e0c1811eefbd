"""`sail-rl rewards test` and `sail-rl rewards audit`: what they print of good and of bad rewards."""

import json
import random

import pytest

from rewards.verdict import Outcome, verdict_of
from sail_rl import cli
from sail_rl.audit import kept

REWARDS = """
import random

def good(completions, answer, **columns):
    return [float(f"boxed{{{right}}}" in text) for text, right in zip(completions, answer)]

def crash(completions, **columns):
    return [1 / len(text) for text in completions]

def noisy(completions, **columns):
    return [random.random() for _ in completions]

def hang(completions, **columns):
    while any("9^{9" in text for text in completions):
        pass
    return [float(len(text)) for text in completions]

def constant(completions, **columns):
    return [1.0] * len(completions)

def first(completions, **columns):
    return [float(i == 0) for i in range(len(completions))]

def silent(completions, **columns):
    return [None if text else 0.0 for text in completions]
"""
ROWS = [{"id": "a", "question": "What is 2+3?", "answer": "5"}, {"question": "What is 2+5?", "answer": "7"}]


@pytest.fixture
def rewards_test(tmp_path, monkeypatch, capsys):
    """Runs the command; its exit code and what it printed."""
    (tmp_path / "mine.py").write_text(REWARDS)

    def run(function, *options, rows=ROWS):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        name = f"{tmp_path / 'mine.py'}:{function}" if function in REWARDS else function
        arguments = ["sail-rl", "rewards", "test", name, "--data", str(tmp_path / "rows.jsonl"), *options]
        monkeypatch.setattr("sys.argv", arguments)
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return run


@pytest.mark.parametrize(
    ("function", "options", "problem"),
    [
        ("crash", (), "reward 'crash': ZeroDivisionError: division by zero (mine.py, line"),
        ("crash", (), "it failed on 2 of 12 completions"),
        ("noisy", (), "the same call gives other values a second time"),
        ("hang", ("--timeout", "0.3"), "took more than 0.3 s of CPU time"),
        ("constant", ("--in-process",), "it gave 1 for every completion"),
        ("first", (), "values depend on the order of the completions"),
        ("silent", (), "it gave None for 10 of 12 completions"),
    ],
)
def test_problems_of_a_reward_are_named(rewards_test, function, options, problem):
    code, shown = rewards_test(function, *options)
    assert code == 1
    assert problem in shown


def test_a_good_reward_has_none(rewards_test):
    code, shown = rewards_test("good")
    assert code == 0
    assert "no problems" in shown
    assert [shown.count(kind) for kind in ("right", "wrong", "no box", "cut off", "empty", "hostile")] == [2] * 6
    code, shown = rewards_test("accuracy")
    assert code == 0
    assert [shown.count(outcome) for outcome in ("correct", "no_answer", "refused")] == [2, 6, 2]


def test_completions_of_the_rows_go_before_ours(rewards_test):
    rows = [{"answer": "5", "completions": [r"\boxed{5}", r"\boxed{6}"]}, {"answer": "7", "completion": r"\boxed{7}"}]
    code, shown = rewards_test("accuracy", rows=rows)
    assert (code, shown.count("given"), shown.count(" correct ")) == (0, 3, 2)


@pytest.mark.parametrize(
    ("function", "rows", "mistake"),
    [
        ("acuracy", ROWS, "did you mean accuracy?"),
        ("none.py:reward", ROWS, "there is no file"),
        ("good", [], "there are no rows in it"),
        ("good", [{"question": "Why?"}], "row 1: no `answer`"),
    ],
)
def test_mistakes_of_the_user(rewards_test, function, rows, mistake):
    code, shown = rewards_test(function, rows=rows)
    assert code == 2
    assert mistake in shown


def test_the_audit_shows_what_is_worth_a_look(tmp_path, monkeypatch, capsys):
    def record(answer, gold, outcome, seconds=0.001):
        value = float(outcome == "correct")
        texts = {"gold": gold, "answer": answer, "answer_type": None, "outcome": outcome, "value": value}
        return {"step": 3, "reward": "accuracy", "id": f"row {answer}", "seconds": seconds, **texts}

    records = [record("5", "5", "correct"), record("0.12 m", "12 cm", "correct"), record("9^{9}", "5", "refused")]
    records += [record("6", "5", "wrong", seconds=1.5), record("6=5", "5", "wrong")]
    (tmp_path / "verdicts.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr("sys.argv", ["sail-rl", "rewards", "audit", str(tmp_path)])
    cli.main()
    counts, slowest, troubled, differing = split(capsys)
    assert counts == "5 verdicts kept: accuracy correct 2, accuracy refused 1, accuracy wrong 2"
    assert "1500.0" in slowest.splitlines()[4]
    assert "9^{9}" in troubled
    assert "2 of 4 judged differently by math-verify" in differing
    assert "0.12 m" in differing
    assert "6=5" in differing


def split(capsys):
    """The audit's parts."""
    shown = capsys.readouterr().out
    counts, _, rest = shown.partition("\n")
    slowest, _, rest = rest.partition("refused, out of time")
    troubled, _, differing = rest.rpartition("2 of 4")
    return counts, slowest, troubled, "2 of 4" + differing


def test_a_folder_that_is_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sail-rl", "rewards", "audit", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "has no verdicts.jsonl" in capsys.readouterr().err


def test_what_a_run_keeps_of_a_step():
    outcomes = [Outcome.CORRECT, Outcome.WRONG] * 50 + [Outcome.REFUSED] * 20 + [Outcome.NO_ANSWER] * 20
    verdicts = [verdict_of(one, seconds=float(i == 130), answer="5") for i, one in enumerate(outcomes)]
    chosen = kept(verdicts, random.Random(0))
    assert 130 in chosen  # the slowest
    assert sum(verdicts[i].outcome == Outcome.REFUSED for i in chosen) == 8
    assert 8 <= sum(verdicts[i].outcome in (Outcome.CORRECT, Outcome.WRONG) for i in chosen) <= 9
