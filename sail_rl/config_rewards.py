"""The recipe's sections `rewards`, `reward_mix` and `judge`: what is rewarded, how it becomes one number, whom to ask.

Nothing here imports torch, as in config.py.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sail_rl.config_data import Section


class RewardEntry(BaseModel):
    """One reward: a built-in name or `path/file.py:name`. Keys beyond these are passed to the function."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    function: Annotated[str, Field(min_length=1)]
    weight: float = 1.0
    timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds of CPU time for one call of a function of your own, 60 when left out; twice as many by the clock."""
    in_process: bool = False
    """Call a function of your own in the trainer's process, where nothing can stop it, once a step for all completions.
    Others are called in a process of their own, for groups as they come."""

    @property
    def name(self) -> str:
        """Under which the reward is logged."""
        return self.function.rsplit(":", 1)[-1]

    @property
    def arguments(self) -> dict[str, Any]:
        """The entry's own keys."""
        return dict(self.model_extra or {})


class RewardMixSection(Section):
    """From a completion's rewards to one number."""

    mode: Literal["sum", "product"] = "sum"
    """`sum`: weight * reward, added up (SAIL-VL2). `product`: alpha * (product of the factors) + (1 - alpha) * (the
    weighted sum of the other rewards) (SAIL-RL)."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Of `product`: its share of the reward."""
    factors: Annotated[list[str], Field(min_length=1)] = Field(default=["accuracy", "judging", "think_quality"])
    """Of `product`: the rewards that are multiplied, by name; they have no weight."""


class JudgeSection(Section):
    """The model behind an OpenAI-compatible endpoint that `think_quality`, `judging_by_judge` and functions of yours
    with an argument `judge` ask."""

    base_url: Annotated[str, Field(pattern="^https?://")]
    """Such as `http://localhost:8000/v1` of a `vllm serve`."""
    model: Annotated[str, Field(min_length=1)]
    """Under which name the endpoint serves it."""
    api_key_env: Annotated[str, Field(min_length=1)] | None = None
    """The environment variable that holds the key; `none` is sent as the key when left out."""
    concurrency: Annotated[int, Field(ge=1)] = 32
    """Most questions on their way at once, for each process."""
    call_seconds: Annotated[float, Field(gt=0)] = 60.0
    """For one try of one question."""
    batch_seconds: Annotated[float, Field(gt=0)] = 300.0
    """For all questions of a step; what is not answered by then has failed."""
    tries: Annotated[int, Field(ge=1)] = 3
    """Of a question where the connection, the endpoint (5xx) or its limits (429) fail; other faults are final."""
    breaker: Annotated[int, Field(ge=1)] = 20
    """After so many failed questions in a row the rest of the step is not asked, and the next begins with one alone."""
    max_tokens: Annotated[int, Field(ge=1)] = 512
    """Of a reply."""
    cache: str | None = None
    """A sqlite file with the verdicts given, which runs may share; `judge_cache.sqlite` in output_dir when left out."""
    when_failing: Literal["stop", "continue"] = "stop"
    """After three steps in a row with more than 20 % of the verdicts missing: end the run, or go on without them."""
