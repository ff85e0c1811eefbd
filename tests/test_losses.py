"""The pure losses against direct formulas in float64, written out token by token."""

import math

import pytest
import torch

from sail_rl.config import GrpoSection
from sail_rl.losses import (
    TermsOfLogits,
    entropy_bonus,
    entropy_threshold,
    importance_weights,
    is_clipped,
    kl_estimate,
    loss_normaliser,
    policy_loss,
    sample_scales,
    supervised_loss,
    token_log_probs,
)

B, T, V = 3, 5, 11
LENGTHS = (5, 2, 3)


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.fixture
def logits_BTV():
    return random(B, T, V, scale=3.0)


@pytest.fixture
def tokens_BT():
    return torch.randint(2, V, (B, T), generator=torch.Generator().manual_seed(1))  # never 0 or 1


@pytest.fixture
def mask_BT():
    return torch.tensor([[1.0] * length + [0.0] * (T - length) for length in LENGTHS])


@pytest.fixture
def policy():
    """Log-probabilities (new, old, reference) and advantages that clip on both sides."""
    old_BT = -random(B, T, seed=2).abs() - 0.5
    return {
        "log_probs_BT": old_BT + random(B, T, seed=3, scale=0.4),
        "old_log_probs_BT": old_BT,
        "advantages_B": torch.tensor([1.5, -0.7, 0.4], dtype=torch.float64),
    }


def distribution(logits_V, temperature, suppressed):
    """Probabilities of one token, by the definition."""
    weights = [0.0 if v in suppressed else math.exp(x / temperature) for v, x in enumerate(logits_V.tolist())]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("suppressed", [(), (0, 1)])
def test_log_probs_and_entropy_are_those_of_the_sampler(logits_BTV, tokens_BT, temperature, suppressed):
    terms = token_log_probs(logits_BTV, tokens_BT, temperature, suppressed)
    assert terms.log_probs_BT.dtype == torch.float32
    for b in range(B):
        for t in range(T):
            probabilities = distribution(logits_BTV[b, t], temperature, suppressed)
            entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
            log_prob = math.log(probabilities[tokens_BT[b, t]])
            assert terms.log_probs_BT[b, t].item() == pytest.approx(log_prob, rel=1e-5, abs=1e-5)
            assert terms.entropy_BT[b, t].item() == pytest.approx(entropy, rel=1e-5, abs=1e-5)


def test_suppressed_tokens_have_no_probability_and_the_rest_all_of_it(logits_BTV):
    logits_BTV[..., 1] = 50.0  # would otherwise take everything
    every_token_VBT = [torch.full((B, T), v) for v in range(V)]
    log_probs_VBT = torch.stack([token_log_probs(logits_BTV, t, 0.8, (0, 1)).log_probs_BT for t in every_token_VBT])
    assert (log_probs_VBT[:2] == -torch.inf).all()
    assert log_probs_VBT[2:].isfinite().all()
    torch.testing.assert_close(log_probs_VBT.exp().sum(0), torch.ones(B, T))


def test_suppression_leaves_the_logits_and_their_gradient_alone(logits_BTV, tokens_BT):
    logits_BTV = logits_BTV.float().requires_grad_()
    before = logits_BTV.detach().clone()
    terms = token_log_probs(logits_BTV, tokens_BT, suppressed_token_ids=(0, 1))
    terms.log_probs_BT.sum().backward()
    assert not terms.entropy_BT.requires_grad
    assert torch.equal(logits_BTV.detach(), before)
    assert logits_BTV.grad.isfinite().all()
    assert not logits_BTV.grad[..., :2].any()
    expected = torch.nn.functional.one_hot(tokens_BT, V) - torch.tensor(
        [[distribution(before[b, t], 1.0, (0, 1)) for t in range(T)] for b in range(B)]
    )
    torch.testing.assert_close(logits_BTV.grad, expected, atol=1e-6, rtol=1e-5)


