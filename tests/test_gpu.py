"""What needs a CUDA device: `make test-gpu`. The figures at real sizes are those of benchmarks/real_sizes.py."""

import copy
import json

import pytest
import torch
from conftest import SMALL, SMALL_GRPO, command
from tiny_models import dense, groups, processor_for_questions

from sail_rl.batch import make_batch
from sail_rl.model.modeling_sail_vl2 import SailVL2ForConditionalGeneration
from sail_rl.model.prefix_sharing import use_segments
from sail_rl.model.sizes import sail_vl2_config
from sail_rl.policy import token_terms

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
