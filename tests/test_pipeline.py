"""`sail-rl pipeline`: stages in their order, what is finished skipped, mistakes before the first one starts."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, command
from openai import OpenAI
from vllm_serving_process import vllm_serve

from sail_rl.command_line import BadInput, load_recipe
from sail_rl.config_pipeline import PipelineRecipe, check_stages
from sail_rl.data.pictures import picture_row
from sail_rl.pipeline import commands_of, read_state

RESULT = ROOT / "runs/pipeline_tiny/model"
TOOL = ("-m", "sail_rl.cli", "pipeline")
CARDS = "source: pictures, families: [cards], levels: [1], forms: [sum]"
SFT, GRPO = "recipes/quickstart_sft.yaml", "recipes/quickstart.yaml"
TWO_STEPS = ["data.eval=null", "trainer.eval_every=null", "trainer.max_steps=2"]
SMALL_ROLLOUT = ["rollout.prompts_per_step=2", "rollout.num_generations=2", "rollout.max_completion_length=6"]


def start(name, *changes):
    return {"name": name, "train": SFT, "set": [*TWO_STEPS, "sft.samples_per_step=4", *changes], "evaluate": False}


def write(folder, stages, **more):
    """A recipe file of these stages, and its path."""
    modes = {"direct": [f"data.eval={{{CARDS}, rows: 4}}", "data.thinking=direct", "rollout.max_completion_length=6"]}
    values = {"output_dir": str(folder / "run"), "stages": stages, "evaluation": {"recipe": GRPO, "modes": modes}}
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(values | more, sort_keys=False))
    return path


def all_kinds():
    """A pipeline that has each kind of stage."""
    return [
        start("basic"),
        start("other", "model=<basic>", "data.train.seed=5"),
        {"name": "soup", "merge": ["basic", "other"], "evaluate": False},
        {
            "name": "solvable",
            "data": "passrate",
            "recipe": GRPO,
            # Easy questions, which are kept although a model that knows nothing never solves them.
            "set": ["model=<soup>", f"data.train={{{CARDS.replace('sum', 'number')}}}", *SMALL_ROLLOUT],
            "samples": 2,
            "limit": 6,
        },
        {
            "name": "rlvr",
            "train": GRPO,
            "set": ["model=<soup>", "data.train=<solvable>", *TWO_STEPS, *SMALL_ROLLOUT],
        },
    ]


@pytest.mark.parametrize("name", ["pipeline.yaml", "pipeline_tiny.yaml"])
def test_shipped_recipes_are_whole(name):
    """Every stage's recipe with its changes, and a command for each."""
    pipeline = load_recipe(PipelineRecipe, ROOT / "recipes" / name)
    check_stages(pipeline)
    commands = {key: one for stage in pipeline.stages for key, one in commands_of(pipeline, stage).items()}
    assert {"soup", "longcot", "rlvr", "fusion", "mixed", "mixed, thinking", "mixed, direct"} <= commands.keys()
    assert f"model{'' if 'tiny' in name else '.path'}={pipeline.output_of('fusion')}" in commands["mixed"].arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[1].update(set=["model=<later>"]), "stage other: <later> is no earlier stage; earlier are: basic"),
        (lambda s: s[1].update(name="basic"), "stage basic: there are two of this name"),
        (lambda s: s[2].update(merge=["basic"]), "stage soup: merge needs two stages or more"),
        (lambda s: s[2].update(train=SFT), "stage soup: give one of train, merge and data"),
        (lambda s: s[3].update(recipe=None), "stage solvable: `data` and `recipe` go together"),
        (lambda s: s.pop(), "stage solvable is the last, and makes no model"),
        (lambda s: s.append({"name": "m", "merge": ["soup", "solvable"]}), "stage m: solvable makes rows"),
        (lambda s: s[4].update(set=["rollout.engin=hf"]), "stage rlvr: recipes/quickstart.yaml has 1 mistake"),
        (
            lambda s: s[0].update(train="recipes/quickstar.yaml"),
            "stage basic: recipes/quickstar.yaml: there is no such",
        ),
        (lambda s: s[0].update(trane=SFT), "stages.0.trane"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, change, message):
    stages = all_kinds()
    change(stages)
    with pytest.raises(BadInput) as mistake:
        check_stages(load_recipe(PipelineRecipe, write(tmp_path, stages)))
    assert message in str(mistake.value)


def test_from_start_to_end(tmp_path):
    """Real commands, for brevity without a merge; a second start runs nothing, and another recipe is refused."""
    stages = [one for one in all_kinds() if one["name"] not in ("other", "soup")]
    path, run = write(tmp_path, json.loads(json.dumps(stages).replace("<soup>", "<basic>"))), tmp_path / "run"
    first = command(*TOOL, path)
    assert first.returncode == 0, first.stdout + first.stderr
    rows = json.loads((run / "stages.json").read_text())["stages"]
    assert [row["stage"] for row in rows] == ["basic", "solvable", "rlvr"]
    assert rows[-1]["direct"]["questions"] == 4
    assert "direct" not in rows[0]
    assert (run / "model/README.md").read_text().count("**rlvr**: trained by `recipes/quickstart.yaml`") == 1
    page = (run / "report.html").read_text()
    assert '<a href="rlvr/report.html">rlvr</a>' in page
    assert "direct: right" in page
    assert_answers_in_both_modes(run / "model")

    again = command(*TOOL, path)
    assert again.returncode == 0, again.stderr
    assert "basic is finished" in again.stdout
    assert "$ " not in again.stdout
    changed = command(*TOOL, path, "stages.2.set.4=trainer.max_steps=3")
    assert changed.returncode == 2
    assert "has run rlvr in another way (it had trainer.max_steps=2; now trainer.max_steps=3)" in changed.stderr


