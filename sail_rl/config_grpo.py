"""The recipe's section `grpo`: from rewards to advantages, from advantages to the loss, and how often it is minimised.

Nothing here imports torch, as in config.py.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sail_rl.config_data import Section


class GrpoSection(Section):
    """The policy loss. TRL's names and meanings where TRL has the key."""

    loss_type: Literal["grpo", "dr_grpo", "dapo", "cispo", "sapo"] = "dapo"
    """What is averaged, and what keeps the policy near the one that wrote the completions. `grpo`: tokens within a
    completion, then completions; `dapo`: all tokens of the step; `dr_grpo`: by a constant, so that length has no
    influence; all three clip the ratio. `cispo` averages as `dapo` does, and cuts the ratio, at `epsilon_high` itself
    and not at 1 + `epsilon_high`, but no token's gradient. `sapo` averages as `grpo` does and fades gradients out."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratios of the policy to the one before the updates. `sequence`: one for a completion, the geometric mean of its
    tokens'. With `loss_type: grpo` that is GSPO, which suits mixtures of experts."""
    epsilon: Annotated[float, Field(gt=0)] = 0.2
    epsilon_high: Annotated[float, Field(gt=0)] | None = None
    """Upper clip; `epsilon` when left out."""
    sapo_temperature_pos: Annotated[float, Field(gt=0)] = 1.0
    """How fast `sapo` fades out tokens of completions that were better than their group."""
    sapo_temperature_neg: Annotated[float, Field(gt=0)] = 1.05
    """The same of all others."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL term to the starting model; 0 keeps no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of a token, where d is log(policy / reference): `k1` is d, `k2` d^2 / 2, `k3` exp(-d) - 1 + d, which is TRL's.
    As a term of the loss `k2` has the gradient of the KL divergence, and `k3` nearly so near the reference."""
    use_bias_correction_kl: bool = False
    """Multiply the KL term by the ratio, as TRL does by default: with it `k1` and `k3` have the exact gradient."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a bonus for the mean entropy of the tokens, whatever `loss_type` averages."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the step's tokens, those with the highest entropy when the updates begin, that the policy term and the
    entropy bonus train; 0.2 is usual. Below 1 it costs a forward pass."""
    mask_truncated_completions: bool = False
    """Leave completions that were cut at `max_completion_length` out of the loss. Their rewards still count for the
    others of their group."""
    baseline: Literal["group", "leave_one_out", "batch"] = "group"
    """What is taken from a reward: the mean of its group, of the other members of its group (RLOO, with `scale_rewards:
    none`), or of the step (REINFORCE++, with `scale_rewards: batch`)."""
    scale_rewards: Literal["group", "batch", "batch_centred", "none"] = "group"
    """By which standard deviation that is divided: of the group's rewards, of the step's, or of the step's less their
    baselines (with `baseline: group` REINFORCE++ with a baseline)."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """`normalize_then_sum` (GDPO): each reward is compared within the group and scaled by itself, then they are summed
    by weight and scaled over the step: a reward that varies little counts as much as one that varies a lot."""
    dynamic_sampling: Annotated[int, Field(ge=0)] = 0
    """Most times that a step asks more questions, until as many groups as `rollout.prompts_per_step` have rewards that
    differ (DAPO). All groups with a signal are trained, the others do not count. 0: a step is a batch of questions."""
    mini_batches: Annotated[int, Field(ge=1)] = 1
    """Parts that a step's groups are dealt to in turn, each an optimizer step. Later ones are no longer quite
    on-policy, which the clip limits; the old log-probabilities then cost a forward pass."""
    num_iterations: Annotated[int, Field(ge=1)] = 1
    """How often a step's completions are trained on: optimizer steps for each mini-batch."""
    vllm_importance_sampling_correction: bool | None = None
    """Weigh the loss by the ratio of the trainer's and the engine's probabilities, which an engine with weights of its
    own never gives quite alike. When left out: for vLLM yes, for `hf` no."""
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    """A ratio for each token or for the whole completion; one beyond the bounds is cut to them or made 0."""
    vllm_importance_sampling_clip_max: Annotated[float, Field(gt=0)] | None = 3.0
    vllm_importance_sampling_clip_min: Annotated[float, Field(ge=0)] | None = None

    @property
    def upper_epsilon(self) -> float:
        """The upper clip."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def trains_without_signal(self) -> bool:
        """Whether groups whose rewards are all equal count in the update: for the KL term, for the entropy bonus, and
        for which of the step's tokens have a high entropy."""
        needed = self.beta > 0 or self.entropy_coef > 0 or self.top_entropy_quantile < 1
        return needed and not self.dynamic_sampling

    @property
    def looks_ahead(self) -> bool:
        """Whether the policy sees the step's tokens once before the first update."""
        return self.mini_batches > 1 or self.top_entropy_quantile < 1

    @model_validator(mode="after")
    def aggregation_fits(self):
        if self.multi_objective_aggregation == "normalize_then_sum" and (self.baseline, self.scale_rewards) != (
            "group",
            "group",
        ):
            raise ValueError(
                "`multi_objective_aggregation: normalize_then_sum` has a baseline and a scale of its own: leave out "
                "`baseline` and `scale_rewards`"
            )
        return self

    @model_validator(mode="after")
    def dynamic_sampling_finds_signals(self):
        if self.dynamic_sampling and self.baseline == "batch":
            raise ValueError(
                "`dynamic_sampling` replaces groups whose rewards are all equal, which have a signal with `baseline: "
                "batch`: set it to 0, or take another baseline"
            )
        return self

    @model_validator(mode="after")
    def cispo_has_its_cap(self):
        if self.loss_type == "cispo" and (self.epsilon_high is None or self.epsilon_high < 1):
            raise ValueError(
                "`loss_type: cispo` cuts ratios at `epsilon_high` itself: give one of at least 1, such as 5.0"
            )
        return self

    @model_validator(mode="after")
    def k1_has_a_gradient(self):
        if self.beta and self.kl_estimator == "k1" and not self.use_bias_correction_kl:
            raise ValueError(
                "`kl_estimator: k1` has a gradient of 0 on average unless it is multiplied by the ratio: set "
                "`use_bias_correction_kl: true`, or take k2"
            )
        return self
