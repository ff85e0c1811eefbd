"""From prompts and completions to the tensors of one forward pass, in one of three forms.

`shared`: one row [prompt | completion 1 … G | next prompt | …]; a prompt and its pictures are read once for its group.
`packed`: one row [prompt completion | prompt completion | …]; nothing is padded, each completion has its own prompt.
`padded`: a row for each completion, [padding | prompt | completion | padding].
Suffixes: _R rows, _T tokens of a row, _B completions, _C tokens of a completion, _P of a prompt, _N predicted tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Literal

import torch

from rollouts import Prompt
from rollouts.inputs import pad_left, stack_model_inputs, stack_prompts
from sail_rl.config_data import Kind

PADDING = 0  # any token will do: padding is masked in attention and in the loss
Form = Literal["shared", "packed", "padded"]


@dataclass(frozen=True)
class Group:
    """A prompt with its completions: the unit of work."""

    prompt: Prompt
    completions: list[list[int]]
    """Token ids."""
    advantages: list[float] = field(default_factory=list)
    """One for each completion; empty for SFT."""
    log_probs: list[list[float]] = field(default_factory=list)
    """The engine's, of each completion's tokens; empty where no engine wrote them."""
    trained: bool = True
    """False for an idle group, whose tokens are all masked."""
    kind: Kind = "cot"
    """Which part of the supervised loss it belongs to."""
    number: int = 0
    """Its place among the step's groups, those of all processes."""

    @property
    def longest_completion(self) -> int:
        return max(len(completion) for completion in self.completions)


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of a row that attend causally to each other and, if they have a prefix, to all of it."""

    length: int
    prefix: int | None = None
    """The number of the segment that is read before this one; BEFORE if it was computed before the row."""


@dataclass(frozen=True)
class TrainingBatch:
    """One micro-batch."""

    input_ids_RT: torch.Tensor
    attention_mask_RT: torch.Tensor
    """0 on padding."""
    segments: tuple[Segment, ...]
    """The parts of the only row; none in the padded form."""
    predictors_N: torch.Tensor
    """Places in the flattened rows whose hidden states predict the completions' tokens."""
    places_N: torch.Tensor
    """Where each predicted token stands in the flattened [B, C]."""
    completion_ids_BC: torch.Tensor
    mask_BC: torch.Tensor
    """Float: 1 on tokens that are trained."""
    advantages_B: torch.Tensor
    prompt_ids_BP: torch.Tensor
    """The prompt of each completion, filled up with -1: what a repetition penalty falls on."""
    readers_RT: torch.Tensor
    """Float: how many trained completions read each token, themselves included."""
    model_inputs: dict[str, torch.Tensor]
    """The pictures of all rows, and what kind of token each is where the model asks for it: from these and the mask
    Qwen-VL works out its positions (M-RoPE)."""
    kinds_B: tuple[Kind, ...]
    """Of each completion's group."""
    engine_log_probs_BC: torch.Tensor | None = None
    """As the sampler gave them, 0 beyond the completions; None where no engine wrote any."""
    prompt: "TrainingBatch | None" = None
    """The prompt of all completions here, as a row that is computed before, once for all batches that name it."""

    def to(self, device: torch.device) -> "TrainingBatch":
        """The same batch on another device."""
        others = ("segments", "model_inputs", "kinds_B")
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}
        moved = {name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **moved, model_inputs={name: t.to(device) for name, t in self.model_inputs.items()})


def make_batch(groups: Sequence[Group], form: Form = "padded") -> TrainingBatch:
    """The groups' tensors."""
    rows = pad(groups) if form == "padded" else pack(groups, share=form == "shared")
    completions = [completion for group in groups for completion in group.completions]
    width = max(1, *map(len, completions))
    lengths_B = torch.tensor([len(completion) for completion in completions])
    written_BC = torch.arange(width) < lengths_B[:, None]
    trained_B = torch.tensor([float(group.trained) for group in groups for _ in group.completions])
    advantages = [value for group in groups for value in (group.advantages or [0.0] * len(group.completions))]
    return TrainingBatch(
        places_N=written_BC.flatten().nonzero()[:, 0],
        completion_ids_BC=torch.tensor([c + [PADDING] * (width - len(c)) for c in completions]),
        mask_BC=written_BC * trained_B[:, None],
        advantages_B=torch.tensor(advantages, dtype=torch.float32),
        prompt_ids_BP=prompt_ids(groups),
        kinds_B=tuple(group.kind for group in groups for _ in group.completions),
        engine_log_probs_BC=engine_log_probs(groups, width),
        **rows,
    )


