"""Packing: which groups go into one micro-batch, so that rows are full, none is beyond the budget, and none is put off.

A step's groups are all there before it is cut: packing needs no more memory than these, and no sample
waits for a later one. Whoever has fewer adds idle rows, so that no process waits for another at the end.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from PIL import Image

from rollouts import Prompt
from rollouts.inputs import encoded_prompt
from sail_rl.batch import Form, Group, Segment, TrainingBatch, make_batch, prompt_ids
from sail_rl.model.prefix_sharing import BEFORE


def make_batches(
    groups: Sequence[Group],
    token_budget: int,
    idle: Group,
    highest: Callable[[int], int] = lambda count: count,
    form: Form = "padded",
    prompts_apart: bool = False,
) -> list[TrainingBatch]:
    """Micro-batches of this process: as many as any process has (`highest`), each with a picture.

    Distributed training waits for every process in every pass and for a gradient of every weight. A process that has
    nothing left adds the idle group with all tokens masked, and so does a batch of text alone: its gradient is zero.
    With `prompts_apart`, the prompt of a group beyond the budget is computed once for all batches that share it. These
    come first and are not counted: processes exchange their gradients in the last batch alone.
    """
    apart_budget = token_budget if prompts_apart and form == "shared" else math.inf
    large = [group for group in groups if size([group], form) > apart_budget]
    others = [group for group in groups if size([group], form) <= apart_budget]
    parts = split_by_token_budget(others, token_budget, form)
    batches = [make_batch([*part, idle] if needs_picture(part, idle) else part, form) for part in parts]
    missing = highest(max(len(batches), 1)) - len(batches)
    apart = [batch for group in large for batch in batches_apart(group, token_budget)]
    return apart + batches + [make_batch([idle], form)] * missing


def batches_apart(group: Group, token_budget: int) -> list[TrainingBatch]:
    """A group's completions, within the budget, and apart from them their prompt."""
    prompt = make_batch([replace(group, completions=[[]], advantages=[], log_probs=[])], "shared")
    bare = replace(group, prompt=Prompt(group.prompt.id, []))
    return [
        replace(
            make_batch([part], "shared"),
            **rows_after_prompt(part),
            prompt=prompt,
            prompt_ids_BP=prompt_ids([replace(part, prompt=group.prompt)]),
        )
        for part in cut(bare, token_budget, "shared")
        if part.longest_completion
    ]


def rows_after_prompt(group: Group) -> dict:
    """One row of completions whose prompt was read before. Its last hidden state stands before those of the row."""
    written = [completion for completion in group.completions if completion]
    starts = list(accumulate(map(len, written), initial=1))
    predictors = [[0, *range(start, start + len(c) - 1)] for start, c in zip(starts, written, strict=False)]
    return {
        "segments": tuple(Segment(len(completion), BEFORE) for completion in written),
        "predictors_N": torch.tensor([place for places in predictors for place in places], dtype=torch.long),
    }


def split_by_token_budget(groups: Sequence[Group], token_budget: int, form: Form = "padded") -> list[list[Group]]:
    """Groups per micro-batch, within the budget of tokens; a group beyond it is cut, down to single completions."""
    pieces = [piece for group in groups for piece in cut(group, token_budget, form)]
    if form != "padded":
        return fill_rows(pieces, token_budget, form)
    ordered = sorted(pieces, key=lambda group: (len(group.prompt.token_ids), group.longest_completion))
    parts: list[list[Group]] = []
    for group in ordered:
        if parts and size([*parts[-1], group], form) <= token_budget:
            parts[-1].append(group)
        else:
            parts.append([group])
    return parts


def fill_rows(groups: Sequence[Group], token_budget: int, form: Form) -> list[list[Group]]:
    """Groups per row, the largest first, each into the row that it fills best: no long one is left over for the end."""
    parts: list[list[Group]] = []
    room: list[int] = []
    for group in sorted(groups, key=lambda group: size([group], form), reverse=True):
        cost = size([group], form)
        fitting = [number for number, left in enumerate(room) if cost <= left]
        if fitting:
            best = min(fitting, key=room.__getitem__)
            parts[best].append(group)
            room[best] -= cost
        else:
            parts.append([group])
            room.append(token_budget - cost)
    return parts


def cut(group: Group, token_budget: int, form: Form) -> list[Group]:
    """The group in as few parts of equal number as fit the budget, long completions apart from short ones."""
    order = sorted(range(len(group.completions)), key=lambda member: len(group.completions[member]))
    for count in range(1, len(order) + 1):
        bounds = [len(order) * part // count for part in range(count + 1)]
        parts = [members(group, sorted(order[a:b])) for a, b in pairwise(bounds)]
        if all(size([part], form) <= token_budget for part in parts):
            return parts
    return [members(group, [member]) for member in range(len(order))]


def members(group: Group, chosen: Sequence[int]) -> Group:
    """The group with some of its completions."""
    advantages = [group.advantages[member] for member in chosen] if group.advantages else []
    log_probs = [group.log_probs[member] for member in chosen] if group.log_probs else []
    completions = [group.completions[member] for member in chosen]
    return replace(group, completions=completions, advantages=advantages, log_probs=log_probs)


def size(groups: Sequence[Group], form: Form) -> int:
    """Tokens of the rows that hold these groups, padding included."""
    if form == "padded":
        width = max(len(g.prompt.token_ids) for g in groups) + max(g.longest_completion for g in groups)
        return width * sum(len(g.completions) for g in groups)
    copies = [1 if form == "shared" else len(group.completions) for group in groups]
    prompts = sum(len(g.prompt.token_ids) * count for g, count in zip(groups, copies, strict=True))
    return prompts + sum(len(completion) for group in groups for completion in group.completions)


def needs_picture(groups: Sequence[Group], idle: Group) -> bool:
    """Whether these groups would leave the vision tower without a gradient although the idle group can give one."""
    return bool(idle.prompt.model_inputs) and not any(group.prompt.model_inputs for group in groups)


def idle_group(processor, with_picture: bool) -> Group:
    """One row that trains nothing, with a blank picture if the vision tower needs a gradient from every batch."""
    content = [{"type": "image"}] if with_picture else [{"type": "text", "text": "."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    images = [Image.new("RGB", (28, 28))] if with_picture else None
    prompt = encoded_prompt("idle", processor(text=[text], images=images, return_tensors="pt"))
    return Group(prompt, [[processor.tokenizer.eos_token_id]], trained=False)
