"""What needs a CUDA device: `make test-gpu`. The figures at real sizes are those of benchmarks/real_sizes.py."""

import copy
import json

import pytest
import torch
from conftest import SMALL, SMALL_GRPO, command
from test_prefix_sharing import ragged_groups
from tiny_models import dense, groups, processor_for_questions

from sail_rl.batch import make_batch
from sail_rl.model.modeling_sail_vl2 import SailVL2ForConditionalGeneration
from sail_rl.model.prefix_sharing import Layout, segment_attention, use_segments
from sail_rl.model.segment_kernels import flex_segments, implementation
from sail_rl.model.sizes import sail_vl2_config
from sail_rl.policy import Policy, token_terms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("form", ["padded", "packed", "shared"])
def test_log_probs_and_gradients_are_those_of_the_cpu(form):
    """float32 without TF32, pictures and text."""
    processor = processor_for_questions()
    here, batch = dense(processor), make_batch(groups(processor), form)
    there = copy.deepcopy(here).cuda()
    for model in (here, there):
        use_segments(model)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    ours, theirs = token_terms(here, batch), token_terms(there, batch.to(torch.device("cuda")))
    torch.testing.assert_close(theirs.log_probs_BT.cpu(), ours.log_probs_BT, rtol=0, atol=1e-4)
    for terms, mask_BC in ((ours, batch.mask_BC), (theirs, batch.mask_BC.cuda())):
        (terms.log_probs_BT * mask_BC).sum().backward()
    for (name, weight), other in zip(here.named_parameters(), there.parameters(), strict=True):
        difference = (weight.grad - other.grad.cpu()).norm() / weight.grad.norm().clamp(min=1e-6)
        assert difference < 1e-3, name


def log_probs_and_gradients(model, form, attention, autocast):
    """Of ragged groups on the GPU, in float32."""
    ragged = ragged_groups([group.prompt for group in groups(processor_for_questions())], 250)
    batch = make_batch(ragged, form).to(torch.device("cuda"))
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        terms = Policy(model, attention)(batch)
    (terms.log_probs_BT * batch.mask_BC * batch.advantages_B[:, None]).sum().backward()
    return (terms.log_probs_BT * batch.mask_BC).detach(), torch.cat(
        [w.grad.float().flatten() for w in model.parameters()]
    )


@pytest.mark.parametrize(
    ("attention", "precision"),
    [
        *(
            (attention, precision)
            for attention in ("sdpa", "flex")
            for precision in ("float32", "bfloat16", "autocast")
        ),
        *(("varlen", precision) for precision in ("bfloat16", "autocast")),
    ],
)
@pytest.mark.parametrize("form", ["shared", "packed"])
def test_every_kernel_equals_padded_rows(form, attention, precision):
    """In float32 to its precision; in bfloat16 about as near to float32 as padded rows in bfloat16 are."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    exact = dense(processor_for_questions()).cuda()
    model = copy.deepcopy(exact).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    expected = log_probs_and_gradients(exact, "padded", "sdpa", autocast=False)
    plain = log_probs_and_gradients(model, "padded", "sdpa", precision == "autocast")
    ours = log_probs_and_gradients(model, form, attention, precision == "autocast")
    for told, rounded, wanted in zip(ours, plain, expected, strict=True):
        allowed = 1e-4 if precision == "float32" else 1.5 * float((rounded - wanted).norm() / wanted.norm())
        assert (told - wanted).norm() <= allowed * wanted.norm()


def test_flex_is_compiled_once_for_all_lengths():
    attention = implementation(flex_segments)
    layouts = [Layout((300, 40, 7), (None, 0, 0)), Layout((90, 500, 1, 60, 200), (None, 0, 0, None, 3))]
    for layout, stance in zip(
        [*layouts, layouts[0]], ["default", "fail_on_recompile", "fail_on_recompile"], strict=True
    ):
        shape = (sum(layout.lengths), 128)
        tensors = [
            torch.randn(1, n, *shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2)
        ]
        with torch.compiler.set_stance(stance):
            output, _ = attention(None, *tensors, None, layout=layout)
            output.float().square().sum().backward()
        expected, _ = segment_attention(None, *tensors, None, layout=layout)
        torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_both_trainers_run_two_steps(tmp_path, precision):
    changes = (f"trainer.mixed_precision={precision}", "trainer.gradient_checkpointing=true")
    start = command(
        "sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", *SMALL, *changes, f"output_dir={tmp_path}/sft"
    )
    assert start.returncode == 0, start.stderr
    run = (f"model={tmp_path}/sft/final", f"output_dir={tmp_path}/grpo")
    result = command("sail_rl/train_grpo.py", "recipes/quickstart.yaml", *SMALL_GRPO, *changes, *run)
    assert result.returncode == 0, result.stderr
    environment = json.loads((tmp_path / "grpo/environment.json").read_text())
    assert environment["device"] == torch.cuda.get_device_name()


def test_the_2b_shapes_read_a_picture_in_bfloat16():
    config = sail_vl2_config("2b", image_token_id=151671)
    with torch.device("cuda"):
        model = SailVL2ForConditionalGeneration(config).bfloat16()
        tokens = torch.cat([torch.full((1, 256), 151671), torch.randint(0, 1000, (1, 16))], dim=1)
        picture = torch.randn(1, 3, 448, 448, dtype=torch.bfloat16)
    logits = model(input_ids=tokens, pixel_values=picture).logits
    logits.float().logsumexp(-1).sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)


def test_liger_computes_the_same():
    """With its own kernels, gradients included."""
    pytest.importorskip("liger_kernel")
    from sail_rl.model.liger import use_liger

    plain = dense(processor_for_questions()).cuda()
    changed = copy.deepcopy(plain)
    expected = log_probs_and_gradients(plain, "shared", "sdpa", autocast=False)
    use_liger(changed)
    for found, wanted in zip(log_probs_and_gradients(changed, "shared", "sdpa", False), expected, strict=True):
        assert (found - wanted).norm() <= 1e-3 * wanted.norm()
