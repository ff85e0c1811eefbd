"""The engine that `rollout.engine` names, made for the run's model."""

import copy
import importlib.util
from pathlib import Path

from rollouts import RolloutEngine
from rollouts.hf import HFEngine
from sail_rl.checkpoint import weight_names
from sail_rl.command_line import BadInput
from sail_rl.launch import Run
from sail_rl.sharding import Whole

INSTALL_VLLM = "install it with `make install`, or with uv: `--extra vllm` for a GPU, `--group cpu` for none"


def make_engine(run: Run, whole: Whole, processor, suppressed: list[int]) -> RolloutEngine:
    """Who writes this run's completions; no weights are loaded yet."""
    rollout = run.recipe.rollout
    if rollout.engine == "hf":
        return HFEngine(whole.model, processor.tokenizer, suppressed, rollout.batch_size, whole.weights)
    return make_vllm_engine(run, whole.model, processor, suppressed)


def make_vllm_engine(run: Run, model, processor, suppressed: list[int]) -> RolloutEngine:
    """vLLM in this process, started from a folder of the run's own."""
    if importlib.util.find_spec("vllm") is None:
        raise BadInput(f"rollout.engine = vllm_colocate: vllm is not installed; {INSTALL_VLLM}")
    from rollouts.vllm_colocate import EngineSettings, VLLMEngine

    rollout, vllm = run.recipe.rollout, run.recipe.rollout.vllm
    most = run.recipe.data.max_prompt_length + rollout.max_completion_length
    longest = vllm.max_model_len or min(most, model.config.get_text_config().max_position_embeddings)
    precision = run.recipe.trainer.mixed_precision
    settings = EngineSettings(
        dtype="bfloat16" if precision == "bf16" else run.recipe.model.dtype,
        max_model_len=longest,
        max_num_seqs=rollout.batch_size,
        gpu_memory_utilization=vllm.gpu_memory_utilization,
        kv_cache_gib=vllm.kv_cache_gib,
        enforce_eager=vllm.enforce_eager,
    )
    if run.is_main:
        print("starting vLLM in this process", flush=True)
    folder = write_engine_folder(run, model, processor, settings.dtype)
    tokens = picture_tokens(processor), end_tokens(model, processor)
    return VLLMEngine(folder, processor.tokenizer, tokens[1], suppressed, weight_names(model), tokens[0], settings)


def write_engine_folder(run: Run, model, processor, dtype: str) -> Path:
    """`<output_dir>/engine`: what describes the model and prepares its input, as the recipe has changed it.

    Weights are not written: they may be random, resumed or merged, and all of them are pushed before the first use.
    """
    folder = run.folder / "engine"
    if run.is_main:
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            part.dtype = dtype  # a checkpoint names a precision for each part, which vLLM's parts would have
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)
    run.accelerator.wait_for_everyone()
    return folder


def picture_tokens(processor):
    """How pictures stand in prompts of this processor."""
    from rollouts.vllm_colocate import PictureTokens

    # InternVL's and SAIL-VL2's processors write these two around a picture; Qwen-VL's chat template has its own.
    names = ("start_image_token_id", "end_image_token_id")
    around = tuple(getattr(processor, name) for name in names) if hasattr(processor, names[0]) else None
    return PictureTokens(processor.image_token_id, around)


def end_tokens(model, processor) -> set[int]:
    """Tokens that end a completion, for every engine the same."""
    ids = model.generation_config.eos_token_id
    return {ids} if isinstance(ids, int) else set(ids or [processor.tokenizer.eos_token_id])
