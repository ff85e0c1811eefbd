"""The recipe's sections `model` and `data`: what is trained, and on what.

Nothing here imports torch, as in config.py.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator


class Section(BaseModel):
    """A part of a recipe: frozen, unknown keys are mistakes, values are not coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class LoraSection(Section):
    """Low-rank adapters in the linear layers of some parts; everything else is frozen. peft's names and meanings."""

    r: Annotated[int, Field(ge=1)] = 16
    lora_alpha: Annotated[int, Field(ge=1)] = 32
    """The adapters' product is scaled by `lora_alpha / r`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    parts: Annotated[list[Literal["tower", "llm"]], Field(min_length=1)] = ["llm"]
    """Whose linear layers get adapters: attention and dense feed-forward layers, never embeddings, the head, or a
    mixture's router and experts."""


class ModelSection(Section):
    """What is trained."""

    path: Annotated[str, Field(min_length=1)] | None = None
    """A checkpoint folder or a Hub id."""
    random_init: Literal["tiny", "tiny_qwen3_vl", "tiny_internvl"] | None = None
    """Instead of a path: fresh weights of this kind, with a tokenizer for the built-in picture task. `tiny` is a
    SAIL-VL2."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; matrix products follow `trainer.mixed_precision`. Weights in bfloat16 cannot take the small steps
    of a learning rate below about 1e-4."""
    freeze: list[Literal["tower", "adapter", "llm"]] = []
    """Parts that are not trained. With `lora` all weights of the model are frozen anyway."""
    lora: LoraSection | None = None
    """Train adapters instead of the weights, which then may be in bfloat16. `checkpoints/step_N` holds the adapters
    alone, in peft's format; `final` is the model with the adapters merged into its weights, and `final/adapter` the
    adapters for the model at `path`."""
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the load-balancing loss of a mixture of experts (Switch Transformer's, over a micro-batch of
    all processes). 0, as the Qwen3 checkpoints have it switched off; 0.001 is what their configuration names."""
    use_liger_kernel: bool = False
    """Liger's Triton kernels for norms, gated layers and rotary embedding. A GPU and `--extra liger` are needed; they
    pay where groups are large (benchmarks/update_2b.py)."""
    max_tiles: Annotated[int, Field(ge=1)] | None = None
    """Most tiles a picture is cut into; the checkpoint's own value when left out. Qwen-VL cuts no tiles."""
    min_tiles: Annotated[int, Field(ge=1)] | None = None
    """Fewest tiles, in which small pictures are enlarged; the checkpoint's own value when left out."""
    any_resolution: bool | None = None
    """SAIL-VL2 only: pictures at their native size, up to 1792 x 1792 pixels, instead of tiles; the checkpoint's own
    way when left out."""

    @model_validator(mode="after")
    def tiles_in_order(self):
        if self.min_tiles and self.max_tiles and self.min_tiles > self.max_tiles:
            raise ValueError(f"`min_tiles` = {self.min_tiles} is more than `max_tiles` = {self.max_tiles}")
        return self

    @model_validator(mode="after")
    def one_origin(self):
        if (self.path is None) == (self.random_init is None):
            raise ValueError("give exactly one of `path` and `random_init`")
        return self

    @model_validator(mode="after")
    def lora_fits(self):
        if self.lora and self.random_init:
            raise ValueError("lora trains adapters for a checkpoint: give `path` instead of `random_init`")
        both = sorted(set(self.freeze) & set(self.lora.parts if self.lora else []))
        if both:
            raise ValueError(f"`freeze` and `lora.parts` both name {both[0]}; leave it out of one of them")
        return self


Kind = Literal["cot", "direct"]
KINDS = get_args(Kind)
Family = Literal["cards", "shapes", "bars", "path", "geometry"]
FAMILIES = get_args(Family)


Share = Annotated[float, Field(gt=0)]


class SourceSection(Section):
    """What every source may say of its rows."""

    weight: Share | None = None
    """In a list of sources: how often rows are drawn from this one, relative to the others. When no source has one,
    each row is read once in every pass."""
    kind: Kind | None = None
    """Of all its rows, in the place of a column `kind`."""
    columns: dict[str, str] | None = None
    """In the place of `data.columns`."""


