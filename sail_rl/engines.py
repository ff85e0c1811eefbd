"""The engine that `rollout.engine` names, made for the run's model."""

import copy
import importlib.util
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import distributed

from rollouts import RolloutEngine
from rollouts.hf import HFEngine
from sail_rl.checkpoint import weight_names
from sail_rl.command_line import BadInput
from sail_rl.data.stream import Shard
from sail_rl.launch import Run
from sail_rl.sharding import Whole

LEAST_WAIT = 1800.0  # seconds, for a process that is busy with something else
INSTALL_VLLM = "install it with `make install`, or with uv: `--extra vllm` for a GPU, `--group cpu` for none"


def make_engine(run: Run, whole: Whole, processor, suppressed: list[int]) -> RolloutEngine:
    """Who writes this run's completions; no weights are loaded yet."""
    rollout = run.recipe.rollout
    if rollout.engine == "hf":
        return HFEngine(whole.model, processor.tokenizer, suppressed, rollout.batch_size, whole.weights)
    if rollout.engine == "vllm_colocate" or not rollout.server.urls:
        check_vllm(f"rollout.engine = {rollout.engine}")
    if rollout.engine == "vllm_server":
        return make_server_engine(run, whole.model, processor, suppressed)
    return make_vllm_engine(run, whole.model, processor, suppressed)


def check_vllm(wanted: str) -> None:
    """What needs vLLM on this machine is refused without it."""
    if importlib.util.find_spec("vllm") is None:
        raise BadInput(f"{wanted}: vllm is not installed; {INSTALL_VLLM}")


def make_vllm_engine(run: Run, model, processor, suppressed: list[int]) -> RolloutEngine:
    """vLLM in this process, started from a folder of the run's own."""
    from rollouts.vllm_colocate import VLLMEngine

    if run.is_main:
        print("starting vLLM in this process", flush=True)
    settings = engine_settings(run, model)
    folder = write_engine_folder(run, model, processor, settings.dtype)
    tokens = picture_tokens(processor), end_tokens(model, processor)
    return VLLMEngine(folder, processor.tokenizer, tokens[1], suppressed, weight_names(model), tokens[0], settings)


def make_server_engine(run: Run, model, processor, suppressed: list[int]) -> RolloutEngine:
    """vLLM in one or several servers; one is started if the recipe names none."""
    from rollouts.vllm_server import Crew, Limits, ServerEngine
    from rollouts.wire import Setup, files_of

    server, shard = run.recipe.rollout.server, run.shard
    if not server.urls and int(os.environ.get("LOCAL_WORLD_SIZE", shard.world_size)) < shard.world_size:
        raise BadInput(
            "rollout.server.urls: the trainer has processes on several machines; start servers and name them"
        )
    folder = run.folder / "server"
    if run.is_main:
        started = ", ".join(server.urls) or f"a process of this run (log: {folder / 'server_0.log'})"
        print(f"starting vLLM in {started}", flush=True)
    settings = engine_settings(run, model)
    setup = Setup(
        files=files_of(write_engine_folder(run, model, processor, settings.dtype)),
        end_token_ids=sorted(end_tokens(model, processor)),
        suppressed_token_ids=list(suppressed),
        weight_names=sorted(weight_names(model)),
        picture=picture_tokens(processor),
        settings=settings,
    )
    limits = Limits(
        server.start_limit, server.push_limit, server.request_limit, server.restarts, channels=server.weights == "nccl"
    )
    wait = max(LEAST_WAIT, limits.start + limits.push + limits.request + 2**limits.restarts)
    crew = Crew(shard.rank, shard.world_size, patient_gather(shard, wait))
    vocabulary = model.config.get_text_config().vocab_size
    return ServerEngine(setup, vocabulary, server.urls, folder, limits, crew, give_up=BadInput)


def patient_gather(shard: Shard, wait: float) -> Callable[[list[Any]], list[Any]]:
    """`shard.gather` that waits as long as a server may take: others stand here while the first process starts it anew.

    The group is gloo's on any device: NCCL would end the process without a word, and sooner.
    """
    if shard.world_size == 1:
        return shard.gather
    group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=wait))

    def gather(mine: list[Any]) -> list[Any]:
        everyone: list[Any] = [None] * shard.world_size
        try:
            distributed.all_gather_object(everyone, mine, group=group)
        except RuntimeError as lost:
            # Not the user's mistake, after which a checkpoint is saved by all processes together.
            raise RuntimeError(
                f"process {shard.rank} has lost another one: it has ended, or did nothing for {wait:g} s (half an "
                "hour, or rollout.server's start_limit, push_limit and request_limit together); the same command goes "
                "on from the newest checkpoint"
            ) from lost
        return [one for part in everyone for one in part]

    return gather


def engine_settings(run: Run, model):
    """What the recipe says about vLLM."""
    from rollouts.vllm_compat import EngineSettings

    rollout, vllm = run.recipe.rollout, run.recipe.rollout.vllm
    most = run.recipe.data.max_prompt_length + rollout.max_completion_length
    longest = vllm.max_model_len or min(most, model.config.get_text_config().max_position_embeddings)
    precision = run.recipe.trainer.mixed_precision
    return EngineSettings(
        dtype="bfloat16" if precision == "bf16" else run.recipe.model.dtype,
        max_model_len=longest,
        max_num_seqs=rollout.batch_size,
        gpu_memory_utilization=vllm.gpu_memory_utilization,
        kv_cache_gib=vllm.kv_cache_gib,
        enforce_eager=vllm.enforce_eager,
    )


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
    from rollouts.picture_tokens import PictureTokens

    # InternVL's and SAIL-VL2's processors write these two around a picture; Qwen-VL's chat template has its own.
    names = ("start_image_token_id", "end_image_token_id")
    around = tuple(getattr(processor, name) for name in names) if hasattr(processor, names[0]) else None
    return PictureTokens(processor.image_token_id, around)


def end_tokens(model, processor) -> set[int]:
    """Tokens that end a completion, for every engine the same."""
    ids = model.generation_config.eos_token_id
    return {ids} if isinstance(ids, int) else set(ids or [processor.tokenizer.eos_token_id])
