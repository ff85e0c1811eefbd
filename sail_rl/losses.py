"""The losses: pure functions, tensors in, loss and sums for the log out.

Suffixes: _B completions, _T tokens of a completion, _V vocabulary; of a mixture of experts _L layers, _N all tokens
read, _E experts. Every loss is a sum over its micro-batch, divided by a normaliser of the whole step (all micro-batches
and processes), so that the gradient does not depend on how the batch was cut. A new loss is a new function here and its
name in `config_grpo.GrpoSection.loss_type`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from rollouts import Filters
from rollouts.distribution import drawn_logits
from sail_rl.config_grpo import GrpoSection

IMPOSSIBLE = -1e9  # below the log-probability of any token that can be drawn


class PolicyTerms(NamedTuple):
    """How the current policy sees the sampled tokens; a tuple, since FSDP2 and ZeRO-3 find tensors in no dataclass."""

    log_probs_BT: torch.Tensor
    """With gradient."""
    entropy_BT: torch.Tensor
    """With gradient where it is asked for."""
    likeliest_BT: torch.Tensor
    """Whether the token is the one that the policy finds likeliest."""


def token_log_probs(
    logits_BTV: torch.Tensor,
    tokens_BT: torch.Tensor,
    temperature: float = 1.0,
    suppressed_token_ids: Sequence[int] = (),
    filters: Filters | None = None,
    seen_BTV: torch.Tensor | None = None,
    train_entropy: bool = False,
) -> PolicyTerms:
    """Log-probability of each token and entropy of its distribution, in float32, as the sampler drew it."""
    logits_BTV = drawn_logits(logits_BTV, temperature, suppressed_token_ids, filters, seen_BTV, tokens_BT)
    return PolicyTerms(*TermsOfLogits.apply(logits_BTV, tokens_BT, train_entropy))


class TermsOfLogits(torch.autograd.Function):
    """All terms from one softmax and in few passes over the vocabulary; of these the gradient needs the probabilities,
    and the log-probabilities too if it is to reach the entropy."""

    @staticmethod
    def forward(ctx: Any, logits_BTV: torch.Tensor, tokens_BT: torch.Tensor, train_entropy: bool) -> Sequence:
        all_BTV = torch.log_softmax(logits_BTV, dim=-1)
        log_probs_BT = all_BTV.gather(-1, tokens_BT[..., None])[..., 0]
        likeliest_BT = log_probs_BT >= all_BTV.amax(-1)
        probs_BTV = all_BTV.exp()
        all_BTV.clamp_(min=IMPOSSIBLE)  # what cannot be drawn adds nothing to the entropy, to its gradient neither
        entropy_BT = -(all_BTV * probs_BTV if train_entropy else all_BTV.mul_(probs_BTV)).sum(-1)
        ctx.save_for_backward(tokens_BT, probs_BTV, *((all_BTV, entropy_BT) if train_entropy else ()))
        ctx.mark_non_differentiable(likeliest_BT, *(() if train_entropy else (entropy_BT,)))
        return log_probs_BT, entropy_BT, likeliest_BT

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        tokens_BT, probs_BTV, *of_entropy = ctx.saved_tensors
        for_log_probs_BT1, for_entropy_BT1, _ = (gradient[..., None] for gradient in gradients)
        d_logits_BTV = probs_BTV * -for_log_probs_BT1
        d_logits_BTV.scatter_add_(-1, tokens_BT[..., None], for_log_probs_BT1)
        if of_entropy:
            all_BTV, entropy_BT = of_entropy
            d_logits_BTV -= probs_BTV * (all_BTV + entropy_BT[..., None]) * for_entropy_BT1
        return d_logits_BTV, None, None


def loss_normaliser(loss_type: str, lengths: Sequence[int], max_completion_length: int) -> float:
    """What the sum over the whole step is divided by, from the lengths of all its completions, 0 of masked ones.

    Completions of groups that were left out for want of a signal count, so that leaving them out changes nothing.
    """
    if loss_type in ("grpo", "sapo"):
        return max(len(lengths), 1)
    if loss_type == "dr_grpo":
        return max(len(lengths), 1) * max_completion_length
    return max(sum(lengths), 1)


def policy_loss(
    log_probs_BT: torch.Tensor,
    old_log_probs_BT: torch.Tensor,
    advantages_B: torch.Tensor,
    mask_BT: torch.Tensor,
    grpo: GrpoSection,
    normaliser: float,
    *,
    reference_log_probs_BT: torch.Tensor | None = None,
    importance_BT: torch.Tensor | float = 1.0,
    chosen_BT: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The policy-gradient loss with an optional KL term; and its sums over tokens for the log.

    `importance_BT` weighs, and `chosen_BT` picks tokens of, all but the KL term, as TRL has it.
    """
    mask_BT = mask_BT.to(log_probs_BT.dtype)
    advantages_B1 = advantages_B[:, None]
    ratio_BT = policy_ratio(log_probs_BT, old_log_probs_BT, mask_BT, grpo.importance_sampling_level)
    loss_BT = -surrogate(ratio_BT, log_probs_BT, advantages_B1, grpo) * importance_BT * chosen_BT
    sums = {"clipped": masked_sum(is_clipped(ratio_BT, advantages_B1, grpo), mask_BT)}
    if reference_log_probs_BT is not None:
        kl_BT = kl_estimate(log_probs_BT, reference_log_probs_BT, grpo.kl_estimator)
        loss_BT = loss_BT + grpo.beta * (kl_BT * ratio_BT if grpo.use_bias_correction_kl else kl_BT)
        sums["kl"] = masked_sum(kl_BT, mask_BT)
    weights_BT = mask_BT
    if grpo.loss_type in ("grpo", "sapo"):
        weights_BT = mask_BT / mask_BT.sum(1, keepdim=True).clamp(min=1)
    return (loss_BT * weights_BT).sum() / normaliser, sums