class PictureSource(SourceSection):
    """The built-in picture task: drawn on demand, endless, nothing to download."""

    source: Literal["pictures"] = "pictures"
    families: Annotated[list[Family], Field(min_length=1)] = list(FAMILIES)
    levels: Annotated[list[Literal[1, 2, 3]], Field(min_length=1)] = [1, 2, 3]
    steps: Annotated[list[Literal["direct", "two_step"]], Field(min_length=1)] = ["direct", "two_step"]
    forms: list[str] | None = None
    """Question forms by name, such as `sum` or `tallest`; all forms of the families, levels and steps when left out."""
    split: Literal["train", "validation"] | None = None
    """`train` for data.train and `validation` for data.eval when left out."""
    rows: Annotated[int, Field(ge=1)] | None = None
    """How many different rows; endless for training and 400 for evaluation when left out."""
    seed: int = 0

    @model_validator(mode="after")
    def known_forms(self):
        if self.forms is not None:
            from sail_rl.data.pictures import possible_turns

            possible_turns(tuple(self.families), tuple(self.levels), tuple(self.steps), tuple(self.forms))
        return self


BenchmarkName = Literal["mathvista", "mathvision", "mathverse", "dynamath", "wemath", "logicvista", "mmmu", "ocrbench"]


class FoundSource(SourceSection):
    """What somebody else may have made."""

    benchmark: BenchmarkName | None = None
    """Its rows have this benchmark's columns, as it is published; they are read without `columns`."""

    @model_validator(mode="after")
    def one_map(self):
        if self.benchmark and self.columns is not None:
            raise ValueError(f"`benchmark: {self.benchmark}` says what its columns are; leave out `columns`")
        return self


class FileSource(FoundSource):
    """A local .jsonl or .parquet file, or a .tsv of VLMEvalKit's; picture paths are relative to the file's folder."""

    source: Literal["file"] = "file"
    path: str


class HubSource(FoundSource):
    """A dataset of the Hugging Face Hub."""

    source: Literal["hub"] = "hub"
    path: str
    """The dataset's id, such as `hiyouga/geometry3k`."""
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    """Read it while it arrives, in endless passes, in the place of a copy on disk first. For training alone, with
    `trainer.max_steps`. Every process reads the stream and decodes its own share of it; `data.workers` do not help."""
    shuffle_buffer: Annotated[int, Field(ge=1)] = 1000
    """Rows of a stream that are shuffled among each other, and of which two such blocks are in memory."""

    @model_validator(mode="after")
    def benchmark_is_at_hand(self):
        if self.benchmark and self.streaming:
            raise ValueError(f"`benchmark: {self.benchmark}` is read from a copy on disk; leave out `streaming`")
        return self


def source_kind(value: Any) -> str:
    """Which kind of source a mapping (or a section) describes, or that it is several."""
    if isinstance(value, list):
        return "list"
    return str(value.get("source", "file") if isinstance(value, dict) else getattr(value, "source", "file"))


Source = Annotated[
    Annotated[PictureSource, Tag("pictures")] | Annotated[FileSource, Tag("file")] | Annotated[HubSource, Tag("hub")],
    Discriminator(source_kind),
]


# One source, or several in the place of one.
Sources = Annotated[
    Annotated[PictureSource, Tag("pictures")]
    | Annotated[FileSource, Tag("file")]
    | Annotated[HubSource, Tag("hub")]
    | Annotated[list[Source], Field(min_length=1), Tag("list")],
    Discriminator(source_kind),
]
SOURCE_TAGS = ("pictures", "file", "hub", "list")


def expand_source(value: Any) -> Any:
    """Allow `train: rows.jsonl`, `train: pictures` and `train: owner/name` for the mappings they stand for."""
    if isinstance(value, list):
        return [expand_source(one) for one in value]
    if not isinstance(value, str):
        return value
    if value == "pictures":
        return {"source": "pictures"}
    return {"source": "file" if value.endswith((".jsonl", ".json", ".parquet", ".tsv")) else "hub", "path": value}


