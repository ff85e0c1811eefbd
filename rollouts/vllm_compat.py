"""All that the engine asks of vLLM, in one file: its interface differs from version to version.

`differences` compares what is asked for with the installed vLLM, without starting an engine. vLLM's model interface,
which a model of another package must follow, is in sail_rl/model/vllm_*.py.
"""

import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from rollouts.distribution import draw

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
# Without `nobind` vLLM ties the process, and with it the trainer, to one thread.
CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
LOG_PROBS = "processed_logprobs"  # of the distribution that tokens are drawn from
# What this file calls: class -> method -> arguments.
ASKED: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm.LLM": {
        "collective_rpc": ("method", "kwargs"),
        "apply_model": ("func",),
        "reset_prefix_cache": (),
        "reset_mm_cache": (),
        "enqueue": ("use_tqdm",),
        "sleep": ("level",),
        "wake_up": (),
    },
    "vllm.v1.engine.llm_engine.LLMEngine": {
        "reset_encoder_cache": (),
        "has_unfinished_requests": (),
        "step": (),
        "abort_request": ("internal",),
    },
    "vllm.v1.worker.gpu_worker.Worker": {"reload_weights": ()},
    "vllm.v1.sample.ops.topk_topp_sampler.TopKTopPSampler": {"forward_cpu": ("logits", "generators", "k", "p")},
}
SETTINGS: tuple[str, ...] = ("load_format", "max_model_len", "max_num_seqs", "gpu_memory_utilization", "enforce_eager")
SETTINGS += ("enable_sleep_mode", "logprobs_mode", "skip_mm_profiling", "distributed_executor_backend")
SETTINGS += ("mm_device_do_normalize", "seed", "dtype")
SAMPLING: tuple[str, ...] = (
    "n",
    "temperature",
    "max_tokens",
    "seed",
    "logit_bias",
    "stop_token_ids",
    "ignore_eos",
    "logprobs",
    "stop",
)
SAMPLING += ("detokenize", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class EngineSettings:
    """What vLLM is started with."""

    dtype: str
    max_model_len: int
    """Most tokens of a prompt and its completion."""
    max_num_seqs: int = 256
    """Most completions that are written at once."""
    gpu_memory_utilization: float = 0.4
    """Share of the GPU that weights and cache of the engine may take together."""
    kv_cache_gib: int = 1
    """Cache on a CPU."""
    enforce_eager: bool = False
    """No CUDA graphs: a faster start and slower writing."""


def start(folder: Path, settings: EngineSettings) -> Any:
    """A vLLM engine in this process. Its environment must be set before vLLM is imported."""
    on_gpu = torch.cuda.is_available()
    for name, value in (ENVIRONMENT if on_gpu else ENVIRONMENT | CPU_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.kv_cache_gib))
    set_threads, random_state = torch.set_num_threads, torch.get_rng_state()
    from vllm import LLM

    if not on_gpu:
        draw_by_one_number()
    llm = LLM(
        str(folder),
        dtype=settings.dtype,
        load_format="dummy",
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        enforce_eager=settings.enforce_eager or not on_gpu,
        enable_sleep_mode=on_gpu,
        logprobs_mode=LOG_PROBS,
        skip_mm_profiling=not on_gpu,
        # In one of several processes that train, the engine must join their group, which it finds already made.
        distributed_executor_backend="external_launcher" if several_processes() else None,
        mm_device_do_normalize=False,  # pictures reach the model as the processor made them, and can be compared
        seed=0,
    )
    # vLLM seeds the whole process, and on a CPU takes away the function that sets the number of threads.
    torch.set_num_threads = set_threads
    torch.set_rng_state(random_state)
    return llm


def draw_by_one_number() -> None:
    """Let vLLM on a CPU draw a token by one random number of its completion's own generator.

    Where completions have seeds it makes exponential noise for the whole vocabulary, one completion after another: a
    fifth of the time of writing.
    """
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

    own = TopKTopPSampler.forward_cpu

    def forward_cpu(self: Any, logits: Any, generators: dict[int, torch.Generator], k: Any, p: Any) -> tuple[Any, Any]:
        if len(generators) != len(logits) or self.logprobs_mode != LOG_PROBS:
            return own(self, logits, generators, k, p)
        log_probs_RV = apply_top_k_top_p(logits, k, p).log_softmax(dim=-1, dtype=torch.float32)
        uniforms_R = torch.cat([torch.rand(1, generator=generators[row]) for row in range(len(logits))])
        return draw(log_probs_RV, uniforms_R, temperature=1.0), log_probs_RV

    if own.__module__ != __name__:  # it has not been done in this process
        TopKTopPSampler.forward_cpu = forward_cpu


