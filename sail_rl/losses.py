"""The losses: pure functions, tensors in, loss and sums for the log out.

Suffixes: _B completions, _T tokens of a completion, _V vocabulary; of a mixture of experts _L layers, _N all tokens
read, _E experts. Every loss is a sum over its micro-batch, divided by a normaliser of the whole step (all micro-batches
and processes), so that the gradient does not depend on how the batch was cut. A new loss is a new function here and its
name in `config.GrpoSection.loss_type`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from rollouts import Filters
from rollouts.distribution import drawn_log_probs


class PolicyTerms(NamedTuple):
    """How the current policy sees the sampled tokens; a tuple, since FSDP2 and ZeRO-3 find tensors in no dataclass."""

    log_probs_BT: torch.Tensor
    """With gradient."""
    entropy_BT: torch.Tensor
    """Without gradient."""
    likeliest_BT: torch.Tensor
    """Whether the token is the one that the policy finds likeliest."""


def token_log_probs(
    logits_BTV: torch.Tensor,
    tokens_BT: torch.Tensor,
    temperature: float = 1.0,
    suppressed_token_ids: Sequence[int] = (),
    filters: Filters | None = None,
    seen_BTV: torch.Tensor | None = None,
) -> PolicyTerms:
    """Log-probability of each token and entropy of its distribution, in float32, as the sampler drew it."""
    all_log_probs_BTV = drawn_log_probs(logits_BTV, temperature, suppressed_token_ids, filters, seen_BTV, tokens_BT)
    log_probs_BT = all_log_probs_BTV.gather(-1, tokens_BT[..., None])[..., 0]
    with torch.no_grad():
        # 0 * log 0 is 0 here: suppressed tokens add nothing.
        entropy_BT = torch.special.entr(all_log_probs_BTV.exp()).sum(-1)
        likeliest_BT = all_log_probs_BTV.argmax(-1) == tokens_BT
    return PolicyTerms(log_probs_BT, entropy_BT, likeliest_BT)


def loss_normaliser(loss_type: str, lengths: Sequence[int], max_completion_length: int) -> float:
    """What the sum over the whole step is divided by, from the lengths of all its completions.

    Completions of groups that were left out for want of a signal count, so that leaving them out changes nothing.
    """
    if loss_type == "grpo":
        return max(len(lengths), 1)
    if loss_type == "dr_grpo":
        return max(len(lengths), 1) * max_completion_length
    return max(sum(lengths), 1)


def policy_loss(
    log_probs_BT: torch.Tensor,
    old_log_probs_BT: torch.Tensor,
    advantages_B: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    loss_type: str,
    epsilon: float,
    epsilon_high: float,
    normaliser: float,
    beta: float = 0.0,
    reference_log_probs_BT: torch.Tensor | None = None,
    importance_BT: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The clipped policy-gradient loss with an optional KL term; and its sums over tokens for the log.

    `grpo` averages tokens within a completion and then completions; `dapo` averages all tokens of the step;
    `dr_grpo` divides by a constant, so that length has no influence. `importance_BT` weighs all but the KL term, as
    TRL has it.
    """
    mask_BT = mask_BT.to(log_probs_BT.dtype)
    advantages_B1 = advantages_B[:, None]
    ratio_BT = torch.exp(log_probs_BT - old_log_probs_BT)
    clipped_BT = ratio_BT.clamp(1 - epsilon, 1 + epsilon_high)
    loss_BT = -torch.min(ratio_BT * advantages_B1, clipped_BT * advantages_B1) * importance_BT
    sums = {"clipped": masked_sum(is_clipped(ratio_BT, advantages_B1, epsilon, epsilon_high), mask_BT)}
    if reference_log_probs_BT is not None:
        kl_BT = kl_estimate(log_probs_BT, reference_log_probs_BT)
        loss_BT = loss_BT + beta * kl_BT
        sums["kl"] = masked_sum(kl_BT, mask_BT)
    weights_BT = mask_BT
    if loss_type == "grpo":
        weights_BT = mask_BT / mask_BT.sum(1, keepdim=True).clamp(min=1)
    return (loss_BT * weights_BT).sum() / normaliser, sums