def test_kl_estimate_is_never_negative_and_right_on_average(logits_BTV):
    """The mean over all tokens, weighted by the policy's probabilities, is KL(policy || reference)."""
    log_p = torch.log_softmax(logits_BTV, -1)
    log_q = torch.log_softmax(logits_BTV + random(B, T, V, seed=4), -1)
    estimate = kl_estimate(log_p, log_q)
    assert (estimate >= 0).all()
    assert not kl_estimate(log_p, log_p).any()
    torch.testing.assert_close((log_p.exp() * estimate).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1))
    # One token by hand: the policy gives it 1/2, the reference 1/4.
    one = kl_estimate(torch.tensor(0.5).log(), torch.tensor(0.25).log())
    assert one.item() == pytest.approx(0.5 - math.log(0.5) - 1)


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [
        (1.31, 1.0, True),
        (1.29, 1.0, False),
        (1.31, -1.0, False),
        (0.79, -1.0, True),
        (0.81, -1.0, False),
        (0.79, 1.0, False),
        (5.0, 0.0, False),
        (0.1, 0.0, False),
    ],
)
def test_is_clipped_exactly_where_the_loss_has_no_gradient(ratio, advantage, clipped):
    grpo = GrpoSection(epsilon=0.2, epsilon_high=0.3)
    assert is_clipped(torch.tensor([[ratio]]), torch.tensor([[advantage]]), grpo).item() is clipped
    log_prob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    loss, sums = policy_loss(
        log_prob,
        torch.zeros(1, 1),
        torch.tensor([advantage]),
        one,
        grpo,
        normaliser=1.0,
    )
    loss.backward()
    assert sums["clipped"] == clipped
    assert (log_prob.grad.item() == 0) == (clipped or advantage == 0)


@pytest.mark.parametrize(
    ("loss_type", "normaliser"), [("grpo", 3), ("dr_grpo", 3 * 7), ("dapo", sum(LENGTHS))], ids=lambda value: str(value)
)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_policy_loss_equals_the_formula(policy, mask_BT, loss_type, normaliser, beta):
    assert loss_normaliser(loss_type, LENGTHS, max_completion_length=7) == normaliser
    reference_BT = random(B, T, seed=5) - 1 if beta else None
    grpo = GrpoSection(loss_type=loss_type, epsilon=0.1, epsilon_high=0.3, beta=beta)
    loss, sums = policy_loss(
        **policy, mask_BT=mask_BT, reference_log_probs_BT=reference_BT, grpo=grpo, normaliser=normaliser
    )
    expected, clipped, kl_sum = 0.0, 0, 0.0
    for b, length in enumerate(LENGTHS):
        advantage, per_token = policy["advantages_B"][b].item(), []
        for t in range(length):
            new, old = policy["log_probs_BT"][b, t].item(), policy["old_log_probs_BT"][b, t].item()
            ratio = math.exp(new - old)
            surrogate = min(ratio * advantage, min(max(ratio, 0.9), 1.3) * advantage)
            difference = reference_BT[b, t].item() - new if beta else 0.0
            kl = math.exp(difference) - difference - 1
            clipped += surrogate < ratio * advantage
            kl_sum += kl
            per_token.append(beta * kl - surrogate)
        expected += sum(per_token) / length if loss_type == "grpo" else sum(per_token)
    assert loss.item() == pytest.approx(expected / normaliser, rel=1e-12)
    assert sums == pytest.approx({"clipped": clipped} | ({"kl": kl_sum} if beta else {}))
    assert 0 < clipped < sum(LENGTHS)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_masked_positions_change_nothing(policy, mask_BT, loss_type, level):
    """Neither loss nor log sums nor gradients, whatever stands there; and a row without any token gives no NaN."""
    mask_BT[1] = 0
    settings = {"loss_type": loss_type, "epsilon_high": 2.0 if loss_type == "cispo" else 0.2, "beta": 0.1}
    grpo = GrpoSection(**settings, importance_sampling_level=level)
    outcomes = []
    for seed in (6, 7):
        noise_BT = random(B, T, seed=seed) * (1 - mask_BT)
        log_probs_BT = (policy["log_probs_BT"] + noise_BT).requires_grad_()
        old_BT, reference_BT = policy["old_log_probs_BT"] - noise_BT, policy["old_log_probs_BT"] - 1 + 2 * noise_BT
        advantages_B = policy["advantages_B"]
        loss, sums = policy_loss(
            log_probs_BT, old_BT, advantages_B, mask_BT, grpo, 4.0, reference_log_probs_BT=reference_BT
        )
        loss.backward()
        outcomes.append((loss.item(), sums, log_probs_BT.grad))
    assert outcomes[0][:2] == outcomes[1][:2]
    assert math.isfinite(outcomes[0][0])
    assert torch.equal(outcomes[0][2], outcomes[1][2])
    assert not outcomes[0][2][mask_BT == 0].any()
    assert outcomes[0][2].any()


