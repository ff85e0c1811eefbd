"""report.html: self-contained, complete, safe against what models write, and made from any part of a run folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sail_rl import report
from sail_rl.report import write_report

HOSTILE = "<think>a</think></script><img src=x onerror=alert(1)> \\boxed{3} \ud83d \u2028 {{title}} {{data}}"


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def prediction(number: int, *, correct: bool, completion: str = "\\boxed{4}") -> dict:
    row = {"id": f"q{number}", "question": "How many?", "answer": "4", "family": ["cards", "bars"][number % 2]}
    return row | {"completion": completion, "correct": correct, "images": [f"pictures/{number % 3}.png"]}


def member(step: int, group: int, number: int) -> dict:
    row = {"step": step, "id": f"t{group}", "question": "?", "answer": "4", "completion": HOSTILE}
    row |= {"images": ["pictures/0.png"], "reward": 1.0, "advantage": 0.5 - number, "finish_reason": "length"}
    return row | {"rewards": {"accuracy": 1.0, "judge": None}}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "a <b> & run"
    (folder / "pictures").mkdir(parents=True)
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), colour).save(folder / "pictures" / f"{number}.png")
    (folder / "config.yaml").write_text("seed: 7\ngrpo:\n  beta: 0.0\n")
    families = {"cards": {"before": 0.25, "after": 0.9, "questions": 150}}
    summary = {"accuracy_before": 0.512, "accuracy_after": 0.968, "steps": 60, "seconds": 231.4, "eval_questions": 300}
    (folder / "summary.json").write_text(json.dumps(summary | {"majority_rate": 0.142, "families": families}))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "versions": {"torch": "2.13"}}))
    metrics = [
        {"step": s, "reward": s / 60, "rewards/accuracy/mean": 0.5, "completion/length": 70} for s in range(1, 61)
    ]
    write_rows(folder / "metrics.jsonl", metrics)
    write_rows(folder / "predictions_before.jsonl", [prediction(n, correct=False) for n in range(300)])
    write_rows(
        folder / "predictions_after.jsonl", [prediction(n, correct=True, completion=HOSTILE) for n in range(300)]
    )
    for step in range(5, 65, 5):
        rows = [member(step, group, number) for group in range(6) for number in range(3)]
        write_rows(folder / "transcripts" / f"step_{step:06d}.jsonl", rows)
    return folder


def document(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_page_needs_nothing_from_outside(run_dir: Path) -> None:
    page = write_report(run_dir).read_text("utf-8")
    assert "http://" not in page
    assert "https://" not in page
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)\s*=|@import|url\(""", markup)
    assert "default-src 'none'" in page
    assert not list(run_dir.glob("*.tmp"))


def test_page_shows_the_summary_and_the_setup(run_dir: Path) -> None:
    data = document(write_report(run_dir).read_text("utf-8"))
    tiles = {label: (value, note) for label, value, note in data["tiles"]}
    assert tiles["Validation accuracy"] == ("51.2 % → 96.8 %", "+45.6 points on 300 questions, majority rate 14.2 %")
    assert tiles["Steps"][0] == "60"
    assert tiles["Training time"][0] == "3 min 51 s"
    assert tiles["Completion length"][0] == "70 → 70"
    assert data["summary"]["families"]["cards"]["after"] == 0.9
    assert data["stage"] == "GRPO"
    assert data["missing"] == data["problems"] == []
    assert "beta: 0.0" in data["config"]
    assert data["environment"] == [["python", "3.11"], ["versions.torch", "2.13"]]


def test_document_has_the_sampled_rows(run_dir: Path) -> None:
    data = document(write_report(run_dir).read_text("utf-8"))
    pairs = data["pairs"]
    assert (data["pairs_total"], len(pairs)) == (300, 200)
    assert {pair["family"] for pair in pairs} == {"cards", "bars"}
    assert all(pair["before"]["correct"] is False and pair["after"]["correct"] is True for pair in pairs)
    steps = data["transcripts"]
    assert (len(steps), steps[0]["step"], steps[-1]["step"]) == (10, 5, 60)
    assert [len(group["members"]) for group in steps[0]["groups"]] == [3, 3, 3, 3]
    assert steps[0]["groups"][0]["members"][2]["advantage"] == -1.5
    assert steps[0]["groups"][0]["members"][0]["rewards"] == {"accuracy": 1.0, "judge": None}


