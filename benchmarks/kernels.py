"""What may make a policy update faster, each against the update without it, on this machine's device.

    python benchmarks/kernels.py [--short] [--json PATH]      (minutes; --short under two on two quiet cores)

`compile`: the decoder layers compiled, whole or with attention left out; `experts`: transformers' implementations of a
mixture of experts; `optimizer`: AdamW fused or not; `liger`: its norms, SwiGLU and rotary embedding, where it and a GPU
are there. The model is that of benchmarks/scaled_model.py, float32, under bfloat16 autocast on a GPU. Every variant
first has the loss, the gradient and the new weights of its family's first, then all are timed in turn. `ratio` is the
first's seconds by its own (more is better), `first_seconds` its first update, compiling included. The update has a
micro-batch for each group, of another layout: what compiles again for each shows.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import (
    device_name,
    interleave,
    machine,
    markdown,
    medians,
    prepare_process,
    results_file,
    save,
    timed,
)

SHAPE, SHORT_SHAPE = (512, 128, 4), (384, 32, 3)  # prompt, longest completion, groups
ROUNDS, SHORT_ROUNDS = 5, 2
FORM = "shared"
EXPERTS = {  # few are read by a token: batched_mm copies the weights of each for it
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}
# Of gradients, loss and entropy; and of the step that weights take, which is nearly a gradient's sign: rounding turns
# it where the gradient is next to nothing. In float32, and in bfloat16.
TOLERANCES = {"cpu": (1e-4, 0.1), "cuda": (3e-2, 0.5)}
COLUMNS = {
    "family": "family",
    "variant": "variant",
    "seconds": "seconds",
    "cpu_seconds": "CPU seconds",
    "ratio": "times faster",
    "first_seconds": "first update, s",
    "difference": "difference",
}


@dataclass(frozen=True)
class Variant:
    """One way to compute the same update."""

    change: Callable[[Any], None] = lambda policy: None
    """Of the model, in place."""
    optimizer: dict[str, bool] = field(default_factory=lambda: {"fused": True})
    """AdamW's own arguments."""


def main() -> None:
    """Measure all families and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a small update, two rounds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prepare_process()
    shape = SHORT_SHAPE if arguments.short else SHAPE
    result: dict[str, Any] = {"machine": machine() | {"device": device_name()}, "shape": shape, "rows": []}
    with TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # what an earlier run has compiled is compiled again
        for family, variants in families(arguments.short).items():
            world = make_world(family, shape)
            result["rows"] += measure(family, world, variants, SHORT_ROUNDS if arguments.short else ROUNDS)
    save(arguments.json or results_file("kernels", arguments.short), result, report(result))


def families(short: bool) -> dict[str, dict[str, Variant]]:
    """What is compared; the first of each family is today's update."""
    import torch

    # The first is transformers' default; batched_mm takes many times as long on a CPU.
    experts = ("grouped_mm", "eager") if short else ("grouped_mm", "eager", "batched_mm")
    found = {
        "compile": {
            "eager": Variant(),
            "layers, attention left out": Variant(compile_around_attention),
            # Half a minute on a CPU for each layout.
            **({} if short else {"layers": Variant(compile_layers)}),
        },
        "experts": {name: Variant(use_experts(name)) for name in experts},
        "optimizer": {
            "fused": Variant(),
            "foreach": Variant(optimizer={"foreach": True}),
            "a loop": Variant(optimizer={"foreach": False}),
        },
    }
    if torch.cuda.is_available() and find_spec("liger_kernel"):
        found["liger"] = {"eager": Variant(), "liger": Variant(with_liger)}
    return found


def make_world(family: str, shape: tuple[int, int, int]):
    """The scaled model with groups for it; a mixture of experts for their family."""
    from benchmarks import scaled_model
    from sail_rl.model.configuration_sail_vl2 import SailVL2Config
    from sail_rl.model.modeling_sail_vl2 import SailVL2ForConditionalGeneration

    world = scaled_model.make_world(scaled_model.Cell(*shape))
    if family != "experts":
        return world
    config = world.model.config
    mixture = SailVL2Config(
        vision_config=config.vision_config.to_dict(),
        text_config=config.text_config.to_dict() | EXPERTS,
        image_token_id=config.image_token_id,
        image_seq_length=config.image_seq_length,
    )
    model = scaled_model.random_model(SailVL2ForConditionalGeneration, mixture, world.processor.tokenizer, seed=0)
    return replace(world, model=model)


