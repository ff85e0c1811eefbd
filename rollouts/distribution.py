"""The distribution that tokens are drawn from: the one formula of the reference engine and of the trainer.

The steps, their order and their names are vLLM's, so that its log-probabilities are those of the same distribution.
Suffixes: _R rows, _V vocabulary, _B completions, _C tokens of a completion, _P tokens of a prompt.
"""

from collections.abc import Sequence

import torch

from rollouts import Filters

NEVER = torch.iinfo(torch.int32).max


def drawn_log_probs(
    logits_RV: torch.Tensor,
    temperature: float,
    suppressed: Sequence[int] = (),
    filters: Filters | None = None,
    seen_RV: torch.Tensor | None = None,
) -> torch.Tensor:
    """[R, V] log-probabilities in float32, -inf for what cannot be drawn; at temperature 0 nothing is cut off."""
    return torch.log_softmax(drawn_logits(logits_RV, temperature, suppressed, filters, seen_RV), dim=-1)


def drawn_logits(
    logits_RV: torch.Tensor,
    temperature: float,
    suppressed: Sequence[int] = (),
    filters: Filters | None = None,
    seen_RV: torch.Tensor | None = None,
    drawn_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """[R, V] what the log-probabilities are a log-softmax of.

    `seen_RV` says which tokens a repetition penalty falls on. `drawn_R` are tokens that stay whatever is cut off: when
    logits are computed again, rounding may put one of them across the edge.
    """
    logits_RV = logits_RV.float()
    if len(suppressed):
        columns = torch.tensor(suppressed, device=logits_RV.device).long()
        logits_RV = logits_RV.index_fill(-1, columns, -torch.inf)
    if filters and seen_RV is not None:
        logits_RV = torch.where(seen_RV, penalised(logits_RV, filters.repetition_penalty), logits_RV)
    if temperature not in (0, 1):  # a pass over all logits, and another one for the gradient
        logits_RV = logits_RV / temperature
    if filters and filters.cut and temperature:
        cut_RV = cut_off(logits_RV.detach(), filters)
        if drawn_R is not None:
            cut_RV = cut_RV.scatter(-1, drawn_R[..., None], False)
        logits_RV = logits_RV.masked_fill(cut_RV, -torch.inf)
    return logits_RV


def draw(log_probs_RV: torch.Tensor, uniforms_R: torch.Tensor, temperature: float) -> torch.Tensor:
    """A token for each row; the likeliest at temperature 0.

    A row's token depends on its own random number alone, so completions do not depend on which prompts share a batch.
    """
    if temperature == 0:
        return log_probs_RV.argmax(-1)
    cumulative_RV = log_probs_RV.exp().cumsum(-1, dtype=torch.float64)
    threshold_R1 = (uniforms_R * cumulative_RV[:, -1])[:, None]
    return torch.searchsorted(cumulative_RV, threshold_R1, right=True)[:, 0].clamp(max=log_probs_RV.shape[1] - 1)


def penalised(logits_RV: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits as they are for tokens that are there already: above 1 the penalty makes them less likely."""
    return torch.where(logits_RV > 0, logits_RV / penalty, logits_RV * penalty)


def cut_off(logits_RV: torch.Tensor, filters: Filters) -> torch.Tensor:
    """[R, V] whether a token is left out; of tokens that are equally likely at the edge all stay."""
    highest_R1 = logits_RV.amax(-1, keepdim=True)
    lowest_R1 = torch.full_like(highest_R1, -torch.inf)
    if filters.min_p:
        lowest_R1 = highest_R1 + torch.tensor(filters.min_p).log().item()
    if filters.top_k:
        count = min(filters.top_k, logits_RV.shape[-1])
        lowest_R1 = torch.maximum(lowest_R1, logits_RV.topk(count, dim=-1).values[..., -1:])
    if filters.top_p < 1:
        left_RV = logits_RV.masked_fill(logits_RV < lowest_R1, -torch.inf)
        ordered_RV = left_RV.sort(dim=-1, descending=True).values
        probabilities_RV = ordered_RV.softmax(-1)
        # Those before it have less than top_p together: the likeliest always stays.
        stays_RV = probabilities_RV.cumsum(-1) - probabilities_RV < filters.top_p
        lowest_R1 = ordered_RV.gather(-1, stays_RV.sum(-1, keepdim=True) - 1)
    return logits_RV < lowest_R1


def first_places(prompt_ids_BP: torch.Tensor, completion_ids_BC: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """[B, V] the place in the completion where a token stands first: -1 if the prompt has it, NEVER if nothing has.

    A prompt shorter than others is filled up with -1. At place c a token has been seen if its first place is before c.
    """
    places_C = torch.arange(completion_ids_BC.shape[1], dtype=torch.int32, device=completion_ids_BC.device)
    first_BV = places_C.new_full((len(completion_ids_BC), vocabulary + 1), NEVER)
    first_BV.scatter_reduce_(1, completion_ids_BC, places_C.expand(completion_ids_BC.shape).contiguous(), "amin")
    # What fills up goes into a column of its own, which is left out.
    first_BV.scatter_(1, prompt_ids_BP.where(prompt_ids_BP >= 0, vocabulary), -1)
    return first_BV[:, :vocabulary]