def test_supervised_loss_is_the_mean_negative_log_likelihood(logits_BTV, tokens_BT, mask_BT):
    log_probs_BT = torch.log_softmax(logits_BTV, -1).gather(-1, tokens_BT[..., None])[..., 0].requires_grad_()
    loss = supervised_loss(log_probs_BT, mask_BT, torch.full((B,), 1 / sum(LENGTHS), dtype=torch.float64))
    targets = tokens_BT.masked_fill(mask_BT == 0, -100).flatten()
    expected = torch.nn.functional.cross_entropy(logits_BTV.view(-1, V), targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    torch.testing.assert_close(log_probs_BT.grad, -mask_BT.double() / sum(LENGTHS))


@pytest.mark.parametrize(
    ("normalise_by", "expected"),
    [
        ("tokens", {"cot": 1 / 50, "direct": 1 / 50}),
        ("samples", {"cot": 1 / 20, "direct": 1 / 20}),
        ("kinds", {"cot": 3 / 4 / 40, "direct": 1 / 4 / 10}),
    ],
)
def test_scales_of_both_kinds(normalise_by, expected):
    counts = {"cot": 2.0, "direct": 18.0}, {"cot": 40.0, "direct": 10.0}
    assert sample_scales(normalise_by, *counts, {"cot": 3.0, "direct": 1.0}) == pytest.approx(expected)


def test_normaliser_of_nothing_is_not_zero():
    assert [loss_normaliser(kind, [], 8) for kind in ("grpo", "dr_grpo", "dapo", "cispo", "sapo")] == [1, 8, 1, 1, 1]


# Ratios of trainer to engine; of the last completion two tokens count. Sequences: 0.5, 6, 2.
RATIOS = [[2.0, 0.25, 1.0], [1.0, 2.0, 3.0], [4.0, 0.5, 99.0]]


@pytest.mark.parametrize(
    ("mode", "clip_min", "clip_max", "expected"),
    [
        ("token_truncate", None, 3.0, [[2, 0.25, 1], [1, 2, 3], [3, 0.5, 1]]),
        ("token_truncate", 0.5, 2.0, [[2, 0.5, 1], [1, 2, 2], [2, 0.5, 1]]),
        ("token_truncate", None, None, [[2, 0.25, 1], [1, 2, 3], [4, 0.5, 1]]),
        ("token_mask", None, 2.5, [[2, 0.25, 1], [1, 2, 0], [0, 0.5, 1]]),
        ("token_mask", 0.4, 3.5, [[2, 0, 1], [1, 2, 3], [0, 0.5, 1]]),
        ("token_mask", 0.4, None, [[2, 0, 1], [1, 2, 3], [4, 0.5, 1]]),
        ("sequence_truncate", None, 3.0, [[0.5] * 3, [3] * 3, [2] * 3]),
        ("sequence_truncate", 0.75, 2.5, [[0.75] * 3, [2.5] * 3, [2] * 3]),
        ("sequence_mask", None, 3.0, [[0.5] * 3, [0] * 3, [2] * 3]),
        ("sequence_mask", 0.75, 3.0, [[0] * 3, [0] * 3, [2] * 3]),
    ],
)
def test_importance_weights(mode, clip_min, clip_max, expected):
    engine_BT = random(3, 3, seed=5)
    trainer_BT = (engine_BT + torch.tensor(RATIOS, dtype=torch.float64).log()).requires_grad_()
    mask_BT = torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, 1, 0]])
    weights_BT = importance_weights(trainer_BT, engine_BT, mask_BT, mode=mode, clip_min=clip_min, clip_max=clip_max)
    assert not weights_BT.requires_grad
    assert weights_BT.tolist() == [pytest.approx(row) for row in expected]