def several_processes() -> bool:
    """Whether this is one of several processes that train together."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def sampling_params(**values: Any) -> Any:
    """How one prompt's completions are drawn."""
    from vllm import SamplingParams

    return SamplingParams(**values)


def refused() -> type[Exception]:
    """What vLLM raises at a request that it cannot take, such as one that is too long."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError


def write(llm: Any, requests: list[Any], params: list[Any]) -> Iterator[tuple[int, Any]]:
    """Outputs as they are finished, with the places of their requests.

    What an error leaves of the requests is taken out: every later call would go on with it.
    """
    engine = llm.llm_engine
    try:
        first = llm.request_counter.counter  # requests are numbered
        llm.enqueue(requests, params, use_tqdm=False)
        while engine.has_unfinished_requests():
            yield from ((int(output.request_id) - first, output) for output in engine.step() if output.finished)
    except BaseException:
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        raise


def reload_weights(llm: Any, stream: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Put named tensors in the place of the weights."""
    # A model's own load_weights fails after the start on a CPU: the linear layers have been packed by then.
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
    if not torch.cuda.is_available():
        llm.apply_model(pack_experts)


def reset_caches(llm: Any) -> None:
    """Forget what has been computed: prefixes, and the features of pictures in two places."""
    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()


@contextmanager
def pixels_noted(llm: Any) -> Iterator[list[torch.Tensor]]:
    """Within it, the pixels that reach the model."""
    read: list[torch.Tensor] = []

    def watch(model: Any) -> None:
        own = model.embed_multimodal

        def noting(**inputs: Any) -> Any:
            read.append(inputs["pixel_values"])
            return own(**inputs)

        model.embed_multimodal = noting

    llm.apply_model(watch)
    try:
        yield read
    finally:
        llm.apply_model(lambda model: delattr(model, "embed_multimodal"))


def sleep(llm: Any) -> None:
    """Give the GPU's memory back, the weights' too."""
    llm.sleep(level=2)


def wake(llm: Any) -> None:
    """Take it again."""
    torch.cuda.empty_cache()
    llm.wake_up()


def close(llm: Any, in_group: bool) -> None:
    """End the engine; its memory is free."""
    core: Any = llm.llm_engine.engine_core
    if in_group:  # all else that vLLM would do, now or when it is collected, ends the trainer's group as well
        core._finalizer.detach()
        core.engine_core.model_executor.shutdown()
    else:
        core.shutdown()


def pack_experts(model: Any) -> None:
    """Lay out a mixture's experts as their CPU kernel reads them, which vLLM 0.31 does after its start alone."""
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(layer)


def differences() -> list[str]:
    """What the installed vLLM has not, or does not take, of all that is asked for; each with its name."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    found = [told for name, methods in ASKED.items() for told in lacking(name, methods)]
    known = {field.name for field in fields(EngineArgs)}
    found += [f"vllm.LLM takes no {name}" for name in SETTINGS if name not in known]
    taken = inspect.signature(SamplingParams).parameters
    found += [f"vllm.SamplingParams takes no {name}" for name in SAMPLING if name not in taken]
    if "weights_iterator" not in inspect.signature(GPUModelRunner.reload_weights).parameters:
        found.append("reload_weights takes no weights_iterator")
    refused()
    return found


def lacking(name: str, methods: dict[str, tuple[str, ...]]) -> list[str]:
    """Of one class."""
    module, _, kind = name.rpartition(".")
    owner = getattr(__import__(module, fromlist=[kind]), kind)
    found = []
    for method, arguments in methods.items():
        own = getattr(owner, method, None)
        if own is None:
            found.append(f"{name} has no {method}")
            continue
        taken = inspect.signature(own).parameters
        found += [f"{name}.{method} takes no {argument}" for argument in arguments if argument not in taken]
    return found
