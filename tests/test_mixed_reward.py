"""Training with the mixed reward through the real commands, and the judge that sees the scene."""

import json

import pytest
from conftest import SMALL_GRPO, command, forked
from judge_server import serve, verdict

from benchmarks import mixed_reward, scene_judge
from rewards import think_quality_reward
from rewards.canaries import check_judge
from rewards.judge import Judge, JudgeSettings
from sail_rl.data.example import make_example
from sail_rl.data.pictures import picture_row, question_row
from sail_rl.data.prompting import target_text

CARDS = {"families": ["cards"], "levels": [1], "forms": ["sum"]}
RECIPE = "recipes/quickstart_mixed.yaml"
SOUND = {"terse": (True, True, True), "wordy": (True, True, True), "careless": (False, True, False), "hasty": None}


@pytest.fixture(scope="module")
def scene_endpoint():
    with mixed_reward.scene_judge() as url:
        yield url


def checks_of(reasoning, answer, cards, question):
    return tuple(check(reasoning, answer, cards, question) for check in scene_judge.CHECKS.values())


def test_the_scene_is_seen_in_the_picture():
    for index in range(40):
        row = picture_row("train", index, **CARDS)
        digits = {card["label"]: card["digit"] for card in row["scene"]["cards"]}
        assert scene_judge.cards_of(row["images"][0]) == digits
    identity = question_row("validation", 17, **CARDS)["id"]
    assert mixed_reward.scene_of(identity) == {
        card["label"]: card["digit"] for card in question_row("validation", 17, **CARDS)["scene"]["cards"]
    }


@pytest.mark.parametrize("kind", ["terse", "wordy", "careless", "hasty"])
def test_the_traces_of_the_teachers(kind):
    for index in range(60):
        row = question_row("train", index, **CARDS)
        cards = {card["label"]: card["digit"] for card in row["scene"]["cards"]}
        reasoning = row["reasoning" if kind == "terse" else f"reasoning_{kind}"]
        answer = f"\\boxed{{{row.get(f'answer_{kind}', row['answer'])}}}"
        # A guess reads nothing and adds nothing, but it does say what is then answered.
        assert checks_of(reasoning, answer, cards, row["question"]) == (SOUND[kind] or (False, False, True))


@pytest.mark.parametrize(
    ("reasoning", "answer", "expected"),
    [
        ("A 3, B 1, C 2, D 5. 3 + 5 = 8.", "8", (True, True, True)),
        ("A 3, B 1, C 2, D 5. 5 + 3 = 8.", "8", (True, True, True)),
        ("A 3, B 1, C 2, D 5. 3 + 5 = 8.", "9", (True, True, False)),
        ("A 3, B 1, C 2, D 5. 3 + 5 = 9.", "9", (False, True, True)),
        ("A 3, B 1, C 2, D 4. 3 + 4 = 7.", "7", (True, False, True)),
        ("A 3, B 1, C 2, D 5. 3 + 1 = 4.", "4", (False, True, True)),
        ("A 3, D 5. 3 + 5 = 8. 1 + 1 = 2.", "8", (False, True, False)),
        ("3 + 5 = 8.", "8", (False, False, True)),
        ("8", "8", (False, False, False)),
        ("", "8", (False, False, False)),
        ("A 3, D 5. 3 + 5 = 8, and it is 9.", "9", (False, True, True)),
    ],
)
def test_the_checks_one_by_one(reasoning, answer, expected):
    cards = {"A": 3, "B": 1, "C": 2, "D": 5}
    assert checks_of(reasoning, f"\\boxed{{{answer}}}", cards, "What is A plus D?") == expected


def test_over_http_it_says_the_same_and_no_canary_fools_it(scene_endpoint, tmp_path):
    row = picture_row("train", 3, **CARDS)
    row["images"][0].save(tmp_path / "cards.png")
    judge = Judge(JudgeSettings(scene_endpoint, "scene"))
    check_judge(judge, row["question"], row["answer"], [str(tmp_path / "cards.png")])
    example = make_example(row, "row 3", {}, None)
    texts = [target_text(example, "think", kind) for kind in SOUND]
    columns = {"question": [row["question"]] * 4, "images": [[str(tmp_path / "cards.png")]] * 4}
    found = think_quality_reward(completions=texts, judge=judge, **columns)
    assert found.values == pytest.approx([1, 1, 1 / 3, 1 / 3])


# The trainer. Its model writes no think block yet, so a reward of the user's own asks the judge about every completion.

ASKING = """
from rewards.judge_prompt import JudgeQuestion


def asked(completions, judge, trainer_state, **columns):
    texts = [{"Text": f"{trainer_state.global_step}, {n}: {text}"} for n, text in enumerate(completions)]
    verdicts = judge.ask([JudgeQuestion("is_fine", "Is it fine?", "", text) for text in texts])
    return [None if verdict.value is None else float(verdict.value) for verdict in verdicts]
"""
CANARIES, TRIED, PER_STEP = 21, 2, 16


