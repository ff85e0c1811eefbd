"""vLLM on both sides of a comparison: ours as recipes have it, and TRL 1.16's in its colocate mode, mended.

On this kind of machine two faults of TRL's would make it do other work, or none, so both are mended in its favour: its
push of weights fails once vLLM has packed its linear layers for the CPU, and it sends pictures' tokens in full, which
vLLM then expands a second time. Both sides read the same tokens and push the same tensors in one call.
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from benchmarks.full_step import Task, never_written, new_run, trl_trainer
from rollouts.picture_tokens import collapsed
from rollouts.vllm_colocate import VLLMEngine
from rollouts.vllm_compat import CPU_ENVIRONMENT, ENVIRONMENT
from sail_rl.checkpoint import full_parameters
from sail_rl.engines import make_vllm_engine, picture_tokens

MAX_MODEL_LEN = 1024


def prepare_vllm() -> None:
    """One process, all of its threads, no more messages than errors; before vLLM is imported."""
    for name, value in (ENVIRONMENT | CPU_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"}).items():
        os.environ.setdefault(name, value)


def our_engine(task: Task, model, dtype: str) -> VLLMEngine:
    """The recipe's engine in this precision, with the model's weights."""
    changes = {"dtype": dtype}
    recipe = task.recipe.model_copy(update={"model": task.recipe.model.model_copy(update=changes)})
    engine: Any = make_vllm_engine(new_run(recipe), model, task.processor, never_written(task))
    engine.load_weights(full_parameters(model), version=0)
    return engine


def trl_with_vllm(task: Task, **settings: Any):
    """GRPOTrainer in colocate mode. Its engine starts from a folder, in bfloat16 as the folder says."""
    folder = Path(task.recipe.output_dir) / "trl_start"
    start = copy.deepcopy(task.model).to(torch.bfloat16)
    for part in (start.config, start.config.text_config, start.config.vision_config):
        part.dtype = torch.bfloat16  # a loaded model's parts have that of their file
    start.save_pretrained(folder)
    task.processor.save_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(task.model.state_dict())
    vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
    vllm |= {"vllm_max_model_length": MAX_MODEL_LEN}
    vllm |= {"generation_kwargs": {"logit_bias": dict.fromkeys(never_written(task), -100.0)}}
    trainer = trl_trainer(task, model, [{"prompt": "unused"}], vllm | settings)
    mend(trainer.vllm_generation, picture_tokens(task.processor))
    return trainer


def mend(generation, picture) -> None:
    """TRL's push by vLLM's reload of named tensors, and its prompts with one token for each picture."""
    llm, own_generate = generation.llm, generation.llm.generate

    def sync_weights() -> None:
        stream = ((name, tensor.detach()) for name, tensor in generation._iter_named_params())
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
        llm.reset_prefix_cache()
        llm.reset_mm_cache()
        llm.llm_engine.reset_encoder_cache()  # of which the reload has cleared a part, and vLLM then misses it

    def generate(prompts, **keys):
        short = [prompt | {"prompt_token_ids": collapsed(prompt["prompt_token_ids"], picture)[0]} for prompt in prompts]
        outputs = own_generate(short, **keys)
        for prompt, output in zip(prompts, outputs, strict=True):
            assert list(output.prompt_token_ids) == list(prompt["prompt_token_ids"])
        return outputs

    generation.sync_weights, llm.generate = sync_weights, generate
