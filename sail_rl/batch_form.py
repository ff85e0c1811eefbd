"""Which form the batches of a run take: the cheapest that is exact for the model, as tried on its first questions."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from sail_rl.batch import Form, Group, TrainingBatch, make_batch
from sail_rl.command_line import BadInput
from sail_rl.data.packing import members
from sail_rl.launch import Run
from sail_rl.losses import token_log_probs
from sail_rl.model.prefix_sharing import obstacle
from sail_rl.model.segment_kernels import MEANING as KERNELS
from sail_rl.model.segment_kernels import Attention, kernel_obstacle
from sail_rl.policy import token_terms
from sail_rl.sharding import autocast

TRIED_COMPLETIONS = 3
MEANING = {
    "shared": "each prompt is computed once for its group",
    "packed": "completions with a prompt each in one row without padding",
    "padded": "a padded row for each completion",
}


def choose_attention(run: Run, model) -> Attention:
    """What `update.attention` asks for, refused where it cannot run; `auto` suits the device."""
    asked = run.recipe.update.attention
    wanted: Attention = "varlen" if asked == "auto" else asked
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.recipe.trainer.mixed_precision, model.dtype)
    device = run.accelerator.device
    reason = kernel_obstacle(wanted, model.config, device, dtype) or (wanted != "sdpa" and obstacle(model)) or None
    if reason and asked != "auto":
        raise BadInput(f"update.attention = {asked}: {reason}; or leave it at auto")
    chosen: Attention = "sdpa" if reason else wanted
    if run.is_main and device.type != "cpu":
        why_not = f" (no {wanted}: {reason})" if reason else ""
        print(f"attention: {chosen}, {KERNELS[chosen]}{why_not}", flush=True)
    return chosen


def choose_form(run: Run, model, groups: Sequence[Group], weights=nullcontext) -> Form | None:
    """What `update.mode` asks for, checked against the model's own forward pass; None while there is nothing to try.

    `weights` is what the model has its weights within.
    """
    mode = run.recipe.update.mode
    forms: list[Form] = ["shared", "packed"] if mode == "auto" else [mode]
    if not run.highest(len(groups)):
        return None
    for form in forms:
        reason = None if form == "padded" else obstacle(model) or disagreement(run, model, groups, form, weights)
        if reason is None:
            return announced(run, form)
        message = f"update.mode = {mode}: {form} rows would not be exact for {type(model).__name__}: {reason}"
        if mode != "auto":
            raise BadInput(f"{message}; set update.mode=padded")
        if run.is_main:
            print(message, flush=True)
    return announced(run, "padded")


def announced(run: Run, form: Form) -> Form:
    """Say once which form is taken."""
    if run.is_main:
        print(f"update: {form} batches, {MEANING[form]}", flush=True)
    return form


def disagreement(run: Run, model, groups: Sequence[Group], form: Form, weights) -> str | None:
    """How far log-probabilities in this form are from the plain ones, if they are too far on any process."""
    with weights():
        difference = mean_difference(run, model, groups, form) if groups else 0.0
    with autocast(run):
        exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    allowed = 1e-4 if exact else 0.1
    worst = max(run.shard.gather([difference]))
    return None if worst <= allowed else f"log-probabilities differ by {worst:.2g} on average"


@torch.no_grad()
def mean_difference(run: Run, model, groups: Sequence[Group], form: Form) -> float:
    """Of a few completions of a question, one with pictures if there is any."""
    group = max(groups, key=lambda group: len(group.prompt.model_inputs))
    few = [members(group, range(min(TRIED_COMPLETIONS, len(group.completions))))]
    row, padded = (make_batch(few, form).to(run.accelerator.device) for form in (form, "padded"))
    was_training = model.training
    model.eval()
    with autocast(run):
        ours_BC, theirs_BC = token_terms(model, row).log_probs_BT, plain_log_probs(model, padded)
    model.train(was_training)
    return float(((ours_BC - theirs_BC).abs() * row.mask_BC).sum() / row.mask_BC.sum().clamp(min=1))


def plain_log_probs(model, batch: TrainingBatch) -> torch.Tensor:
    """[B, C] log-probabilities of a padded batch by the model's own forward pass."""
    width = batch.completion_ids_BC.shape[1]
    output = model(
        input_ids=batch.input_ids_RT,
        attention_mask=batch.attention_mask_RT,
        logits_to_keep=width + 1,
        use_cache=False,
        **batch.model_inputs,
    )
    # Position t predicts token t + 1.
    return token_log_probs(output.logits[:, :-1], batch.completion_ids_BC).log_probs_BT
