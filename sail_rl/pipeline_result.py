"""What a pipeline leaves behind: the table of its stages, report.html, and the model's folder with its card."""

import html
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sail_rl.config_pipeline import PipelineRecipe, Stage
from sail_rl.run_folder import write_json

FIGURES = {"pass@1": "right", "length": "tokens", "thinking_rate": "thinks"}
Row = dict[str, Any]


def stage_rows(pipeline: PipelineRecipe, done: Mapping[str, Any]) -> list[Row]:
    """A row for each stage that is done, with the figures of each mode in which its model was asked."""
    rows = []
    for stage in pipeline.stages:
        if stage.name in done:
            row: Row = {"stage": stage.name, "minutes": done[stage.name]["seconds"] / 60}
            for mode in pipeline.evaluation.modes if pipeline.evaluation else ():
                file = Path(pipeline.output_dir) / stage.name / f"eval_{mode}" / "summary.json"
                if f"{stage.name}, {mode}" in done:
                    row[mode] = json.loads(file.read_text())["all"]
            rows.append(row)
    return rows


def columns(pipeline: PipelineRecipe) -> list[tuple[str, str, str]]:
    """(heading, mode, figure) of each column of figures."""
    modes = list(pipeline.evaluation.modes) if pipeline.evaluation else []
    return [(f"{mode}: {shown}", mode, figure) for mode in modes for figure, shown in FIGURES.items()]


def cell(row: Row, mode: str, figure: str) -> str:
    """A figure, an accuracy with its interval."""
    found = row.get(mode, {}).get(figure)
    if found is None:
        return ""
    if figure == "length":
        return f"{found['mean']:.1f}"
    percent = f"{100 * found['mean']:.1f} %"
    return f"{percent} ({100 * found['low']:.1f} to {100 * found['high']:.1f})" if figure == "pass@1" else percent


def table(pipeline: PipelineRecipe, rows: Sequence[Row]) -> str:
    """The stages as Markdown."""
    wanted = columns(pipeline)
    lines = [["stage", "minutes", *(heading for heading, _, _ in wanted)]]
    lines += [["---", "---:", *("---:" for _ in wanted)]]
    lines += [
        [row["stage"], f"{row['minutes']:.1f}", *(cell(row, mode, figure) for _, mode, figure in wanted)]
        for row in rows
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_pages(pipeline: PipelineRecipe, done: Mapping[str, Any]) -> None:
    """`stages.json`, and `report.html` with the table and a link to each stage's own report."""
    folder, rows = Path(pipeline.output_dir), stage_rows(pipeline, done)
    write_json(folder / "stages.json", {"seed": pipeline.seed, "stages": rows})
    page = PAGE.replace("{{title}}", html.escape(folder.name))
    page = page.replace("{{rows}}", "\n".join(page_row(pipeline, row) for row in rows))
    page = page.replace("{{head}}", "".join(f"<th>{html.escape(heading)}</th>" for heading, _, _ in columns(pipeline)))
    page = page.replace("{{commands}}", "\n".join(page_command(name, one) for name, one in done.items()))
    unfinished = folder / "report.html.tmp"
    unfinished.write_text(page)
    os.replace(unfinished, folder / "report.html")


def page_row(pipeline: PipelineRecipe, row: Row) -> str:
    """A line of the page's table."""
    own = Path(row["stage"]) / "report.html"
    name = html.escape(row["stage"])
    linked = f'<a href="{own}">{name}</a>' if (Path(pipeline.output_dir) / own).is_file() else name
    cells = [linked, f"{row['minutes']:.1f}"]
    for _, mode, figure in columns(pipeline):
        found = row.get(mode, {}).get(figure)
        share = "" if found is None or figure == "length" else f' style="--share:{found["mean"]:.3f}"'
        cells.append(f"<span{share}>{html.escape(cell(row, mode, figure))}</span>")
    return "<tr>" + "".join(f"<td>{one}</td>" for one in cells) + "</tr>"


def page_command(name: str, one: Mapping[str, Any]) -> str:
    """A command of the page's list."""
    return f"<dt>{html.escape(name)}</dt><dd><code>{html.escape(one['command'])}</code></dd>"


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{title}}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .7rem; text-align: right }
th:first-child, td:first-child { text-align: left }
td span[style] { background: linear-gradient(to right, #bfe3c6 calc(var(--share) * 100%), #0000 0); padding: 0 .3rem }
code { font-size: .8rem; overflow-wrap: anywhere }
</style>
<h1>{{title}}</h1>
<p>Each stage, and what its model answers afterwards: right answers with their 95 % interval, tokens of an answer, and
the share of answers that think.</p>
<table><thead><tr><th>stage</th><th>minutes</th>{{head}}</tr></thead><tbody>
{{rows}}
</tbody></table>
<h2>Commands</h2>
<dl>
{{commands}}
</dl>
</html>
"""


def publish(pipeline: PipelineRecipe, done: Mapping[str, Any]) -> None:
    """The last stage's model as a folder of its own, with its card; files are shared with the stage's."""
    target, unfinished = (Path(pipeline.output_dir) / name for name in ("model", "model.tmp"))
    if target.is_dir():
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(pipeline.output_of(pipeline.final.name), unfinished, copy_function=link_or_copy)
    (unfinished / "README.md").unlink(missing_ok=True)
    (unfinished / "README.md").write_text(card(pipeline, done))
    os.replace(unfinished, target)


def link_or_copy(source: str, target: str) -> None:
    """A second name for a file of gigabytes, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def card(pipeline: PipelineRecipe, done: Mapping[str, Any]) -> str:
    """The model card: what it is, how it is asked, how it came about and how good it is."""
    steps = "\n".join(f"{number}. {told(pipeline, stage)}" for number, stage in enumerate(pipeline.stages, 1))
    return CARD.format(
        name=Path(pipeline.output_dir).resolve().name,
        steps=steps,
        table=table(pipeline, stage_rows(pipeline, done)),
        seed=pipeline.seed,
        commands="\n".join(one["command"] for one in done.values()),
    )


def told(pipeline: PipelineRecipe, stage: Stage) -> str:
    """A stage as a line of the card: what it was made by, of what, and with which changes."""
    made = f"trained by `{stage.train}`" if stage.train else f"`sail-rl data {stage.data}` with `{stage.recipe}`"
    made = f"the mean of {', '.join(stage.merge)}" if stage.merge else made
    changes = ", ".join(f"`{change}`" for change in stage.set)
    return f"**{stage.name}**: {made}" + (f"; {changes}" if changes else "")


CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [sail_rl, reasoning]
---
# {name}

A vision-language model that answers at once or after reasoning in a `<think>` block, as its chat template is told:
`enable_thinking=True` or `False`, in `processor.apply_chat_template(...)` or, behind `vllm serve`, as
`chat_template_kwargs`.

## How it came about

By `sail-rl pipeline`, seed {seed}; `<stage>` stands for what a stage has made.

{steps}

## How good each stage is

Right answers with their 95 % interval on the questions of `data.eval`, tokens of an answer, and the share that thinks.

{table}
## The commands

```
{commands}
```
"""