def test_importance_weighs_the_policy_term_alone(policy, mask_BT):
    """Weights of 0 leave the KL term; weights of 2 double the rest."""
    options = {"grpo": GrpoSection(loss_type="dapo", beta=0.5), "normaliser": 10.0}
    kl = {"reference_log_probs_BT": policy["old_log_probs_BT"] + 0.1}

    def loss(weight, **more):
        weights_BT = torch.full((B, T), weight, dtype=torch.float64)
        return policy_loss(**policy, mask_BT=mask_BT, importance_BT=weights_BT, **options, **more)[0]

    plain, _ = policy_loss(**policy, mask_BT=mask_BT, **options)
    assert loss(2.0) == pytest.approx(2 * plain)
    assert loss(0.0) == 0
    assert loss(1.0, **kl) == pytest.approx(plain + loss(0.0, **kl))


RATIO_LOSSES = {
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01, "epsilon_high": 0.05},
        lambda ratio, log_prob, advantage: min(ratio * advantage, min(max(ratio, 0.99), 1.05) * advantage),
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.2},
        lambda ratio, log_prob, advantage: min(ratio, 1.2) * advantage * log_prob,
    ),
    "sapo": (
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
        lambda ratio, log_prob, advantage: (
            (4 / (2 if advantage > 0 else 3)) / (1 + math.exp(-(2 if advantage > 0 else 3) * (ratio - 1))) * advantage
        ),
    ),
}


@pytest.mark.parametrize("name", RATIO_LOSSES)
def test_ratio_losses_equal_their_formulas(policy, mask_BT, name):
    settings, of_token = RATIO_LOSSES[name]
    grpo = GrpoSection(**settings)
    normaliser = loss_normaliser(grpo.loss_type, LENGTHS, 7)
    loss, _ = policy_loss(**policy, mask_BT=mask_BT, grpo=grpo, normaliser=normaliser)
    expected = 0.0
    for b, length in enumerate(LENGTHS):
        new, old = (policy[key][b, :length].tolist() for key in ("log_probs_BT", "old_log_probs_BT"))
        ratios = [math.exp(n - o) for n, o in zip(new, old, strict=True)]
        if name == "gspo":
            ratios = [math.prod(ratios) ** (1 / length)] * length
        terms = [of_token(r, n, policy["advantages_B"][b].item()) for r, n in zip(ratios, new, strict=True)]
        expected -= sum(terms) / (sum(LENGTHS) if name == "cispo" else length * B)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_weight_that_cispo_cuts_has_no_gradient():
    """Three tokens with ratios 1, 3 and 3, the last of a bad completion: each keeps the gradient of its own weight."""
    log_probs_BT = torch.tensor([[1.0], [3.0], [3.0]], dtype=torch.float64).log().requires_grad_()
    grpo, ones = GrpoSection(loss_type="cispo", epsilon_high=2.0), torch.ones(3, 1)
    loss, sums = policy_loss(log_probs_BT, torch.zeros(3, 1), torch.tensor([1.0, 1.0, -1.0]), ones, grpo, 1.0)
    loss.backward()
    assert log_probs_BT.grad.flatten().tolist() == [-1.0, -2.0, 2.0]
    assert sums["clipped"] == 2


