"""A step of imitation equals the formulas of its loss, written out sample by sample in float64, however it is cut."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny_models import dense, groups, processor_for_questions

from sail_rl.batch import Group
from sail_rl.config import SftRecipe
from sail_rl.data.packing import make_batches
from sail_rl.data.stream import Shard
from sail_rl.launch import Run
from sail_rl.policy import Policy
from sail_rl.update_sft import supervised_figures, update_supervised

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ["cot", "direct", "direct", "cot", "direct"]
LENGTHS = [7, 2, 1, 12, 3]
WEIGHTS = {"cot": 3.0, "direct": 0.5}


@pytest.fixture(scope="module")
def case():
    """A tiny model and five samples of two kinds, with 0, 1 and 2 pictures."""
    processor = processor_for_questions()
    prompts = [group.prompt for group in groups(processor)]
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randint(10, 250, (length,), generator=generator).tolist() for length in LENGTHS]
    samples = [Group(prompts[n % 3], [targets[n]], kind=KINDS[n]) for n in range(len(KINDS))]
    return dense(processor), samples


def run_of(normalise_by):
    sft = {"normalise_by": normalise_by, "kind_weights": WEIGHTS}
    recipe = {"output_dir": "runs/x", "model": {"path": "x"}, "data": {"train": "pictures", "thinking": "by_kind"}}
    recipe |= {"sft": sft, "trainer": {"max_steps": 1}, "optim": {"max_grad_norm": 1e9}}
    return Run(SftRecipe.model_validate(recipe), Path(), Accelerator(cpu=True), Shard())


def step(model, samples, normalise_by, form, budget):
    """The figures of a step that leaves the weights as they are, and the gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    idle = Group(samples[1].prompt, [[10]], trained=False)
    batches = make_batches(samples, budget, idle, lambda count: count + 1, form)  # an idle one at the end
    figures = update_supervised(run_of(normalise_by), Policy(model), optimizer, batches)
    return figures, {name: weight.grad.clone() for name, weight in model.named_parameters()}


def formula(log_likelihoods, normalise_by):
    """The written formula; a log-likelihood is that of a sample's tokens, one by one."""
    sums = [values.sum() for values in log_likelihoods]
    if normalise_by == "samples":
        return -sum(sums) / len(sums)
    if normalise_by == "tokens":
        return -sum(sums) / sum(LENGTHS)
    loss = 0.0
    for kind, weight in WEIGHTS.items():
        members = [n for n, own in enumerate(KINDS) if own == kind]
        loss = loss - weight * sum(sums[n] for n in members) / sum(LENGTHS[n] for n in members)
    return loss / sum(WEIGHTS.values())


@pytest.fixture(scope="module")
def likelihoods(case):
    """Of every sample alone, in float64, by the model's own forward pass; with its model, for the gradients."""
    model, samples = case
    exact = copy.deepcopy(model).double()
    found = []
    for sample in samples:
        tokens = torch.tensor([sample.prompt.token_ids + sample.completions[0]])
        pictures = {name: tensor.double() for name, tensor in sample.prompt.model_inputs.items()}
        logits = exact(input_ids=tokens, **pictures, use_cache=False).logits[0, :-1].double()
        all_log_probs = torch.log_softmax(logits, -1)
        log_probs = all_log_probs.gather(-1, tokens[0, 1:, None])[:, 0]
        found.append(log_probs[-len(sample.completions[0]) :])
    return exact, found


@pytest.mark.parametrize("normalise_by", ["tokens", "samples", "kinds"])
@pytest.mark.parametrize(("form", "budget"), [("padded", 10**6), ("padded", 90), ("packed", 10**6), ("packed", 60)])
def test_loss_and_gradient_are_those_of_the_formula(case, likelihoods, normalise_by, form, budget):
    exact, found = likelihoods
    expected = formula(found, normalise_by)
    gradients = torch.autograd.grad(expected, list(exact.parameters()), retain_graph=True, allow_unused=True)
    figures, ours = step(*case, normalise_by, form, budget)
    assert figures["loss"] == pytest.approx(expected.item(), rel=1e-6)
    for (name, _), theirs in zip(exact.named_parameters(), gradients, strict=True):
        theirs = torch.zeros_like(ours[name]) if theirs is None else theirs.float()
        assert (ours[name] - theirs).abs().max() <= 2e-5 * theirs.abs().max().clamp(min=1e-3), name
    for kind in WEIGHTS:
        values = torch.cat([values for values, own in zip(found, KINDS, strict=True) if own == kind])
        assert figures[f"nll/{kind}"] == pytest.approx(-values.mean().item(), rel=1e-5)
        assert figures[f"tokens/{kind}"] == len(values)
    assert (figures["samples/cot"], figures["samples/direct"]) == (2, 3)
    assert figures["tokens/trained"] == sum(LENGTHS)


def test_a_step_of_one_kind_has_no_part_of_the_other(case):
    model, samples = case
    direct = [sample for sample in samples if sample.kind == "direct"]
    by_kinds, _ = step(model, direct, "kinds", "packed", 10**6)
    by_tokens, _ = step(model, direct, "tokens", "packed", 10**6)
    assert by_kinds["loss"] == pytest.approx(by_tokens["loss"], rel=1e-6)
    assert by_kinds["nll/cot"] is None
    assert by_kinds["samples/cot"] == 0


def test_figures_of_a_run_with_one_answer_form():
    sums = {"loss": 0.5} | {f"{name}/{kind}": 1.0 for name in ("nll", "right", "entropy") for kind in WEIGHTS}
    counts = {"tokens/cot": 4.0, "tokens/direct": 0.0, "samples/cot": 2.0, "samples/direct": 0.0}
    figures = supervised_figures("think", sums, counts)
    assert figures == {"loss": 0.5, "nll": 0.5, "token_accuracy": 0.5, "entropy": 0.5, "tokens/trained": 4.0}