def decoder_layers(policy):
    """Of the language model."""
    return policy.base_model.language_model.layers


def compile_layers(policy) -> None:
    """Each layer whole; all layers have one code. It holds the layout's numbers, and is made again for the next one."""
    for layer in decoder_layers(policy):
        layer.compile(dynamic=True)


def compile_around_attention(policy) -> None:
    """Each layer without its attention, which has another layout in every row."""
    import torch
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    from sail_rl.model.prefix_sharing import segment_attention, use_segments

    name = "sail_rl_segments_left_out"
    AttentionInterface.register(name, torch.compiler.disable(segment_attention))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    use_segments(policy, name)
    compile_layers(policy)


def use_experts(name: str) -> Callable[[Any], None]:
    """How transformers computes the experts of a layer."""
    return lambda policy: policy.base_model.language_model.set_experts_implementation(name)


def with_liger(policy) -> None:
    """As `model.use_liger_kernel` does. The rotary embedding stays liger's from then on, also for the other variant."""
    from sail_rl.model.liger import use_liger

    use_liger(policy)


def measure(family: str, world, variants: Mapping[str, Variant], rounds: int) -> list[dict[str, Any]]:
    """A row for each variant."""
    print(f"{family}: {', '.join(variants)}; {rounds} rounds after one that is checked", flush=True)
    sides = {name: side_of(variant, world) for name, variant in variants.items()}
    baseline = next(iter(variants))
    steps = {name: finished(side.step) for name, side in sides.items()}
    outcomes: dict[str, Any] = {}
    first = {name: timed(lambda name=name: outcomes.update({name: steps[name]()})).wall for name in steps}
    differences = {
        name: difference((side.model, outcomes[name]), (sides[baseline].model, outcomes[baseline]), world, name)
        for name, side in sides.items()
    }
    interleave(steps, 1)
    timings = interleave(steps, rounds)
    wall, cpu = medians(timings, "wall"), medians(timings, "cpu")
    return [
        {"family": family, "variant": name, "seconds": wall[name], "cpu_seconds": cpu[name]}
        | {"ratio": wall[baseline] / wall[name], "first_seconds": first[name]}
        | {"difference": f"{differences[name]:.0e}"}
        for name in variants
    ]


def side_of(variant: Variant, world):
    """The update of train_grpo.py with a change, a micro-batch for each group."""
    import torch
    from accelerate import Accelerator

    from benchmarks.contestants import our_contestant

    on_gpu = torch.cuda.is_available()
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision="bf16" if on_gpu else "no")
    budget = world.cell.prompt + sum(world.lengths[: world.cell.size])

    def optimizer_of(model, optim):
        settings = {"betas": (optim.adam_beta1, optim.adam_beta2), "weight_decay": optim.weight_decay}
        return torch.optim.AdamW(model.parameters(), lr=0.0, **settings, **variant.optimizer)

    options = {"change": variant.change, "optimizer_of": optimizer_of, "accelerator": accelerator}
    return our_contestant(world, FORM, token_budget=budget, **options)


def finished(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step and what it has left to a GPU."""
    import torch

    def whole() -> Any:
        outcome = step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return outcome

    return whole


def difference(ours, expected, world, name: str) -> float:
    """Of (model, outcome) after a first step: the largest of gradient, loss and entropy; weights must move alike."""
    from benchmarks.contestants import gradient_difference

    (model, outcome), (theirs, wanted) = ours, expected
    pairs = [(outcome.loss, wanted.loss), (outcome.entropy, wanted.entropy), (outcome.grad_norm, wanted.grad_norm)]
    found = max(gradient_difference(model, theirs), *(abs(a - b) / abs(b) for a, b in pairs))
    moved = apart(model, theirs) / apart(theirs, world.model)
    allowed, allowed_move = TOLERANCES[theirs.device.type]
    if not (found <= allowed and moved <= allowed_move):
        raise RuntimeError(f"{name} makes another update: gradients {found:.1e}, steps {moved:.1e} apart")
    return found


def apart(ours, theirs) -> float:
    """The distance of two models' weights."""
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return sum(float((a.detach() - b.detach().to(a.device)).double().square().sum()) for a, b in pairs) ** 0.5


def report(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    prompt, completion, groups = result["shape"]
    text = f"One policy update of {groups} groups; prompts of {prompt} tokens, completions up to {completion}; medians."
    return f"{text}\n\n{markdown(result['rows'], COLUMNS)}\nMachine: {result['machine']}\n"


if __name__ == "__main__":
    main()
