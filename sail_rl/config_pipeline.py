"""The recipe of a pipeline: stages in their order, each an ordinary command, and how each model is asked afterwards."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sail_rl.command_line import BadInput, load_recipe, read_yaml
from sail_rl.config import CommonRecipe, GrpoRecipe, SftRecipe
from sail_rl.config_data import Section

REFERENCE = re.compile(r"<(\w+)>")  # <stage> stands for what the stage has written
Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]


class Stage(Section):
    """One of `train`, `merge` and `data`. In `set`, `<stage>` is the output of an earlier stage: a model of `train` and
    `merge`, rows of `data`."""

    name: Name
    train: str | None = None
    """A recipe of either trainer, started by `accelerate launch`."""
    merge: list[Name] = Field(default_factory=list)
    """Stages whose models are averaged, as `sail-rl merge` does."""
    data: Literal["passrate", "reject"] | None = None
    """A step of `sail-rl data`, which needs `recipe`."""
    recipe: str | None = None
    set: list[str] = Field(default_factory=list)
    """Recipe keys to change, each `key.sub=value`."""
    samples: Annotated[int, Field(ge=1)] = 4
    """Of `data`: attempts at each question."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Of `data`: read only so many rows."""
    evaluate: bool = True
    """Ask the model that it makes."""

    @model_validator(mode="after")
    def is_one_thing(self) -> "Stage":
        if (self.train is not None) + bool(self.merge) + (self.data is not None) != 1:
            raise ValueError(f"stage {self.name}: give one of train, merge and data")
        if (self.data is None) != (self.recipe is None):
            raise ValueError(f"stage {self.name}: `data` and `recipe` go together; a training run is `train: recipe`")
        if len(self.merge) == 1:
            raise ValueError(f"stage {self.name}: merge needs two stages or more")
        return self

    @property
    def makes_model(self) -> bool:
        """Whether its output is a checkpoint; else it is rows."""
        return self.data is None

    @property
    def needs(self) -> list[str]:
        """Stages whose output it reads."""
        return [*self.merge, *(name for text in self.set for name in REFERENCE.findall(text))]


class Evaluation(Section):
    """What each model is asked through `sail-rl eval`."""

    recipe: str
    """Its data.eval and rollout are used."""
    modes: Annotated[dict[Name, list[str]], Field(min_length=1)]
    """Name -> recipe keys to change, such as `data.thinking=direct`."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Ask only so many questions."""


class PipelineRecipe(Section):
    """All of it."""

    seed: int = 0
    """Of every stage that does not set its own."""
    output_dir: str
    launch_options: list[str] = Field(default_factory=list)
    """Of `accelerate launch`, such as `[--config_file, recipes/accelerate/ddp_8.yaml]`."""
    stages: Annotated[list[Stage], Field(min_length=1)]
    evaluation: Evaluation | None = None

    @model_validator(mode="after")
    def stages_follow_each_other(self) -> "PipelineRecipe":
        earlier: dict[str, Stage] = {}
        for stage in self.stages:
            if stage.name in earlier:
                raise ValueError(f"stage {stage.name}: there are two of this name")
            for needed in stage.needs:
                if needed not in earlier:
                    known = ", ".join(earlier) or "none"
                    raise ValueError(f"stage {stage.name}: <{needed}> is no earlier stage; earlier are: {known}")
                if needed in stage.merge and not earlier[needed].makes_model:
                    raise ValueError(f"stage {stage.name}: {needed} makes rows, and only models are merged")
            earlier[stage.name] = stage
        if not self.stages[-1].makes_model:
            raise ValueError(f"stage {self.stages[-1].name} is the last, and makes no model")
        return self

    def output_of(self, name: str) -> Path:
        """What a stage writes: a checkpoint folder, or a file of rows."""
        stage = next(stage for stage in self.stages if stage.name == name)
        folder = Path(self.output_dir) / name
        if stage.train:
            return folder / "final"
        return folder / "model" if stage.merge else folder / "rows.jsonl"

    def resolved(self, texts: list[str]) -> list[str]:
        """Texts with the outputs of stages in the place of their names."""
        return [REFERENCE.sub(lambda found: str(self.output_of(found[1])), text) for text in texts]

    @property
    def merges(self) -> list[str]:
        """Names of the stages that average models."""
        return [stage.name for stage in self.stages if stage.merge]

    @property
    def final(self) -> Stage:
        """The stage whose model is the result."""
        return self.stages[-1]


def trainer_of(path: str | Path) -> type[CommonRecipe]:
    """The kind of a recipe, told by its rewards."""
    return GrpoRecipe if "rewards" in read_yaml(Path(path)) else SftRecipe


def check_stages(pipeline: PipelineRecipe) -> None:
    """Every recipe of every stage with its changes, before the first one starts; all mistakes at once."""
    asked = [
        (f"stage {stage.name}", stage.train or stage.recipe, pipeline.resolved(stage.set))
        for stage in pipeline.stages
        if not stage.merge
    ]
    evaluation = pipeline.evaluation
    for mode, changes in evaluation.modes.items() if evaluation else ():
        asked.append((f"evaluation.modes.{mode}", evaluation.recipe, changes))  # type: ignore[union-attr]
    mistakes = []
    for place, path, changes in asked:
        try:
            load_recipe(trainer_of(str(path)), str(path), changes)
        except BadInput as mistake:
            mistakes.append(f"{place}: {mistake}")
    if mistakes:
        raise BadInput("\n".join(mistakes))
