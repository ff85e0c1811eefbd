"""The reference engine: tokens written one after another by the trainer's own transformers model.

Each prompt is read once: its key-value cache is then repeated for the group. Rows that have ended leave the batch.
Tensor suffixes: _B prompts, _R rows that are still written (at first prompts x group), _T tokens, _P of a prompt,
_V vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from transformers import DynamicCache

from rollouts import Filters, Finished, Prompt, Rollout, Sampling, unheard
from rollouts.distribution import draw, drawn_log_probs, first_places
from rollouts.inputs import PICTURE_INPUTS, position_ids, stack_model_inputs, stack_prompts
from rollouts.roomy_cache import give_room

LEAVING = 1 / 8  # of the rows must have ended before the others' cache is copied without them


@dataclass
class Written:
    """One completion while it is written."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ended: bool = False
    """Its last token is an end token, or completes a stop text."""

    def add(self, token: int, log_prob: float, ends: Callable[[list[int]], bool]) -> None:
        """One more token, unless the completion has ended and its row only waits to leave the batch."""
        if not self.ended:
            self.token_ids.append(token)
            self.log_probs.append(log_prob)
            self.ended = ends(self.token_ids)


class HFEngine:
    """Batched, KV-cached generation with a transformers model.

    Of the checkpoint's own generation settings only the end tokens are taken over; all else is the recipe's.
    """

    def __init__(
        self, model, tokenizer, suppressed_token_ids: Sequence[int] = (), batch_size: int = 256, weights=nullcontext
    ):
        self.model = model
        self.weights = weights  # what the model has its weights within, if it has them only now and then
        self.tokenizer = tokenizer
        self.suppressed_token_ids = list(suppressed_token_ids)
        self.batch_size = batch_size
        self.weight_version = 0
        eos = model.generation_config.eos_token_id
        self.end_token_ids = {eos} if isinstance(eos, int) else set(eos or [tokenizer.eos_token_id])

    def load_weights(self, parameters: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """The model is the trainer's own, so its weights are new already."""
        self.weight_version = version

    def sleep(self) -> None:
        """Nothing: its memory is the trainer's."""

    def wake(self) -> None:
        """Nothing, likewise."""

    def close(self) -> None:
        """Nothing was started."""

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling, finished: Finished = unheard
    ) -> list[Rollout]:
        """`group_size` completions of every prompt, groups together, in the order of the prompts."""
        was_training = self.model.training
        self.model.eval()
        rollouts: list[Rollout] = []
        try:
            at_once = max(1, self.batch_size // group_size)
            with self.weights():
                for start in range(0, len(prompts), at_once):
                    rollouts += self._generate_batch(prompts[start : start + at_once], group_size, sampling)
                    for place in range(start, len(rollouts) // group_size):
                        finished(place, rollouts[place * group_size : (place + 1) * group_size])
        finally:
            self.model.train(was_training)
        return rollouts

    @torch.inference_mode()  # weights that `self.weights` makes whole are trained on, so it stays outside
    def _generate_batch(self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling) -> list[Rollout]:
        device = self.model.device
        input_ids_BT, mask_BT = (t.to(device) for t in stack_prompts(prompts, self.tokenizer.pad_token_id))
        inputs = {name: tensor.to(device) for name, tensor in stack_model_inputs(prompts).items()}
        positions_BT = position_ids(self.model, input_ids_BT, mask_BT, inputs)
        cache = self._read_prompts(input_ids_BT, mask_BT, positions_BT, inputs)
        give_room(cache, group_size, sampling.max_completion_length)
        uniforms_RT = torch.from_numpy(draw_uniforms(prompts, group_size, sampling)).to(device)
        written = self._write(
            cache,
            input_ids_BT.repeat_interleave(group_size, dim=0),
            mask_BT.repeat_interleave(group_size, dim=0),
            positions_BT[..., -1:].repeat_interleave(group_size, dim=-2),
            uniforms_RT,
            sampling,
        )
        return [self._rollout(completion) for completion in written]

    def _read_prompts(self, input_ids_BT, mask_BT, positions_BT, inputs: Mapping[str, torch.Tensor]) -> DynamicCache:
        """The cache of all prompt tokens but the last, which `_write` reads to predict the first."""
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

    def _write(
        self, cache: DynamicCache, prompt_ids_RP, mask_RT, position_R1, uniforms_RT, sampling: Sampling
    ) -> list[Written]:
        """A token a time for every row, until all have ended or are as long as there are random numbers."""
        ends, last_R = partial(self._ends, stop=sampling.stop), prompt_ids_RP[:, -1]
        seen_RV = self._seen(prompt_ids_RP, mask_RT, sampling.filters)
        written = [Written() for _ in range(len(last_R))]
        rows = list(range(len(written)))  # those in the batch
        for place in range(uniforms_RT.shape[1]):
            logits_RV = self.model(
                input_ids=last_R[:, None],
                attention_mask=mask_RT,
                position_ids=position_R1,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            log_probs_RV = drawn_log_probs(
                logits_RV, sampling.temperature, self.suppressed_token_ids, sampling.filters, seen_RV
            )
            last_R = draw(log_probs_RV, uniforms_RT[:, place], sampling.temperature)
            log_probs_R = log_probs_RV.gather(1, last_R[:, None])[:, 0]
            for row, token, log_prob in zip(rows, last_R.tolist(), log_probs_R.tolist(), strict=True):
                written[row].add(token, log_prob, ends)
            if seen_RV is not None:
                seen_RV.scatter_(1, last_R[:, None], True)
            staying = [index for index, row in enumerate(rows) if not written[row].ended]
            if not staying:
                break
            mask_RT, position_R1 = torch.nn.functional.pad(mask_RT, (0, 1), value=1), position_R1 + 1
            if len(rows) - len(staying) >= LEAVING * len(rows):
                index_R = torch.tensor(staying, device=last_R.device)
                cache.batch_select_indices(index_R)
                last_R, mask_RT, uniforms_RT = last_R[index_R], mask_RT[index_R], uniforms_RT[index_R]
                position_R1, rows = position_R1.index_select(-2, index_R), [rows[index] for index in staying]
                seen_RV = None if seen_RV is None else seen_RV[index_R]
        return written

    def _seen(self, prompt_ids_RP, mask_RP, filters: Filters) -> torch.Tensor | None:
        """[R, V] the tokens of the prompts, for a repetition penalty; None without one."""
        if filters.repetition_penalty == 1:
            return None
        vocabulary = self.model.get_output_embeddings().out_features
        return first_places(prompt_ids_RP.where(mask_RP > 0, -1), prompt_ids_RP[:, :0], vocabulary) < 0

    def _ends(self, token_ids: list[int], stop: Sequence[str]) -> bool:
        """Whether the last token ends the completion."""
        if token_ids[-1] in self.end_token_ids:
            return True
        # A text that has just been completed stands in as many tokens as it has bytes, at most.
        tail = token_ids[-max((len(text.encode()) for text in stop), default=0) :]
        return bool(stop) and any(text in self.tokenizer.decode(tail, skip_special_tokens=True) for text in stop)

    def _rollout(self, completion: Written) -> Rollout:
        return Rollout(
            token_ids=completion.token_ids,
            log_probs=completion.log_probs,
            text=self.tokenizer.decode(completion.token_ids, skip_special_tokens=True),
            finish_reason="stop" if completion.ended else "length",
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
