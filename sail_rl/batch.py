"""From prompts and completions to the padded tensors of one forward pass.

A row is [padding | prompt | completion | padding]: prompts end and completions begin at one column, so that only
completion positions need logits. Suffixes: _B rows, _T tokens of a row, _C tokens of a completion.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from rollouts import Prompt
from rollouts.hf import stack_model_inputs

PADDING = 0  # any token will do: padding is masked in attention and in the loss


@dataclass(frozen=True)
class Group:
    """A prompt with its completions: the unit of work, never split over micro-batches."""

    prompt: Prompt
    completions: list[list[int]]
    """Token ids."""
    advantages: list[float] = field(default_factory=list)
    """One for each completion; empty for SFT."""

    trained: bool = True
    """False for an idle group, whose tokens are all masked."""

    @property
    def longest_completion(self) -> int:
        return max(len(completion) for completion in self.completions)


@dataclass(frozen=True)
class TrainingBatch:
    """One micro-batch."""

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    completion_ids_BC: torch.Tensor
    mask_BC: torch.Tensor
    """Float: 1 on tokens that are trained."""
    advantages_B: torch.Tensor
    model_inputs: dict[str, torch.Tensor]
    """The pictures of all rows."""

    def to(self, device: torch.device) -> "TrainingBatch":
        """The same batch on another device."""
        moved = {key: value.to(device) for key, value in self.model_inputs.items()}
        return TrainingBatch(
            self.input_ids_BT.to(device),
            self.attention_mask_BT.to(device),
            self.completion_ids_BC.to(device),
            self.mask_BC.to(device),
            self.advantages_B.to(device),
            moved,
        )


def split_by_token_budget(groups: Sequence[Group], token_budget: int) -> list[list[Group]]:
    """Whole groups per micro-batch, so that rows times width stays within the budget; a larger group stands alone."""
    ordered = sorted(groups, key=lambda group: (len(group.prompt.token_ids), group.longest_completion))
    parts: list[list[Group]] = []
    for group in ordered:
        if parts and padded_tokens([*parts[-1], group]) <= token_budget:
            parts[-1].append(group)
        else:
            parts.append([group])
    return parts


def padded_tokens(groups: Sequence[Group]) -> int:
    """Tokens of the padded rectangle that holds these groups."""
    width = max(len(g.prompt.token_ids) for g in groups) + max(g.longest_completion for g in groups)
    return width * sum(len(g.completions) for g in groups)


def make_batch(groups: Sequence[Group]) -> TrainingBatch:
    """Pad the groups' rows into one batch."""
    rows = [(group.prompt, completion) for group in groups for completion in group.completions]
    trained = [float(group.trained) for group in groups for _ in group.completions]
    prompt_width = max(len(prompt.token_ids) for prompt, _ in rows)
    completion_width = max(1, max(len(completion) for _, completion in rows))
    prompt_ids = [[PADDING] * (prompt_width - len(p.token_ids)) + p.token_ids for p, _ in rows]
    completion_ids = [c + [PADDING] * (completion_width - len(c)) for _, c in rows]
    prompt_mask = [[0] * (prompt_width - len(p.token_ids)) + [1] * len(p.token_ids) for p, _ in rows]
    completion_mask = [[1] * len(c) + [0] * (completion_width - len(c)) for _, c in rows]
    mask_BC = torch.tensor(completion_mask)
    advantages = [value for group in groups for value in (group.advantages or [0.0] * len(group.completions))]
    return TrainingBatch(
        input_ids_BT=torch.cat([torch.tensor(prompt_ids), torch.tensor(completion_ids)], dim=1),
        attention_mask_BT=torch.cat([torch.tensor(prompt_mask), mask_BC], dim=1),
        completion_ids_BC=torch.tensor(completion_ids),
        mask_BC=mask_BC.float() * torch.tensor(trained)[:, None],
        advantages_B=torch.tensor(advantages, dtype=torch.float32),
        model_inputs=stack_model_inputs([prompt for prompt, _ in rows], torch.device("cpu")),
    )


def make_batches(
    groups: Sequence[Group],
    token_budget: int,
    idle: Group,
    highest: Callable[[int], int] = lambda count: count,
) -> list[TrainingBatch]:
    """Micro-batches of this process: as many as any process has (`highest`), each with a picture.

    Distributed training waits for every process in every pass and for a gradient of every weight. A process that has
    nothing left adds the idle group with all tokens masked, and so does a batch of text alone: its gradient is zero.
    """
    parts = split_by_token_budget(groups, token_budget)
    batches = [make_batch([*part, idle] if needs_picture(part, idle) else part) for part in parts]
    missing = highest(max(len(batches), 1)) - len(batches)
    return batches + [make_batch([idle])] * missing


def needs_picture(groups: Sequence[Group], idle: Group) -> bool:
    """Whether these groups would leave the vision tower without a gradient although the idle group can give one."""
    return bool(idle.prompt.model_inputs) and not any(group.prompt.model_inputs for group in groups)


def idle_group(processor, with_picture: bool) -> Group:
    """One row that trains nothing, with a blank picture if the vision tower needs a gradient from every batch."""
    content = [{"type": "image"}] if with_picture else [{"type": "text", "text": "."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    images = [Image.new("RGB", (28, 28))] if with_picture else None
    encoded = processor(text=[text], images=images, return_tensors="pt")
    model_inputs = {key: value for key, value in encoded.items() if key not in ("input_ids", "attention_mask")}
    prompt = Prompt("idle", encoded["input_ids"][0].tolist(), model_inputs=model_inputs)
    return Group(prompt, [[processor.tokenizer.eos_token_id]], trained=False)