def importance_weights(
    log_probs_BT: torch.Tensor,
    engine_log_probs_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> torch.Tensor:
    """Ratios of trainer to engine, for what the engine sampled otherwise than the trainer would have; no gradient.

    `token_*`: a ratio for each token. `sequence_*`: that of all its tokens together, for each. `*_truncate`: cut to the
    bounds, a missing one being none. `*_mask`: 0 beyond them.
    """
    difference_BT = (log_probs_BT.detach() - engine_log_probs_BT) * mask_BT
    if mode.startswith("sequence"):
        difference_BT = difference_BT.sum(1, keepdim=True).expand_as(difference_BT)
    ratio_BT = difference_BT.exp()
    low, high = clip_min or 0.0, float("inf") if clip_max is None else clip_max
    if mode.endswith("mask"):
        return torch.where((ratio_BT >= low) & (ratio_BT <= high), ratio_BT, 0.0)
    return ratio_BT.clamp(low, high)


def is_clipped(ratio_BT: torch.Tensor, advantages_B1: torch.Tensor, epsilon: float, epsilon_high: float):
    """Tokens whose gradient the clip removes."""
    too_low_BT = (ratio_BT < 1 - epsilon) & (advantages_B1 < 0)
    too_high_BT = (ratio_BT > 1 + epsilon_high) & (advantages_B1 > 0)
    return too_low_BT | too_high_BT


def kl_estimate(log_probs_BT: torch.Tensor, reference_log_probs_BT: torch.Tensor) -> torch.Tensor:
    """Schulman's unbiased, never negative estimate of KL(policy || reference) ("k3")."""
    difference_BT = reference_log_probs_BT - log_probs_BT
    return difference_BT.exp() - difference_BT - 1


def masked_sum(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> float:
    """Sum over the tokens of the mask, for the log."""
    return float((values_BT.detach() * mask_BT).sum())


def sample_scales(
    normalise_by: str,
    samples: Mapping[str, float],
    tokens: Mapping[str, float],
    kind_weights: Mapping[str, float],
) -> dict[str, float]:
    """What the log-likelihood of one sample of each kind is multiplied with, from the whole step's counts by kind.

    `samples`: the mean over samples of the summed tokens; `tokens`: the mean over all tokens; `kinds`: the weighted
    mean over the kinds that the step has, each of which is a mean over its own tokens.
    """
    present = [kind for kind in samples if samples[kind]]
    if normalise_by == "samples":
        return dict.fromkeys(present, 1 / sum(samples.values()))
    if normalise_by == "tokens":
        return dict.fromkeys(present, 1 / sum(tokens.values()))
    total = sum(kind_weights[kind] for kind in present)
    return {kind: kind_weights[kind] / total / tokens[kind] for kind in present}


def supervised_loss(log_probs_BT: torch.Tensor, mask_BT: torch.Tensor, scales_B: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each sample's target, scaled and summed."""
    return -((log_probs_BT * mask_BT).sum(1) * scales_B).sum()


def balance_loss(
    router_logits_LNE: Sequence[torch.Tensor],
    weights_N: torch.Tensor,
    experts_per_token: int,
    normaliser: float,
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The load-balancing loss of a mixture of experts (Switch Transformer's), and its sums for the log.

    E experts x their fraction of the tokens x their mean probability, over all layers L and tokens N, each of which
    counts as often as its weight says.
    The fractions, which have no gradient, are those of the same micro-batch on all processes together: each process's
    part is then linear in its own tokens, and the parts add up to the loss, and the gradient, of the whole.
    `normaliser` is the sum of the step's weights.
    """
    weights_N1 = weights_N.float()[:, None]
    probabilities_LNE = [torch.softmax(logits_NE.float(), dim=-1) for logits_NE in router_logits_LNE]
    with torch.no_grad():
        counts_LE = torch.stack([chosen_experts(p_NE, experts_per_token, weights_N1) for p_NE in probabilities_LNE])
        counts_LE, tokens = sum_over_processes(counts_LE), sum_over_processes(weights_N1.sum())
        fractions_LE = counts_LE / tokens.clamp(min=1)
    probability_E = torch.stack([(p_NE * weights_N1).sum(0) for p_NE in probabilities_LNE]).mean(0) / normaliser
    experts = fractions_LE.shape[1]
    loss = experts * (fractions_LE.mean(0) * probability_E).sum()
    share = float(fractions_LE.max()) / experts_per_token
    return loss, {"balance": float(loss.detach()), "largest_share": share * float(weights_N1.sum()) / normaliser}


def chosen_experts(probabilities_NE: torch.Tensor, experts_per_token: int, weights_N1: torch.Tensor) -> torch.Tensor:
    """How many tokens, by weight, each expert reads."""
    chosen_NK = probabilities_NE.topk(experts_per_token, dim=-1).indices
    return torch.zeros_like(probabilities_NE).scatter(1, chosen_NK, 1.0).mul(weights_N1).sum(0)