def policy_ratio(
    log_probs_BT: torch.Tensor, old_log_probs_BT: torch.Tensor, mask_BT: torch.Tensor, level: str
) -> torch.Tensor:
    """Of the policy to the one before the updates: a ratio for each token, or of each completion the geometric mean."""
    difference_BT = log_probs_BT - old_log_probs_BT
    if level == "sequence":
        mean_B1 = (difference_BT * mask_BT).sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
        difference_BT = mean_B1.expand_as(difference_BT)
    return difference_BT.exp()


def surrogate(
    ratio_BT: torch.Tensor, log_probs_BT: torch.Tensor, advantages_B1: torch.Tensor, grpo: GrpoSection
) -> torch.Tensor:
    """What the update makes larger, token by token."""
    if grpo.loss_type == "cispo":
        return ratio_BT.clamp(max=grpo.upper_epsilon).detach() * advantages_B1 * log_probs_BT
    if grpo.loss_type == "sapo":
        sharpness_B1 = torch.where(advantages_B1 > 0, grpo.sapo_temperature_pos, grpo.sapo_temperature_neg)
        return torch.sigmoid(sharpness_B1 * (ratio_BT - 1)) * 4 / sharpness_B1 * advantages_B1
    clipped_BT = ratio_BT.clamp(1 - grpo.epsilon, 1 + grpo.upper_epsilon)
    return torch.min(ratio_BT * advantages_B1, clipped_BT * advantages_B1)


def is_clipped(ratio_BT: torch.Tensor, advantages_B1: torch.Tensor, grpo: GrpoSection) -> torch.Tensor:
    """Tokens whose gradient the clip removes; of `cispo`, those whose weight it cuts; of `sapo` none."""
    if grpo.loss_type == "cispo":
        return (ratio_BT > grpo.upper_epsilon) & (advantages_B1 != 0)
    if grpo.loss_type == "sapo":
        return torch.zeros_like(ratio_BT, dtype=torch.bool)
    too_low_BT = (ratio_BT < 1 - grpo.epsilon) & (advantages_B1 < 0)
    too_high_BT = (ratio_BT > 1 + grpo.upper_epsilon) & (advantages_B1 > 0)
    return too_low_BT | too_high_BT


def kl_estimate(
    log_probs_BT: torch.Tensor, reference_log_probs_BT: torch.Tensor, estimator: str = "k3"
) -> torch.Tensor:
    """Schulman's estimates of KL(policy || reference): `k1` unbiased, `k2` never negative, `k3` both."""
    difference_BT = reference_log_probs_BT - log_probs_BT
    if estimator == "k1":
        return -difference_BT
    if estimator == "k2":
        return difference_BT.square() / 2
    return difference_BT.exp() - difference_BT - 1


def entropy_bonus(entropy_BT: torch.Tensor, mask_BT: torch.Tensor, coefficient: float, tokens: float) -> torch.Tensor:
    """To be taken from the loss: the mean entropy of the mask's tokens, of which all micro-batches have so many."""
    return coefficient * (entropy_BT * mask_BT).sum() / max(tokens, 1.0)


def entropy_threshold(entropies_N: torch.Tensor, top: float) -> float:
    """The entropy that so large a share of all tokens reaches."""
    # NumPy's, since torch's quantile has a limit of numbers.
    return float(np.quantile(entropies_N.numpy(), 1 - top)) if len(entropies_N) else 0.0


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
    # Means over layers, which count as much as the micro-batch is of the step.
    share_LE, part = fractions_LE / experts_per_token, float(weights_N1.sum()) / normaliser
    used = {"largest_share": share_LE.max(), "expert_entropy": torch.special.entr(share_LE).sum(1).mean()}
    return loss, {"balance": float(loss.detach())} | {name: float(value) * part for name, value in used.items()}


def chosen_experts(probabilities_NE: torch.Tensor, experts_per_token: int, weights_N1: torch.Tensor) -> torch.Tensor:
    """How many tokens, by weight, each expert reads."""
    chosen_NK = probabilities_NE.topk(experts_per_token, dim=-1).indices
    return torch.zeros_like(probabilities_NE).scatter(1, chosen_NK, 1.0).mul(weights_N1).sum(0)