def assert_answers_in_both_modes(folder):
    """It is an ordinary folder, whose template has the switch."""
    from transformers import AutoModelForImageTextToText

    import sail_rl.model  # noqa: F401  (makes transformers know SAIL-VL2)
    from sail_rl.model.load import load_processor

    AutoModelForImageTextToText.from_pretrained(folder)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    texts = [
        load_processor(str(folder)).apply_chat_template(
            turn, add_generation_prompt=True, tokenize=False, enable_thinking=thinking
        )
        for thinking in (True, False)
    ]
    assert texts[0] != texts[1]


def test_a_failing_stage_ends_it_with_a_word(tmp_path):
    path = write(tmp_path, [start("basic", "model=runs/nowhere/final")])
    result = command(*TOOL, path)
    assert result.returncode == 2
    assert "runs/nowhere/final: there is no checkpoint" in result.stderr
    assert "basic has ended with code" in result.stderr
    assert "goes on" in result.stderr
    assert "Traceback" not in result.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("whole_group", [True, False], ids=["Ctrl-C", "kill -INT"])
@pytest.mark.fault(
    fault="pipeline: interrupted",
    injected="signals in each stage",
    expected="the same result as without",
)
def test_interrupted_in_each_stage_it_ends_alike(tmp_path, whole_group):
    """A tenth of the steps of recipes/pipeline_tiny.yaml: the same table as uninterrupted."""
    # What a shell starts in the background ignores it, and so would the pipeline.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    straight, broken = shortened(tmp_path / "straight"), shortened(tmp_path / "broken")
    assert subprocess.run([sys.executable, *TOOL, straight], cwd=ROOT).returncode == 0
    names = [stage["name"] for stage in yaml.safe_load(broken.read_text())["stages"]]
    interrupted = set()
    for name in names:
        if interrupt_in(broken, name, whole_group):
            interrupted.add(name)
    assert {"basic", "longcot", "solvable", "rlvr", "traces", "fusion", "mixed"} <= interrupted
    assert subprocess.run([sys.executable, *TOOL, broken], cwd=ROOT).returncode == 0
    tables = [figures_of(path.parent / "run/stages.json") for path in (straight, broken)]
    assert tables[0] == tables[1]


def shortened(folder: Path) -> Path:
    """The tiny pipeline with a tenth of the steps and few questions."""
    folder.mkdir()
    values = yaml.safe_load((ROOT / "recipes/pipeline_tiny.yaml").read_text())
    steps = {"basic": 40, "sister_a": 10, "sister_b": 10, "longcot": 40, "rlvr": 6, "fusion": 40, "mixed": 6}
    for stage in values["stages"]:
        if stage["name"] in steps:
            count = steps[stage["name"]]
            stage["set"] += [f"trainer.max_steps={count}", f"trainer.save_every={max(2, count // 4)}"]
        elif "data" in stage:
            stage |= {"limit": 60, "set": [*stage["set"], "rewards=[{function: format}]", "rollout.batch_size=16"]}
    values["evaluation"]["limit"] = 20
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(values | {"output_dir": str(folder / "run")}, sort_keys=False))
    return path


def interrupt_in(path: Path, name: str, whole_group: bool) -> bool:
    """Start it, and interrupt it in the middle of a stage; whether that was before the stage's end."""
    process = subprocess.Popen(
        [sys.executable, *TOOL, path], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if f"] {name}: " in line:
            break
    # In its work, not while torch is loading: a step is in the one file, or the other has been begun.
    run, folder = path.parent / "run", path.parent / "run" / name
    steps = lines_of(folder / "metrics.jsonl")
    while lines_of(folder / "metrics.jsonl") == steps and not (folder / "rows.jsonl.progress").is_file():
        if process.poll() is not None or name in read_state(run):
            break  # a mean of models has neither
        time.sleep(0.05)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 130, said
    assert "goes on from there" in said
    return name not in read_state(run)


def lines_of(file: Path) -> int:
    """0 where there is no file."""
    return file.read_text().count("\n") if file.is_file() else 0


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(not RESULT.is_dir(), reason="sail-rl pipeline recipes/pipeline_tiny.yaml makes the model first")
def test_the_result_is_served_in_both_modes(tmp_path):
    """`vllm serve` on the folder, asked with pictures by OpenAI's client: right with a thought, and without one."""
    options = ["--max-model-len", "512", "--reasoning-parser", "qwen3"]
    with vllm_serve(RESULT, tmp_path / "server.log", *options) as url:
        client = OpenAI(base_url=url, api_key="none")
        rows = [picture_row("validation", n, families=["cards"], levels=[1], forms=["number"]) for n in range(20)]
        for thinking in (True, False):
            replies = [ask(client, row, thinking) for row in rows]
            assert [bool(reply.reasoning) for reply in replies] == [thinking] * len(rows)
            right = [f"\\boxed{{{row['answer']}}}" in reply.content for row, reply in zip(rows, replies, strict=True)]
            assert sum(right) >= 16, [(reply.reasoning, reply.content) for reply in replies]


def ask(client, row, thinking):
    """One question with its picture; the reply's message."""
    file = io.BytesIO()
    row["images"][0].save(file, "PNG")
    picture = {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}
    content = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": row["question"]}]
    reply = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        extra_body={"chat_template_kwargs": {"enable_thinking": thinking}},
    )
    return reply.choices[0].message


def figures_of(file: Path) -> list[dict]:
    """The table without its seconds."""
    stages = json.loads(file.read_text())["stages"]
    return [{key: value for key, value in stage.items() if key != "minutes"} for stage in stages]
