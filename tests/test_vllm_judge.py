"""The judge's client against `vllm serve` with a tiny model, whose replies the schema keeps in form."""

import pytest
from vllm_serving_process import vllm_serve

from rewards import think_quality_reward
from rewards.call import RewardError
from rewards.canaries import check_judge
from rewards.judge import Judge, JudgeSettings
from rewards.think_quality import CHECKS
from sail_rl.data.pictures import picture_row

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def endpoint(start, tmp_path_factory):
    """The address of a server with a tiny model."""
    # A model that knows nothing would else write blanks between the braces for ever.
    options = ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    log = tmp_path_factory.mktemp("server") / "server.log"
    with vllm_serve(start, log, "--max-model-len", "4096", *options) as url:
        yield url


def test_verdicts_on_pictures(endpoint, tmp_path):
    rows = [picture_row("train", index, families=["cards"], levels=[1], forms=["sum"]) for index in range(2)]
    for index, row in enumerate(rows):
        row["images"][0].save(tmp_path / f"{index}.png")
    judge = Judge(
        JudgeSettings(endpoint, "tiny", call_seconds=120, max_tokens=1500, cache=tmp_path / "verdicts.sqlite")
    )
    columns = {
        "completions": [f"<think>{row['reasoning']}</think>\n\\boxed{{{row['answer']}}}" for row in rows],
        "question": [row["question"] for row in rows],
        "images": [[str(tmp_path / f"{index}.png")] for index in range(2)],
    }
    found = think_quality_reward(judge=judge, **columns)
    assert judge.problems == []
    assert all(found.checks[name][index] in (0.0, 1.0) for name in CHECKS for index in range(2))
    unreachable = Judge(
        JudgeSettings("http://127.0.0.1:9/v1", "tiny", cache=tmp_path / "verdicts.sqlite", max_tokens=1500)
    )
    assert think_quality_reward(judge=unreachable, **columns) == found  # all from the file


def test_a_model_that_the_server_does_not_have(endpoint):
    with pytest.raises(RewardError, match=r"the judge 'other' at http.* fails: 21 of 21 questions .* status: 404"):
        check_judge(Judge(JudgeSettings(endpoint, "other")), "What is it?", "7", [])
