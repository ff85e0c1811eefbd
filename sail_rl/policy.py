"""The model as the losses see it: log-probabilities and entropies of the completions of a batch.

Hidden states are computed for the whole row, logits only where a completion's token is predicted, and a few at a time.
Suffixes: _R rows, _T tokens of a row, _B completions, _C tokens of a completion, _N predicted tokens, _D width, _V
vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding, linear
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from rollouts import Filters
from rollouts.distribution import first_places
from rollouts.inputs import PICTURE_INPUTS, TOKEN_INPUTS, position_ids
from sail_rl.batch import TrainingBatch
from sail_rl.losses import PolicyTerms, token_log_probs
from sail_rl.model.prefix_sharing import (
    NO_MASK,
    Layout,
    ReadPrompt,
    layout_of,
    obstacle,
    read_prompt,
    segment_positions,
    use_segments,
)
from sail_rl.model.segment_kernels import IMPLEMENTATIONS, Attention

# In float32 128 and 512 MiB; more are computed in parts, and again for the gradient. Each part adds a whole gradient of
# the head, which a GPU is fast enough to notice.
LOGITS_AT_ONCE = {"cpu": 2**25, "cuda": 2**27}


class Policy(nn.Module):
    """What is trained, in the form that distributed wrappers need: one call is one forward pass."""

    def __init__(self, model, attention: Attention = "sdpa", train_entropy: bool = False):
        super().__init__()
        self.model = model
        self.train_entropy = train_entropy
        if obstacle(model) is None:
            use_segments(model, IMPLEMENTATIONS[attention])

    def forward(
        self,
        batch: TrainingBatch,
        temperature: float = 1.0,
        suppressed: Sequence[int] = (),
        prompt: ReadPrompt | None = None,
        filters: Filters | None = None,
    ) -> PolicyTerms:
        return token_terms(self.model, batch, temperature, suppressed, prompt, filters, self.train_entropy)


def token_terms(
    model,
    batch: TrainingBatch,
    temperature: float = 1.0,
    suppressed: Sequence[int] = (),
    prompt: ReadPrompt | None = None,
    filters: Filters | None = None,
    train_entropy: bool = False,
) -> PolicyTerms:
    """[B, C] terms of the completions' tokens as the sampler saw them; 0 beyond their ends."""
    if batch.prompt is not None and prompt is None:
        prompt = compute_prompt(model, batch.prompt)
    # A group reads its prompt's last place many times. The gradient of an index would add these up in whatever order
    # the threads come to them, on a busy machine not the same twice; that of `embedding` adds them one after another.
    hidden_ND = embedding(batch.predictors_N, hidden_states(model, batch, prompt).flatten(0, 1))
    tokens_N, head = batch.completion_ids_BC.flatten()[batch.places_N], model.get_output_embeddings()
    zeros_BC = torch.zeros(batch.mask_BC.shape, device=hidden_ND.device)
    places = torch.unravel_index(batch.places_N, zeros_BC.shape)

    def of_part(part_ND: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> PolicyTerms:
        # Not `head(...)`: ZeRO-3 would gather it for each part, of which processes have different numbers.
        logits_NV = linear(part_ND, head.weight, head.bias)
        seen_NV = None if first_BV is None else first_BV[rows] < columns[:, None]
        return token_log_probs(logits_NV, tokens, temperature, suppressed, filters, seen_NV, train_entropy)

    first_BV = places_seen(batch, head.out_features, filters)
    at_once = max(1, LOGITS_AT_ONCE[hidden_ND.device.type] // head.out_features)
    terms = in_parts(of_part, at_once, hidden_ND, tokens_N, *places)
    placed = (zeros_BC.index_put(places, values_N.float()) for values_N in terms)
    log_probs_BC, entropy_BC, likeliest_BC = placed
    return PolicyTerms(log_probs_BC, entropy_BC, likeliest_BC)


def compute_prompt(model, batch: TrainingBatch) -> ReadPrompt:
    """The forward pass over a row that is a prompt alone."""
    layout = layout_of(batch.segments, record=True)
    inputs = row_inputs(model, batch, layout)
    hidden_1TD = model.base_model(use_cache=False, **inputs).last_hidden_state
    highest_A1 = inputs["position_ids"].reshape(-1, hidden_1TD.shape[1]).amax(1, keepdim=True)
    return read_prompt(hidden_1TD[0, -1:], highest_A1, layout)


def hidden_states(model, batch: TrainingBatch, prompt: ReadPrompt | None = None) -> torch.Tensor:
    """[R, T, D] of the last layer; after a prompt that was computed before, [1, 1 + T, D]."""
    if not batch.segments:
        inputs = {"input_ids": batch.input_ids_RT, "attention_mask": batch.attention_mask_RT, **batch.model_inputs}
    else:
        inputs = row_inputs(model, batch, layout_of(batch.segments, prompt))
    hidden_RTD = model.base_model(use_cache=False, **inputs).last_hidden_state
    return hidden_RTD if prompt is None else torch.cat([prompt.last_1D[None].to(hidden_RTD.dtype), hidden_RTD], dim=1)


def row_inputs(model, batch: TrainingBatch, layout: Layout) -> dict[str, Any]:
    """What the model is given for a row of segments."""
    pictures = {name: tensor for name, tensor in batch.model_inputs.items() if name in PICTURE_INPUTS}
    mask, positions = NO_MASK.to(batch.input_ids_RT.device), row_positions(model, batch, layout)
    tokens = {"input_ids": batch.input_ids_RT, "attention_mask": mask, "position_ids": positions}
    return tokens | {"layout": layout} | pictures


def row_positions(model, batch: TrainingBatch, layout: Layout) -> torch.Tensor:
    """Positions of a row of segments: [1, T], or [3, 1, T] where the model counts time, height and width apart."""
    if layout.prompt is not None:
        row_AT = segment_positions(layout.prompt.positions_A1[:, :0], layout)
        return row_AT if len(row_AT) == 1 else row_AT[:, None]
    of_heads = torch.tensor([prefix is None for prefix in layout.prefixes])
    lengths_K = torch.tensor(layout.lengths)[of_heads]
    in_heads_T = of_heads.repeat_interleave(torch.tensor(layout.lengths)).to(batch.input_ids_RT.device)

    def heads(row_1T: torch.Tensor) -> torch.Tensor:
        """The segments that read nothing first, as rows padded on the right."""
        return pad_sequence(list(row_1T[0, in_heads_T].split(lengths_K.tolist())), batch_first=True)

    tokens = {name: heads(batch.model_inputs[name]) for name in TOKEN_INPUTS if name in batch.model_inputs}
    mask_KP = heads(batch.attention_mask_RT)
    positions = position_ids(model, heads(batch.input_ids_RT), mask_KP, batch.model_inputs | tokens)
    starts_AT = positions.reshape(-1, *mask_KP.shape)[:, mask_KP.bool()]
    row_AT = segment_positions(starts_AT, layout)
    return row_AT if positions.ndim == 2 else row_AT[:, None]


def places_seen(batch: TrainingBatch, vocabulary: int, filters: Filters | None) -> torch.Tensor | None:
    """[B, V] where a repetition penalty first finds each token; None without one."""
    if filters is None or filters.repetition_penalty == 1:
        return None
    return first_places(batch.prompt_ids_BP, batch.completion_ids_BC, vocabulary)


def in_parts(of_part: Callable[..., PolicyTerms], at_once: int, *values_N: torch.Tensor) -> Sequence[torch.Tensor]:
    """The terms of all tokens, so many at a time."""
    if len(values_N[0]) <= at_once:
        return of_part(*values_N)
    parts = zip(*(values.split(at_once) for values in values_N), strict=True)
    found = [checkpoint(of_part, *part, use_reentrant=False) for part in parts]
    return [torch.cat(values) for values in zip(*found, strict=True)]
