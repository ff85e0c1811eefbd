"""Pictures among a prompt's tokens: one token for every feature to the trainer, one for the whole picture to vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PictureTokens:
    """How a picture stands among a prompt's tokens."""

    token_id: int
    """One for every feature of the picture."""
    around: tuple[int, int] | None = None
    """Tokens before and after them where vLLM writes these itself, as for InternVL and SAIL-VL2."""


def collapsed(token_ids: Sequence[int], picture: PictureTokens) -> tuple[list[int], int]:
    """The tokens with each run of picture tokens as one, and the number of runs."""
    short: list[int] = []
    runs = 0
    for token, before in zip(token_ids, [None, *token_ids[:-1]], strict=True):
        if token != picture.token_id:
            if picture.around and before == picture.token_id:
                continue  # the token after the picture
            short.append(token)
        elif before != picture.token_id:
            if picture.around:
                short.pop()  # the token before it
            short.append(token)
            runs += 1
    return short, runs
