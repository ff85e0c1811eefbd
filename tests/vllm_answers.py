"""Greedy answers of a real vLLM engine: `python tests/vllm_answers.py request.json answers.json`.

The engine binds threads and memory for good, so it must not share a process with the other tests.
"""

import json
import os
import sys
from pathlib import Path

ENGINE = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def answer(request: dict) -> list[dict]:
    """For each round of prompts, in order: what came, and how much of the prompt the prefix cache had."""
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = request.get("adapter")
    llm = LLM(
        request["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        block_size=32,  # shorter than the prompts, so that the prefix cache has whole blocks to find
        logprobs_mode="processed_logprobs",
        limit_mm_per_prompt={"image": 4},
        enable_lora=adapter is not None,
        max_lora_rank=8,
    )
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"], logprobs=0)
    answers = []
    for prompts in request["rounds"]:
        inputs = [
            {"prompt": prompt["text"]}
            | ({"multi_modal_data": {"image": [Image.open(p) for p in prompt["images"]]}} if prompt["images"] else {})
            for prompt in prompts
        ]
        lora = LoRARequest("adapter", 1, adapter) if adapter else None
        for output in llm.generate(inputs, sampling, use_tqdm=False, lora_request=lora):
            (best,) = output.outputs
            answers.append(
                {
                    "prompt_token_ids": output.prompt_token_ids,
                    "token_ids": list(best.token_ids),
                    "log_probs": [
                        entry[token].logprob for entry, token in zip(best.logprobs, best.token_ids, strict=True)
                    ],
                    "cached_tokens": output.num_cached_tokens,
                }
            )
    return answers


if __name__ == "__main__":
    os.environ |= ENGINE
    asked, told = map(Path, sys.argv[1:])
    told.write_text(json.dumps(answer(json.loads(asked.read_text()))))
