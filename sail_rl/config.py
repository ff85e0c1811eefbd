"""The recipe: every section, every key, and its meaning. One strict YAML file describes one run.

Nothing here imports torch, so that `--help`, `--dry-run` and mistakes are answered at once.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rewards.call import RewardError
from rewards.mix import Mixing, check_mix
from sail_rl.config_data import DataSection, ModelSection, Section
from sail_rl.config_grpo import GrpoSection
from sail_rl.config_rewards import JudgeSection, RewardEntry, RewardMixSection


class VLLMSection(Section):
    """vLLM, in the trainer's process or in servers. vLLM's names where vLLM has the key."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of the GPU for the engine's weights and cache, which it gives back while the model is trained."""
    kv_cache_gib: Annotated[int, Field(ge=1)] = 1
    """GiB of main memory for the cache where there is no GPU."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of a prompt and its completion. When left out, `data.max_prompt_length` and `max_completion_length`
    together, or what the model has positions for."""
    enforce_eager: bool = False
    """On a GPU: do without CUDA graphs, for a faster start and slower generation. Without a GPU there are none."""


class ServerSection(Section):
    """The `vllm_server` engine. Every wait has a limit, in seconds."""

    urls: list[Annotated[str, Field(pattern=r"^http://[^/:]+:\d+/?$")]] = Field(default=[])
    """Servers that run already, each started with `sail-rl serve-rollouts --port 8000`, such as http://node7:8000.
    Prompts are shared out among them. When left out, the trainer starts one on its own machine, which ends with it."""
    weights: Literal["http", "nccl"] = "http"
    """How new weights reach servers. `nccl` takes them from GPU to GPU, where both sides have GPUs of their own (gloo
    does it on a CPU, for a try). They are written to files in output_dir either way."""
    start_limit: Annotated[float, Field(gt=0)] = 900
    """For a server to be there and have its engine."""
    push_limit: Annotated[float, Field(gt=0)] = 600
    """For new weights to reach a server."""
    request_limit: Annotated[float, Field(gt=0)] = 1800
    """For the completions of a step to come."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How many times in a row a server that is dead, late or wrong is started anew (one of `urls`: waited for), after
    1, 2, 4, ... seconds. Then the run stops with a checkpoint."""


class RolloutSection(Section):
    """Who writes the completions, and how they are sampled. TRL's names where TRL has the key."""

    engine: Literal["hf", "vllm_colocate", "vllm_server"] = "hf"
    """`hf`: the trainer's own model; `vllm_colocate`: vLLM in the trainer's process, with weights of its own;
    `vllm_server`: the same in other processes, on this machine or others."""
    vllm: VLLMSection = VLLMSection()
    server: ServerSection = ServerSection()
    parity_limit: Annotated[float, Field(gt=0)] | None = None
    """Before the first step an engine with weights of its own answers questions of data.train, and the run stops when
    its log-probabilities and the trainer's are further apart than this, as a mean over tokens. When left out, 0.001 in
    float32 and 0.05 in bfloat16."""
    prompts_per_step: Annotated[int, Field(ge=1)] = 16
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt: the group, whose members are compared."""
    max_completion_length: Annotated[int, Field(ge=1)] = 256
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability; 1 for all. Like `top_k` and `min_p` it cuts
    tokens off, and the trainer cuts its own distribution likewise: the log-probabilities of engine and trainer, loss
    and entropy are those of what is left, renormalised. The gradient is that of this cut policy: it moves probability
    among the tokens that are left and does not touch a token that is cut off, which thus is neither learnt nor
    unlearnt. A drawn token always counts as left, so that rounding cannot give it no probability. The KL term
    compares with the starting model cut in the same way."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from so many of the likeliest tokens; 0 for all. For the gradient see `top_p`."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Draw from tokens with at least this share of the likeliest token's probability. vLLM's order: `min_p`, `top_k`,
    `top_p`. For the gradient see `top_p`."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, tokens of the prompt and of the completion so far are less likely. The trainer computes the same
    penalty: the gradient is that of the penalised policy, and a model that is used without the penalty later is
    another policy than the one that was rewarded."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Texts that end a completion, beside the model's end tokens, in evaluations too. The token that completes one is
    kept and trained, and the completion counts as ended. For single tokens, write their text."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Of the sampling; the recipe's `seed` when left out."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Most completions that an engine writes at once."""
    overlap: Literal[0, 1] = 0
    """1: a server writes the completions of the next step while this one trains. A step then trains on completions of
    the weights before the newest, which importance sampling corrects. Needs `vllm_server`."""

    @model_validator(mode="after")
    def overlap_needs_a_server(self):
        if self.overlap and self.engine != "vllm_server":
            raise ValueError(f"`overlap` = 1 needs `engine` = vllm_server: {self.engine} cannot write during an update")
        return self