class CurriculumSection(Section):
    """GRPO: ask the prompts that are neither too easy nor too hard for the model as it is."""

    reward: Annotated[str, Field(min_length=1)] = "accuracy"
    """The reward, between 0 and 1, whose mean over a prompt's completions is its pass rate."""
    least_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """How often a prompt is still asked in its turn when all of its completions, or none, have passed."""


class DataSection(Section):
    """Where questions come from and how they are put to the model."""

    train: Sources
    """A source, or a list of them, which then may have weights."""
    eval: Sources | None = None
    """Questions for the accuracy before, during and after training, of a source or several; none when left out."""
    columns: dict[str, str] = {}
    """Our column name -> the dataset's: `{question: problem, answer: gold}`."""
    thinking: Literal["think", "direct", "judge", "by_kind"] = "think"
    """Answer form that is asked for: reasoning and a boxed answer; a boxed answer alone; or first a judgement whether
    reasoning is needed, then reasoning or an empty think block, then a boxed answer. `by_kind`: each row's own, `think`
    where its column `kind` is `cot`, `direct` where that is `direct`."""
    reasoning: Annotated[dict[str, Share], Field(min_length=1)] = {"terse": 1.0}
    """Which reasoning traces SFT imitates: one kind, or several with their shares. `terse` is the column `reasoning`,
    any other kind is `reasoning_<kind>`, with an answer of its own where the row has `answer_<kind>`."""
    video_frames: Annotated[int, Field(ge=1)] = 16
    """Most frames that are shown of a video, evenly spread over it."""
    max_prompt_length: Annotated[int, Field(ge=1)] = 4096
    """In tokens, pictures included; a longer prompt is a bad row, never cut."""
    max_bad_rows: Annotated[int, Field(ge=0)] = 0
    """Rows that cannot be used are set aside, with id and reason, up to this many; then the run stops. Rows whose right
    answer the `accuracy` reward cannot compare with do not count here: up to 5 % of a source's are left out."""
    curriculum: CurriculumSection | None = None
    """Pass over prompts whose completions would all be right or all be wrong, as far as their pass rates tell. These
    are measured in the run and kept in its checkpoints; in the first pass over the data every prompt is asked. `{}` for
    the defaults; none when left out."""
    shuffle: bool = True
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes beside each that trains, which decode and cut the pictures of the next step while this one runs: one
    more step's pictures in memory. When left out: with a GPU half of the cores, at most 4; without one none,
    since the model itself keeps all cores busy."""

    _expand = field_validator("train", "eval", mode="before")(expand_source)

    @field_validator("reasoning", mode="before")
    @classmethod
    def expand_reasoning(cls, value: Any) -> Any:
        """Allow `reasoning: wordy`."""
        return {value: 1.0} if isinstance(value, str) else value

    @property
    def train_sources(self) -> list[PictureSource | FileSource | HubSource]:
        """`train` as a list."""
        return self.train if isinstance(self.train, list) else [self.train]

    @property
    def eval_sources(self) -> list[PictureSource | FileSource | HubSource]:
        """`eval` as a list, empty where there is none."""
        if self.eval is None:
            return []
        return self.eval if isinstance(self.eval, list) else [self.eval]

    @model_validator(mode="after")
    def weights_fit(self):
        weighted = sum(source.weight is not None for source in self.train_sources)
        if weighted and (weighted < len(self.train_sources) or weighted == 1):
            raise ValueError("`data.train`: give a weight to each of several sources, or to none")
        if any(source.weight is not None for source in self.eval_sources):
            raise ValueError("`data.eval`: each question is asked once, so a source has no weight")
        return self

    @model_validator(mode="after")
    def questions_end(self):
        if any(isinstance(source, HubSource) and source.streaming for source in self.eval_sources):
            raise ValueError("`data.eval`: a stream has no end here; leave out `streaming`")
        return self

    @model_validator(mode="after")
    def kinds_are_used(self):
        given = any(source.kind for source in self.train_sources + self.eval_sources)
        if given and self.thinking != "by_kind":
            raise ValueError(f"a source has a `kind`, which `thinking: {self.thinking}` does not ask for; set by_kind")
        return self
