"""The format reward: each contract by a table, columns, and time that grows with the text."""

import pytest
from linear_time import takes_linear_time

from rewards.format import format_reward, format_verdicts
from rewards.verdict import Outcome

THOUGHT = "The card shows 2 and 3, which add up to 5."
GOOD = rf"<think>{THOUGHT}</think>" "\n" r"The answer is \boxed{5}."

# completion, is it well formed, what it shows
THINK = [
    (GOOD, True, "as asked"),
    (
        rf"<think>{THOUGHT} Is it \boxed{{4}}? {THOUGHT}</think>\boxed{{\frac{{1}}{{2}}}}",
        True,
        "boxes in thought are free",
    ),
    (rf"<think>{THOUGHT}</think>\boxed{{5}}" + " " * 200, True, "a tail of 200"),
    (rf"<think>{THOUGHT}</think>\boxed{{5}}" + " " * 201, False, "a tail of 201"),
    (" " + GOOD, False, "does not open with the tag"),
    ("Sure! " + GOOD, False, "text ahead of the tag"),
    (rf"{THOUGHT}</think>\boxed{{5}}", False, "opened in the prompt: not supported"),
    (r"\boxed{5}", False, "no think block"),
    (r"<think></think>\boxed{5}", False, "an empty think block"),
    (r"<think>" + " \n" * 50 + r"</think>\boxed{5}", False, "a blank think block"),
    (r"<think>short thought</think>\boxed{5}", False, "13 characters"),
    (r"<think>a thought of     15</think>\boxed{5}", False, "15 characters, blanks in a row counted as one"),
    (r"<think>a thought of 16+</think>\boxed{5}", True, "16 characters"),
    (rf"<think>{THOUGHT} \boxed{{5}}</think>", False, "the box in thought alone"),
    (rf"<think>{THOUGHT} \boxed{{5}}", False, "unclosed"),
    (rf"<think>{THOUGHT}</think></think>\boxed{{5}}", False, "closed twice"),
    (rf"<think><think>{THOUGHT}</think>\boxed{{5}}", False, "opened twice"),
    (rf"<think>{THOUGHT}</think>\boxed{{5}}<think>{THOUGHT}</think>\boxed{{5}}", False, "two blocks"),
    (rf"</think>{THOUGHT}<think>\boxed{{5}}", False, "out of order"),
    (rf"<think>{THOUGHT}</think>The answer is 5.", False, "no box"),
    (rf"<think>{THOUGHT}</think>\boxed{{5}} \boxed{{5}}", False, "two boxes"),
    (rf"<think>{THOUGHT}</think>\boxed{{\boxed{{5}}}}", False, "a box in a box"),
    (rf"<think>{THOUGHT}</think>\boxed{{ }}", False, "an empty box"),
    (rf"<think>{THOUGHT}</think>\boxed{{5", False, "an unclosed box"),
    (rf"<think>{THOUGHT}</think>\boxed{{ \boxed{{5}}", False, "an unclosed box around one"),
    (rf"<judge>hard</judge><think>{THOUGHT}</think>\boxed{{5}}", False, "a judge block that was not asked for"),
    ("", False, "nothing"),
]
DIRECT = [
    (r"\boxed{5}", True, "the box"),
    (r"The answer is \boxed{5}.", True, "a sentence with the box"),
    ("<think>\n\n</think>\n" r"\boxed{5}", True, "an empty think block first"),
    (r"The answer <think></think> is \boxed{5}", False, "the empty block is not first"),
    (GOOD, False, "thought"),
    (r"<think>\boxed{5}", False, "unclosed"),
    (r"\boxed{5} or \boxed{6}", False, "two boxes"),
    (r"The answer is 5.", False, "no box"),
    (r"<judge>no</judge>\boxed{5}", False, "a judge block"),
]
JUDGE = [
    (rf"<judge>Two steps.</judge><think>{THOUGHT}</think>\boxed{{5}}", True, "all three"),
    ("<judge>Direct.</judge>\n<think></think>\n" r"\boxed{5}", True, "nothing to think about"),
    (r"<judge> </judge><think></think>\boxed{5}", False, "a blank judgement"),
    (r"<judge>Direct.</judge>\boxed{5}", False, "no think block"),
    (r"<judge>Direct.</judge> so <think></think>\boxed{5}", False, "text between the blocks"),
    (rf"<think>{THOUGHT}</think><judge>Two steps.</judge>\boxed{{5}}", False, "out of order"),
    (rf"<judge>Two steps.<think>{THOUGHT}</think></judge>\boxed{{5}}", False, "nested"),
    (GOOD, False, "no judge block"),
]
ROWS = [(contract, *row) for contract, rows in (("think", THINK), ("direct", DIRECT), ("judge", JUDGE)) for row in rows]


@pytest.mark.parametrize(("contract", "completion", "good", "note"), ROWS)
def test_contracts(contract, completion, good, note):
    assert format_reward([completion], contract=contract) == [float(good)], note
    message = [{"role": "assistant", "content": [{"type": "text", "text": completion}]}]
    assert format_reward([message], contract=contract) == [float(good)], note


def test_the_column_thinking_goes_before_the_contract():
    rewards = format_reward(
        completions=[GOOD, r"\boxed{5}", GOOD], thinking=["think", "direct", None], prompts=["p"] * 3
    )
    assert rewards == [1.0, 1.0, 1.0]
    assert format_reward([GOOD, r"\boxed{5}"], thinking=["direct", "think"]) == [0.0, 0.0]


def test_a_truncated_completion_scores_zero():
    assert format_reward([GOOD] * 3, finish_reason=["stop", "length", None]) == [1.0, 0.0, 1.0]
    found = format_verdicts([GOOD, GOOD, "no box"], finish_reason=["stop", "length", "stop"])
    assert [verdict.outcome for verdict in found] == [Outcome.CORRECT, Outcome.NO_ANSWER, Outcome.WRONG]


def test_an_unknown_contract_is_named():
    with pytest.raises(ValueError, match="unknown contract 'thinks'"):
        format_reward([GOOD], contract="thinks")


@pytest.mark.parametrize("contract", ["think", "direct", "judge"])
@pytest.mark.parametrize(
    "piece", ["<think>", "</think>", r"\boxed{", r"</think>\boxed{", "<judge>", " ", "{", "\\", "a "]
)
@pytest.mark.fault(
    fault="property: time",
    injected="completions of one piece repeated, for the format reward",
    expected="linear in the length",
)
def test_time_is_linear_in_the_text(piece, contract):
    def work(times):
        assert format_reward([f"<think>{THOUGHT}" + piece * 10_000 * times], contract) == [0.0]

    assert takes_linear_time(work)
