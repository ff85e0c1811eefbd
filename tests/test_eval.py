"""Predictions and their summary, also for data whose columns collide with what the judges expect."""

from rollouts import Prompt, Rollout
from sail_rl.data.example import Example
from sail_rl.eval import judge, summarise
from sail_rl.questions import Question

RIGHT = "<think>The card shows a five.</think>\n\\boxed{5}"


def question(position, **columns):
    content = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]
    row = {"answer": "5", "images": []} | columns
    return Question(Example(f"q{position}", content, (), row, False), Prompt(f"q{position}", [1], seed=position))


def predictions(texts, tmp_path, **columns):
    questions = [question(i, **columns) for i in range(len(texts))]
    return judge(questions, [Rollout([1, 2], [0.0, 0.0], text, "stop", 0) for text in texts], "think", tmp_path)


def test_a_prediction_says_what_was_asked_written_and_right(tmp_path):
    right, wrong, bare = predictions([RIGHT, RIGHT.replace("5", "6"), "5"], tmp_path)
    assert (right["id"], right["question"], right["answer"], right["completion"]) == ("q0", "What is it?", "5", RIGHT)
    assert [p["correct"] for p in (right, wrong)] == [True, False]
    assert [p["well_formed"] for p in (right, wrong, bare)] == [True, True, False]


def test_columns_of_the_data_do_not_disturb_the_judges(tmp_path):
    (right,) = predictions([RIGHT], tmp_path, contract="a column of the data")
    assert right["correct"]
    assert right["well_formed"]


def test_what_cannot_be_judged_is_wrong_and_said(tmp_path, capsys):
    (unknown,) = predictions([RIGHT], tmp_path, answer_type="poem")
    assert not unknown["correct"]
    assert "its answers count as wrong" in capsys.readouterr().err


def test_the_summary_has_the_majority_rate_and_the_families(tmp_path):
    after = predictions([RIGHT, RIGHT, "no"], tmp_path, family="cards")
    after[2]["answer"] = "7"
    summary = summarise([], after)
    assert summary["accuracy_before"] is None
    assert summary["majority_rate"] == summary["accuracy_after"] == 2 / 3
    assert summary["families"] == {"cards": {"after": 2 / 3, "questions": 3}}
    assert summarise([], [])["majority_rate"] is None