def test_each_picture_is_embedded_once(run_dir: Path) -> None:
    page = write_report(run_dir).read_text("utf-8")
    assert page.count("data:image/png;base64,") == 3
    data = document(page)
    used = {key for pair in data["pairs"] for key in pair["images"]}
    assert used == set(data["pictures"])


def test_hostile_text_stays_text(run_dir: Path) -> None:
    page = write_report(run_dir).read_text("utf-8")
    assert page.count("</script>") == 2  # the data block and the drawing script
    assert "<img" not in page
    assert "<title>a &lt;b&gt; &amp; run" in page
    shown = document(page)["pairs"][0]["after"]["completion"]
    assert shown == HOSTILE.replace("\ud83d", "?")


def test_young_run_names_what_is_missing(tmp_path: Path) -> None:
    data = document(write_report(tmp_path).read_text("utf-8"))
    assert {"config.yaml", "metrics.jsonl", "summary.json", "predictions_after.jsonl"} <= set(data["missing"])
    assert data["tiles"][0] == ["Validation accuracy", "– → –", "not measured yet"]
    assert data["pairs"] == data["transcripts"] == []


def test_stage_comes_from_the_recipe_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("grpo:\n  beta: 0.1\n")
    data = document(write_report(tmp_path).read_text("utf-8"))
    assert data["stage"] == "GRPO"
    assert "transcripts" in data["missing"]


def test_gaps_repeated_steps_and_broken_lines(tmp_path: Path) -> None:
    lines = ['{"step": 1, "kl": NaN, "loss": 2.0}', '{"step": 2, "kl": 0.1, "note": "x", "entropy": null}']
    lines += ['{"step": 3, "kl": 9}', '{"step": 3, "kl": 0.3, "eval/accuracy": 0.5}', '{"step": 4, "k']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    data = document(write_report(tmp_path).read_text("utf-8"))
    assert data["series"] == {"kl": [[1, None], [2, 0.1], [3, 0.3]], "loss": [[1, 2.0]], "eval/accuracy": [[3, 0.5]]}
    assert data["stage"] == "SFT"
    assert "transcripts" not in data["missing"]
    assert [problem.split(" holds")[0] for problem in data["problems"]] == ["metrics.jsonl line 5"]


def test_validation_with_one_side_only(tmp_path: Path) -> None:
    write_rows(tmp_path / "predictions_before.jsonl", [prediction(1, correct=True)])
    (pair,) = document(write_report(tmp_path).read_text("utf-8"))["pairs"]
    assert pair["before"]["correct"] is True
    assert pair["after"] is None
    assert pair["images"] == ["pictures/1.png: no readable picture"]


def test_big_things_are_cut_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        noise = Image.frombytes("RGB", (900, 600), os.urandom(900 * 600 * 3))
        noise.save(tmp_path / "pictures" / f"{number}.png")
    long = "a" * 4000 + "b" * 4000
    write_rows(tmp_path / "predictions_after.jsonl", [prediction(n, correct=True, completion=long) for n in range(3)])
    room = int(2.5 * len(report.data_uri((tmp_path / "pictures" / "0.png").read_bytes())))
    monkeypatch.setattr(report, "MAX_PICTURES_BYTES", room)
    data = document(write_report(tmp_path).read_text("utf-8"))
    assert sum(map(len, data["pictures"].values())) <= room
    assert next(iter(data["pictures"].values())).startswith("data:image/webp;base64,")
    assert data["pairs"][-1]["images"] == ["pictures/2.png: left out to keep this page small"]
    shown = data["pairs"][0]["after"]["completion"]
    assert shown.startswith("aaa")
    assert shown.endswith("bbb")
    assert "3000 characters left out" in shown


@pytest.mark.parametrize(
    ("before", "after", "questions", "words"),
    [
        (0.5, 0.9, 200, "+40.0 points on 200 questions"),
        (0.5, 0.55, 200, "+5.0 points on 200 questions (within noise)"),
        (0.9, 0.6, None, "-30.0 points"),
    ],
)
def test_gain(before: float, after: float, questions: int | None, words: str) -> None:
    assert report.gain(before, after, questions) == words


def test_report_does_not_import_torch() -> None:
    code = "import sys, sail_rl.report; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
