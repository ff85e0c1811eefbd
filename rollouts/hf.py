"""The reference engine: transformers' `generate` on the trainer's own model.

Each prompt is read once: its key-value cache is then repeated for the group. Tensor suffixes: _B prompts,
_R rows (prompts x group), _T tokens, _V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from rollouts import Prompt, Rollout, Sampling
from rollouts.inputs import PICTURE_INPUTS, position_ids, stack_model_inputs, stack_prompts


class SeededSampler(LogitsProcessor):
    """Draws every token with a random number that belongs to its row and position alone.

    So the completions of a prompt do not depend on which other prompts share its batch or its process.
    """

    def __init__(self, uniforms_RT: torch.Tensor, temperature: float, suppressed_token_ids: Sequence[int]):
        self.uniforms_RT = uniforms_RT
        self.temperature = temperature
        self.suppressed_token_ids = list(suppressed_token_ids)
        self.log_probs_TR: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits_RV = scores.float()
        logits_RV[:, self.suppressed_token_ids] = -torch.inf
        log_probs_RV = torch.log_softmax(logits_RV / (self.temperature or 1.0), dim=-1)
        tokens_R = log_probs_RV.argmax(-1) if self.temperature == 0 else self._draw(log_probs_RV)
        self.log_probs_TR.append(log_probs_RV.gather(1, tokens_R[:, None])[:, 0])
        # Greedy search then takes the token chosen here.
        return torch.full_like(scores, -torch.inf).scatter(1, tokens_R[:, None], 0.0)

    def _draw(self, log_probs_RV: torch.Tensor) -> torch.Tensor:
        uniform_R = self.uniforms_RT[:, len(self.log_probs_TR)]
        cumulative_RV = log_probs_RV.double().exp().cumsum(-1)
        threshold_R1 = (uniform_R * cumulative_RV[:, -1])[:, None]
        return torch.searchsorted(cumulative_RV, threshold_R1, right=True)[:, 0].clamp(max=log_probs_RV.shape[1] - 1)


class HFEngine:
    """Batched, KV-cached generation with a transformers model."""

    def __init__(self, model, tokenizer, suppressed_token_ids: Sequence[int] = (), batch_size: int = 256):
        self.model = model
        self.tokenizer = tokenizer
        self.suppressed_token_ids = suppressed_token_ids
        self.batch_size = batch_size
        self.weight_version = 0
        eos = model.generation_config.eos_token_id
        self.end_token_ids = {eos} if isinstance(eos, int) else set(eos or [tokenizer.eos_token_id])
        # The checkpoint's own defaults, such as a repetition penalty, would change what the trainer cannot see.
        ends = {"eos_token_id": sorted(self.end_token_ids), "pad_token_id": tokenizer.pad_token_id}
        self.generation_config = GenerationConfig(**ends, do_sample=False)

    def load_weights(self, parameters: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """The model is the trainer's own, so its weights are new already."""
        self.weight_version = version

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling) -> list[Rollout]:
        """`group_size` completions of every prompt, groups together, in the order of the prompts."""
        was_training, own_config = self.model.training, self.model.generation_config
        self.model.eval()
        self.model.generation_config = self.generation_config
        rollouts = []
        prompts_at_once = max(1, self.batch_size // group_size)
        for start in range(0, len(prompts), prompts_at_once):
            rollouts += self._generate_batch(prompts[start : start + prompts_at_once], group_size, sampling)
        self.model.generation_config = own_config
        self.model.train(was_training)
        return rollouts

    def _generate_batch(self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling) -> list[Rollout]:
        device = self.model.device
        input_ids_BT, mask_BT = (t.to(device) for t in stack_prompts(prompts, self.tokenizer.pad_token_id))
        inputs = {name: tensor.to(device) for name, tensor in stack_model_inputs(prompts).items()}
        positions_BT = position_ids(self.model, input_ids_BT, mask_BT, inputs)
        cache = self._read_prompts(input_ids_BT, mask_BT, positions_BT, inputs)
        cache.batch_repeat_interleave(group_size)
        uniforms_RT = torch.from_numpy(draw_uniforms(prompts, group_size, sampling)).to(device)
        sampler = SeededSampler(uniforms_RT, sampling.temperature, self.suppressed_token_ids)
        output_RT = self.model.generate(
            input_ids=input_ids_BT.repeat_interleave(group_size, dim=0),
            attention_mask=mask_BT.repeat_interleave(group_size, dim=0),
            position_ids=positions_BT.repeat_interleave(group_size, dim=-2),
            past_key_values=cache,
            max_new_tokens=sampling.max_completion_length,
            logits_processor=LogitsProcessorList([sampler]),
        )
        tokens = output_RT[:, input_ids_BT.shape[1] :].tolist()
        log_probs = torch.stack(sampler.log_probs_TR, dim=1).tolist()
        return [self._rollout(row, row_log_probs) for row, row_log_probs in zip(tokens, log_probs, strict=True)]

    def _read_prompts(self, input_ids_BT, mask_BT, positions_BT, inputs: Mapping[str, torch.Tensor]) -> DynamicCache:
        """The cache of all prompt tokens but the last, which `generate` itself reads to predict the first."""
        cache = DynamicCache(config=self.model.config)
        pictures = {name: tensor for name, tensor in inputs.items() if name in PICTURE_INPUTS}
        self.model(
            input_ids=input_ids_BT[:, :-1],
            attention_mask=mask_BT[:, :-1],
            position_ids=positions_BT[..., :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **pictures,
        )
        return cache

    def _rollout(self, row: list[int], log_probs: list[float]) -> Rollout:
        ends = [position for position, token in enumerate(row) if token in self.end_token_ids]
        length = ends[0] + 1 if ends else len(row)
        return Rollout(
            token_ids=row[:length],
            log_probs=log_probs[:length],
            text=self.tokenizer.decode(row[:length], skip_special_tokens=True),
            finish_reason="stop" if ends else "length",
            weight_version=self.weight_version,
        )


def draw_uniforms(prompts: Sequence[Prompt], group_size: int, sampling: Sampling) -> np.ndarray:
    """Random numbers [rows, tokens] in [0, 1), each row from its own (seed, prompt, member)."""
    return np.stack(
        [
            np.random.default_rng((sampling.seed, prompt.seed, member)).random(sampling.max_completion_length)
            for prompt in prompts
            for member in range(group_size)
        ]
    )