class KindWeights(Section):
    """How much the two kinds of samples count, whatever their number and length."""

    cot: Annotated[float, Field(gt=0)] = 1.0
    direct: Annotated[float, Field(gt=0)] = 1.0


class SftSection(Section):
    """The supervised loss."""

    normalise_by: Literal["tokens", "samples", "kinds"] = "tokens"
    """`tokens`: the mean over all targets' tokens of a step; `samples`: tokens summed within a sample, then the mean
    over samples, as the SAIL-VL2 report has it; `kinds`: the mean over the tokens of each kind of sample (`cot`,
    `direct`), then the mean over the kinds in the step, by `kind_weights`."""
    kind_weights: KindWeights = KindWeights()
    """For `normalise_by: kinds`."""
    train_empty_think: bool = False
    """Where the chat template ends a prompt for a direct answer with an empty think block: whether the model is trained
    to write that block, too, and not only to answer after it."""

    samples_per_step: Annotated[int, Field(ge=1)] = 32
    max_length: Annotated[int, Field(ge=1)] = 4096
    """Prompt and target together, in tokens; a longer sample is a bad row, never cut."""
    max_completion_length: Annotated[int, Field(ge=1)] = 256
    """Most tokens of an answer when accuracy is measured."""


class UpdateSection(Section):
    """How the batch is laid out for the update."""

    mode: Literal["auto", "shared", "packed", "padded"] = "auto"
    """`shared`: a prompt and its pictures are computed once for its group; `packed`: once for each completion, without
    padding; `padded`: rows of one length. All give the same gradients; `auto` is `shared` where that is exact for the
    model, which the first step checks."""
    attention: Literal["auto", "sdpa", "varlen", "flex"] = "auto"
    """How the completions of a `shared` or `packed` row read their prompts. `sdpa`: a call for each; `varlen`: one
    flash attention call for all (a GPU, bfloat16); `flex`: one FlexAttention call (a GPU, any precision), compiled in
    the first step. `auto` is `varlen` where it can run, else `sdpa`."""
    token_budget: Annotated[int, Field(ge=1)] = 16384
    """Most tokens, padding included, in one micro-batch; a larger group is cut."""


class OptimSection(Section):
    """AdamW and its schedule. transformers' names."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The rate at the end, as a share of `learning_rate`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class TrainerSection(Section):
    """The run itself."""

    max_steps: Annotated[int, Field(ge=1)]
    save_every: Annotated[int, Field(ge=1)] = 100
    save_total_limit: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints that are kept; with `eval_every` also the best of those whose step was evaluated, so make
    `save_every` a multiple of it."""
    push_to_hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """`owner/name` of a repository of the Hugging Face Hub, made private if there is none: saved models are copied
    there while training goes on, and the final one at the end."""
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations; before and after training only when left out."""
    eval_batch_size: Annotated[int, Field(ge=1)] = 100
    transcript_every: Annotated[int, Field(ge=1)] = 10
    """Steps between saved samples of completions, with their pictures."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest whole checkpoint in output_dir; `never` refuses a folder that has a run."""
    # YAML reads a bare `no` as false.
    mixed_precision: Annotated[Literal["no", "bf16"], BeforeValidator(lambda told: "no" if told is False else told)] = (
        "no"
    )
    gradient_checkpointing: bool = False
    stuck_after: Annotated[float, Field(gt=0)] = 3600
    """Seconds without a sign of progress (a phase of a step, a group of completions, a batch of an evaluation) after
    which a process says where it hangs, and ends with code 70."""
    profile: bool = False
    """Write `profile/` in output_dir: a table of phase times and MFU, and a trace of the second and third step."""
    log_with: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=[])


