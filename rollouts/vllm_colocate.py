"""vLLM inside the trainer's process: the weights are pushed by name, and nothing else is shared with the trainer.

The engine starts from a folder with configuration, tokenizer and processor, and with weights that mean nothing: all of
them come with the first push. Prompts are sent as token ids, so that nothing is tokenized twice.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rollouts import Finished, Prompt, Rollout, Sampling, unheard, vllm_compat
from rollouts.picture_tokens import PictureTokens, collapsed
from rollouts.vllm_compat import EngineSettings

SEEDS = 2**62  # members of a group count on from their prompt's seed, within what torch takes


@dataclass(frozen=True)
class Received:
    """A prompt as it reached the engine's model."""

    token_ids: list[int]
    pixels: str | None
    """Digest of the pictures' pixels; None without pictures."""


class VLLMEngine:
    """An engine that refuses to write until it has been given every weight."""

    def __init__(
        self,
        folder: Path,
        tokenizer,
        end_token_ids: Collection[int],
        suppressed_token_ids: Sequence[int],
        weight_names: Collection[str],
        picture: PictureTokens,
        settings: EngineSettings,
    ):
        self.tokenizer = tokenizer
        self.end_token_ids = sorted(end_token_ids)
        # Not a penalty: what is suppressed has no probability, as in the trainer's own log-probabilities.
        self.bias = dict.fromkeys(suppressed_token_ids, -np.inf)
        self.weight_names = frozenset(weight_names)
        self.picture = picture
        self.weight_version: int | None = None
        """None while some weight is not the trainer's."""
        self.in_group = vllm_compat.several_processes()
        self.llm = vllm_compat.start(folder, settings)
        self.dtype = getattr(torch, settings.dtype)
        self.on_gpu = torch.cuda.is_available()
        self.asleep = False

    def load_weights(self, parameters: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take every weight, one after another, under the names that files have."""
        self.weight_version = None
        missing, mistakes = set(self.weight_names), list[Exception]()
        stream = until_mistake(self._expected(parameters, missing), mistakes)
        vllm_compat.reload_weights(self.llm, stream)
        vllm_compat.reset_caches(self.llm)
        if mistakes:
            raise mistakes[0]
        if missing:
            raise ValueError(f"weights of version {version}: {some(missing)} did not come")
        self.weight_version = version

    def _expected(
        self, parameters: Iterable[tuple[str, torch.Tensor]], missing: set[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The stream, its names crossed out of those that are missing."""
        for name, tensor in parameters:
            if name not in self.weight_names:
                raise ValueError(f"the engine's model has no weight {name}")
            missing.discard(name)
            yield name, tensor.detach()

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling, finished: Finished = unheard
    ) -> list[Rollout]:
        """`group_size` completions of every prompt, groups together, in the order of the prompts."""
        if self.weight_version is None:
            raise RuntimeError("the engine lacks weights: a push did not end, or none has come since it slept")
        # What is remembered was rounded in another batch: a resumed run, whose gate asks others, would part from this.
        vllm_compat.reset_caches(self.llm)
        count = group_size if sampling.temperature else 1  # vLLM writes one likeliest completion only
        requests = [request(prompt, self.picture) for prompt in prompts]
        groups: dict[int, list[Rollout]] = {}
        for place, output in vllm_compat.write(self.llm, requests, [self._params(p, count, sampling) for p in prompts]):
            groups[place] = [self._rollout(written) for written in output.outputs] * (group_size // count)
            finished(place, groups[place])
        return [rollout for place in range(len(prompts)) for rollout in groups[place]]

    def _params(self, prompt: Prompt, count: int, sampling: Sampling) -> Any:
        return vllm_compat.sampling_params(
            n=count,
            temperature=sampling.temperature,
            max_tokens=sampling.max_completion_length,
            seed=prompt_seed(sampling.seed, prompt.seed),
            **asdict(sampling.filters),
            logit_bias=self.bias,
            # The end tokens are those of the trainer's model, whatever the folder's files say beside.
            stop_token_ids=self.end_token_ids,
            ignore_eos=True,
            logprobs=0,
            stop=list(sampling.stop),
            detokenize=bool(sampling.stop),
        )

    def _rollout(self, written: Any) -> Rollout:
        assert self.weight_version is not None
        token_ids = list(written.token_ids)
        log_probs = [entry[token].logprob for entry, token in zip(written.logprobs, token_ids, strict=True)]
        return Rollout(
            token_ids=token_ids,
            log_probs=log_probs,
            text=self.tokenizer.decode(token_ids, skip_special_tokens=True),
            finish_reason=written.finish_reason,
            weight_version=self.weight_version,
        )

    def receive(self, prompt: Prompt) -> Received:
        """Send a prompt as `generate` does, and tell what reached the model."""
        vllm_compat.reset_caches(self.llm)  # a picture that is known would not be read again
        params = self._params(prompt, 1, Sampling(max_completion_length=1, temperature=0))
        with vllm_compat.pixels_noted(self.llm) as read:
            ((_, output),) = vllm_compat.write(self.llm, [request(prompt, self.picture)], [params])
        return Received(list(output.prompt_token_ids), self.digest(read))

    def digest(self, parts: Sequence[torch.Tensor]) -> str | None:
        """Of pixels in the engine's precision; None of no pictures."""
        return digest_of_pixels(parts, self.dtype)

    def sleep(self) -> None:
        """Give the GPU's memory back until `wake`; weights must be pushed after that."""
        if self.on_gpu and not self.asleep:
            vllm_compat.sleep(self.llm)
            self.asleep, self.weight_version = True, None

    def wake(self) -> None:
        """Take the GPU's memory again."""
        if self.asleep:
            vllm_compat.wake(self.llm)
            self.asleep = False

    def close(self) -> None:
        """End the engine; its memory is free."""
        vllm_compat.close(self.llm, self.in_group)
        del self.llm


def request(prompt: Prompt, picture: PictureTokens) -> Any:
    """What vLLM is sent: it puts each picture's tokens in place of a single one, so they are taken out before."""
    token_ids, found = collapsed(prompt.token_ids, picture)
    if found != len(prompt.images):
        raise ValueError(f"prompt {prompt.id}: {len(prompt.images)} pictures for {found} runs of picture tokens")
    images = {"multi_modal_data": {"image": list(prompt.images)}} if prompt.images else {}
    return {"prompt_token_ids": token_ids} | images


def prompt_seed(seed: int, position: int) -> int:
    """The seed of the first member of a prompt's group: it depends on nothing else, such as what shares a batch."""
    high, low = np.random.SeedSequence((seed, position)).generate_state(2)
    return (int(high) << 32 | int(low)) % SEEDS


def digest_of_pixels(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> str | None:
    """A few characters that differ where pixels of this precision do; None of no pictures."""
    if not parts:
        return None
    pixels = torch.cat([part.flatten(0, -2) for part in parts]).to("cpu", dtype).contiguous()
    return hashlib.sha256(pixels.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def until_mistake(stream: Iterable[Any], mistakes: list[Exception]) -> Iterator[Any]:
    """The stream, ended early by an error, which is kept: vLLM must put its layers together again before it is raised.

    Else the next push would find half of this one's tensors waiting.
    """
    try:
        yield from stream
    except Exception as mistake:
        mistakes.append(mistake)


def some(names: Collection[str]) -> str:
    """A few of the names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more