def train(run, start, url, *overrides):
    """Six steps with the user's reward."""
    (run.parent / "mine.py").write_text(ASKING)
    rewards = f"rewards=[{{function: accuracy}}, {{function: '{run.parent / 'mine.py'}:asked', weight: 0.5}}]"
    settings = (f"model={start}", f"output_dir={run}", f"judge.base_url={url}", "judge.tries=1", "trainer.max_steps=6")
    return command("sail_rl/train_grpo.py", RECIPE, *SMALL_GRPO, *settings, rewards, *overrides)


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def fails_after(steps):
    """An endpoint that is strict with canaries, then says yes and no by turns, and is down after so many steps."""

    def script(body, number):
        if number > CANARIES + TRIED + steps * PER_STEP:
            return (500, "{}")
        return verdict(number > CANARIES and number % 2 == 0)

    return script


@pytest.mark.fault(
    fault="judge: down for the whole run",
    injected="500 from some step on, real command",
    expected="exit code 2; finished steps are saved",
)
def test_a_judge_that_stays_down_ends_the_run(start, tmp_path):
    run = tmp_path / "run"
    with serve(fails_after(2)) as server:
        result = train(run, start, server.url)
        asked = len(server.requests)
    assert result.returncode == 2
    assert "the judge gave no verdict on 100% of what it was asked, and on more than 20% for 3 steps" in result.stderr
    assert "status: 500" in result.stderr
    records = metrics_of(run)
    assert [record["rewards/asked/failed"] for record in records] == [0, 0, 16, 16]  # the fifth step was not taken
    assert [record["reward"] > 0 for record in records] == [True, True, False, False]
    assert all(record["completion/masked"] == 0 for record in records)
    assert records[0]["grad_norm"] > 0
    assert CANARIES + TRIED + 2 * PER_STEP < asked <= CANARIES + TRIED + 5 * PER_STEP
    with serve(fails_after(9)) as server:  # it is back, elsewhere: the run goes on
        result = train(run, start, server.url)
    assert result.returncode == 0, result.stderr
    assert [record["rewards/asked/failed"] for record in metrics_of(run)] == [0, 0, 16, 16, 0, 0]


@pytest.mark.slow
@pytest.mark.fault(
    fault="judge: down for the whole run",
    injected="the same, judge.when_failing = continue",
    expected="the run goes on without the term and says so",
)
def test_a_run_may_go_on_without_its_judge(start, tmp_path):
    with serve(fails_after(1)) as server:
        result = train(tmp_path / "run", start, server.url, "judge.when_failing=continue", "judge.breaker=5")
        assert result.returncode == 0, result.stderr
        # The breaker: five failures at once or so many as are on their way, then one question a step.
        assert len(server.requests) < CANARIES + TRIED + 2 * PER_STEP + 5
    assert "breaker: " in result.stderr
    assert "its term is left out of these groups" in result.stderr
    assert [record["rewards/asked/failed"] for record in metrics_of(tmp_path / "run")] == [0] + [16] * 5


@pytest.mark.fault(
    fault="judge: naive",
    injected="a judge that always agrees, real command",
    expected="exit code 2 before the first step",
)
def test_a_judge_that_canaries_fool_stops_the_run_before_it_starts(start, tmp_path):
    with serve(lambda body, number: verdict(True)) as server:
        result = train(tmp_path / "run", start, server.url)
    assert result.returncode == 2
    assert "lets texts without any reasoning pass" in result.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()


ASKING_BY_TEXT = """
from rewards.judge_prompt import JudgeQuestion


def asked(completions, judge, **columns):
    verdicts = judge.ask([JudgeQuestion("is_fine", "Is it fine?", "", {"Text": text}) for text in completions])
    return [None if verdict.value is None else float(verdict.value) for verdict in verdicts]
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_ask_one_judge_as_one_process_does(start, tmp_path):
    """The same verdicts, failures and losses; both write to one file of verdicts."""
    (tmp_path / "mine.py").write_text(ASKING_BY_TEXT)
    rewards = f"rewards=[{{function: accuracy}}, {{function: '{tmp_path / 'mine.py'}:asked', weight: 0.5}}]"

    def script(body, number):
        if "is_fine" not in str(body["response_format"]):
            return verdict(False)  # a canary
        characters = sum(map(ord, body["messages"][1]["content"][-1]["text"]))
        return (503, "{}") if characters % 5 == 0 else verdict(characters % 2 == 0)

    common = (*SMALL_GRPO, f"model={start}", "judge.tries=1", "trainer.max_steps=2", rewards)
    figures, asked = {}, {}
    for count, launcher in ((1, {}), (2, {"launcher": forked(2)})):
        run = tmp_path / str(count)
        with serve(script) as server:
            settings = (f"output_dir={run}", f"judge.base_url={server.url}")
            result = command("sail_rl/train_grpo.py", RECIPE, *common, *settings, **launcher)
            asked[count] = len(server.requests)
        assert result.returncode == 0, result.stderr[-3000:]
        assert json.loads((run / "environment.json").read_text())["processes"] == count
        names = ("rewards/asked/mean", "rewards/asked/failed", "reward", "loss", "grad_norm")
        figures[count] = [[record[name] for name in names] for record in metrics_of(run)]
    assert figures[2] == [pytest.approx(step, rel=1e-5, abs=1e-6) for step in figures[1]]
    assert len(figures[2]) == 2
    assert sum(step[1] for step in figures[1]) > 0
    assert asked[2] >= asked[1] + CANARIES  # each process finds out for itself whether its judge can be trusted