@pytest.mark.parametrize(
    ("estimator", "times_ratio"), [("k1", True), ("k3", True), ("k2", False)], ids=lambda value: str(value)
)
def test_kl_terms_have_the_gradient_of_the_divergence(logits_BTV, estimator, times_ratio):
    """On average over all tokens that could be drawn, which are the completions here."""
    grpo = GrpoSection(beta=1.0, kl_estimator=estimator, use_bias_correction_kl=times_ratio)
    logits_V = logits_BTV[0, 0].clone().requires_grad_()
    log_p, log_q = torch.log_softmax(logits_V, -1), torch.log_softmax(logits_BTV[0, 1], -1)
    expected = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits_V, retain_graph=True)[0]
    loss = 0.0
    for v in range(V):
        token, reference = log_p[v].view(1, 1), {"reference_log_probs_BT": log_q[v].view(1, 1)}
        one, _ = policy_loss(token, token.detach(), torch.zeros(1), torch.ones(1, 1), grpo, 1.0, **reference)
        loss = loss + log_p[v].exp().detach() * one
    torch.testing.assert_close(torch.autograd.grad(loss, logits_V)[0], expected)


def test_k1_and_k2_by_hand():
    """The policy gives a token 1/2, the reference 1/4."""
    pair = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    assert kl_estimate(*pair, "k1").item() == pytest.approx(math.log(2))
    assert kl_estimate(*pair, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)


def test_entropy_has_a_gradient_where_it_is_asked_for(logits_BTV, tokens_BT, mask_BT):
    """That of the entropy written out; suppressed tokens have none, and no NaN comes of them."""
    logits_BTV = logits_BTV.float().requires_grad_()
    terms = token_log_probs(logits_BTV, tokens_BT, 0.8, (0, 1), train_entropy=True)
    bonus = entropy_bonus(terms.entropy_BT, mask_BT, coefficient=0.5, tokens=sum(LENGTHS))
    (gradient,) = torch.autograd.grad(bonus, logits_BTV)
    probabilities = torch.softmax(logits_BTV[..., 2:].double() / 0.8, -1)
    expected = -(probabilities * probabilities.log()).sum(-1)
    expected = 0.5 * (expected * mask_BT).sum() / sum(LENGTHS)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits_BTV)[0], atol=1e-6, rtol=1e-4)
    assert bonus.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not gradient[..., :2].any()
    assert not token_log_probs(logits_BTV, tokens_BT, 0.8, (0, 1)).entropy_BT.requires_grad


@pytest.mark.parametrize("train_entropy", [False, True])
def test_the_gradient_by_hand_is_the_numerical_one(logits_BTV, tokens_BT, train_entropy):
    logits_BTV = logits_BTV.double().index_fill(-1, torch.tensor([0]), -torch.inf)

    def terms(drawn_BTV: torch.Tensor) -> list[torch.Tensor]:
        whole_BTV = torch.cat([logits_BTV[..., :1], drawn_BTV], dim=-1)
        log_probs_BT, entropy_BT, _ = TermsOfLogits.apply(whole_BTV, tokens_BT.clamp(min=1), train_entropy)
        return [log_probs_BT, entropy_BT * log_probs_BT] if train_entropy else [log_probs_BT]

    assert torch.autograd.gradcheck(terms, logits_BTV[..., 1:].requires_grad_())


@pytest.mark.parametrize(("top", "chosen"), [(0.2, [5, 9]), (0.5, [2, 3, 4, 5, 9]), (1.0, range(10))])
def test_high_entropy_tokens(top, chosen):
    entropies = torch.tensor([0.1, 0.2, 0.7, 0.6, 0.8, 0.9, 0.3, 0.4, 0.5, 1.0])
    threshold = entropy_threshold(entropies, top)
    assert (entropies >= threshold).nonzero().flatten().tolist() == list(chosen)
    assert entropy_threshold(entropies[:0], top) == 0