class SftTrainerSection(TrainerSection):
    """The run itself, as long as steps or passes over the data say."""

    max_steps: Annotated[int, Field(ge=0)] = 0
    """0 until `num_train_epochs` is counted in steps."""
    num_train_epochs: Annotated[float, Field(gt=0)] | None = None
    """In the place of `max_steps`: passes over data.train. With weights, a pass is as many samples as all sources have
    rows."""

    @model_validator(mode="after")
    def one_length(self):
        if (self.max_steps == 0) == (self.num_train_epochs is None):
            raise ValueError("give exactly one of `max_steps` and `num_train_epochs`")
        return self


class CommonRecipe(Section):
    """What both trainers share."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    output_dir: Annotated[str, Field(min_length=1)]
    model: ModelSection
    data: DataSection
    update: UpdateSection = UpdateSection()
    optim: OptimSection = OptimSection()
    trainer: TrainerSection

    @field_validator("model", mode="before")
    @classmethod
    def expand_model(cls, value: Any) -> Any:
        """Allow `model: some/path`."""
        return {"path": value} if isinstance(value, str) else value


class GrpoRecipe(CommonRecipe):
    """A recipe of train_grpo.py."""

    rollout: RolloutSection = RolloutSection()
    rewards: Annotated[list[RewardEntry], Field(min_length=1)]
    reward_mix: RewardMixSection = RewardMixSection()
    judge: JudgeSection | None = None
    reward_workers: Annotated[int, Field(ge=1)] | None = None
    """Processes beside each that trains, which do symbolic algebra for the `accuracy` reward; started when an answer
    first needs it. When left out: half of the cores, at most 4."""
    grpo: GrpoSection = GrpoSection()

    @model_validator(mode="after")
    def overlap_is_corrected(self):
        if self.rollout.overlap and self.grpo.vllm_importance_sampling_correction is False:
            raise ValueError(
                "rollout.overlap = 1 trains on completions of older weights: leave out "
                "grpo.vllm_importance_sampling_correction = false"
            )
        return self

    @model_validator(mode="after")
    def curriculum_can_measure(self):
        curriculum = self.data.curriculum
        if curriculum and self.rollout.overlap:
            raise ValueError(
                "data.curriculum chooses prompts by what the last step has measured, and rollout.overlap = 1 asks them "
                "before: leave one of them out"
            )
        if curriculum and curriculum.reward not in [entry.name for entry in self.rewards]:
            raise ValueError(f"data.curriculum.reward = {curriculum.reward!r} is not in rewards; list it there")
        return self

    @model_validator(mode="after")
    def mini_batches_have_prompts(self):
        if self.grpo.mini_batches > self.rollout.prompts_per_step:
            raise ValueError(
                f"grpo.mini_batches = {self.grpo.mini_batches} is more than rollout.prompts_per_step = "
                f"{self.rollout.prompts_per_step}: a mini-batch needs a prompt"
            )
        return self

    @model_validator(mode="after")
    def aggregation_fits_the_mix(self):
        if self.grpo.multi_objective_aggregation == "normalize_then_sum" and self.reward_mix.mode == "product":
            raise ValueError(
                "grpo.multi_objective_aggregation: normalize_then_sum adds rewards up, reward_mix.mode: product "
                "multiplies them; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def distinct_rewards(self):
        names = [entry.name for entry in self.rewards]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"rewards: two entries are both logged as {twice[0]!r}; rename one of the functions")
        return self

    @property
    def mixing(self) -> Mixing:
        """How the rewards are put together."""
        section = self.reward_mix
        return Mixing(section.mode, section.alpha, tuple(section.factors))

    @model_validator(mode="after")
    def rewards_can_be_mixed(self):
        try:
            check_mix([(entry.name, entry.weight, entry.arguments) for entry in self.rewards], self.mixing)
        except RewardError as error:
            raise ValueError(str(error)) from None
        return self


class SftRecipe(CommonRecipe):
    """A recipe of train_sft.py."""

    trainer: SftTrainerSection
    sft: SftSection = SftSection()

    @model_validator(mode="after")
    def no_curriculum(self):
        if self.data.curriculum:
            raise ValueError("data.curriculum measures completions, of which SFT has none: leave it out")
        return self