def prompt_ids(groups: Sequence[Group]) -> torch.Tensor:
    """[B, P] of each completion's prompt, -1 before it."""
    ids_GP = pad_left([group.prompt.token_ids for group in groups], -1)
    return ids_GP.long().repeat_interleave(torch.tensor([len(group.completions) for group in groups]), dim=0)


def engine_log_probs(groups: Sequence[Group], width: int) -> torch.Tensor | None:
    """[B, C] of all completions, 0 for those that no engine wrote; None if there are no others."""
    if not any(group.log_probs for group in groups):
        return None
    rows = [row for group in groups for row in (group.log_probs or [[]] * len(group.completions))]
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows])


def pad(groups: Sequence[Group]) -> dict:
    """A row for each completion: prompts end, and completions begin, at one column."""
    rows = [(group.prompt, completion) for group in groups for completion in group.completions]
    prompts, lengths_B = [prompt for prompt, _ in rows], torch.tensor([len(completion) for _, completion in rows])
    width = max(1, int(lengths_B.max()))
    prompt_ids_RP, prompt_mask_RP = stack_prompts(prompts, PADDING)
    completion_ids_RC = torch.tensor([completion + [PADDING] * (width - len(completion)) for _, completion in rows])
    written_RC = torch.arange(width) < lengths_B[:, None]
    mask_RT = torch.cat([prompt_mask_RP, written_RC.long()], dim=1)
    predicts_RT = torch.zeros_like(mask_RT, dtype=torch.bool)
    predicts_RT[:, -width - 1 : -1] = written_RC  # a token is predicted where the one before it stands
    reads_R = torch.tensor([float(g.trained and len(c) > 0) for g in groups for c in g.completions])
    return {
        "input_ids_RT": torch.cat([prompt_ids_RP, completion_ids_RC], dim=1),
        "attention_mask_RT": mask_RT,
        "segments": (),
        "predictors_N": predicts_RT.flatten().nonzero()[:, 0],
        "readers_RT": mask_RT * reads_R[:, None],
        "model_inputs": stack_model_inputs(prompts, width),
    }


def pack(groups: Sequence[Group], share: bool) -> dict:
    """One row without padding, its prompts read once for a group or once for each completion."""
    # What is read: a prompt and the completions after it.
    runs = [(g, g.completions) for g in groups] if share else [(g, [c]) for g in groups for c in g.completions]
    tokens: list[int] = []
    segments: list[Segment] = []
    predictors: list[int] = []
    readers: list[float] = []
    for group, completions in runs:
        prompt, written = group.prompt.token_ids, [completion for completion in completions if completion]
        last = len(tokens) + len(prompt) - 1
        ends = list(accumulate(map(len, written), initial=last + 1))
        for start, completion in zip(ends, written, strict=False):
            # The prompt's last token predicts the first of every completion.
            predictors += [last, *range(start, start + len(completion) - 1)]
        head = len(segments)
        if len(written) == 1:  # nobody else reads the prompt: both are one text
            segments.append(Segment(len(prompt) + len(written[0])))
        else:
            segments += [Segment(len(prompt)), *(Segment(len(completion), head) for completion in written)]
        tokens += [*prompt, *(token for completion in written for token in completion)]
        readers += [float(group.trained) * len(written)] * len(prompt)
        readers += [float(group.trained)] * sum(map(len, written))
    return {
        "input_ids_RT": torch.tensor([tokens]),
        "attention_mask_RT": torch.ones(1, len(tokens), dtype=torch.long),
        "segments": tuple(segments),
        "predictors_N": torch.tensor(predictors, dtype=torch.long),
        "readers_RT": torch.tensor([readers]),
        "model_inputs": pack_model_inputs([group.prompt for group, _ in runs], segments),
    }


def pack_model_inputs(prompts: Sequence[Prompt], segments: Sequence[Segment]) -> dict[str, torch.Tensor]:
    """The pictures of the prompts, and what the processor says of each token of the row: 0 on completions."""
    inputs = stack_model_inputs([replace(prompt, token_inputs={}) for prompt in prompts])
    for name in dict.fromkeys(name for prompt in prompts for name in prompt.token_inputs):
        told = iter(prompts)
        values = [[] if segment.prefix is not None else token_input(next(told), name) for segment in segments]
        filled = [part + [0] * (segment.length - len(part)) for part, segment in zip(values, segments, strict=True)]
        inputs[name] = torch.tensor([[value for part in filled for value in part]])
    return inputs


def token_input(prompt: Prompt, name: str) -> list[int]:
    """What the processor says of each token; nothing of text."""
    return prompt.token_inputs.get(name, [0] * len(prompt.token_ids))
