"""A key-value cache with room for the tokens to come.

transformers' growing cache copies all earlier keys and values for every new token, which is half of the time of writing
short answers. Here they are written into their place.
"""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values [rows, heads, tokens, width] in buffers that are filled from the left."""

    def __init__(self, filled: DynamicLayer, repeats: int, room: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = filled.dtype, filled.device, True
        self.key_buffer = with_room(filled.keys, repeats, room)
        self.value_buffer = with_room(filled.values, repeats, room)
        self._show(filled.get_seq_length())

    def _show(self, length: int) -> None:
        self.keys, self.values = self.key_buffer[:, :, :length], self.value_buffer[:, :, :length]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple:
        """Add tokens; the keys and values of all so far."""
        start = self.get_seq_length()
        self._show(start + key_states.shape[-2])
        self.keys[:, :, start:], self.values[:, :, start:] = key_states, value_states
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some of the rows."""
        self.key_buffer, self.value_buffer = self.key_buffer[indices], self.value_buffer[indices]
        self._show(self.get_seq_length())


def with_room(states: torch.Tensor | None, repeats: int, room: int) -> torch.Tensor:
    """Every row `repeats` times, with unused places for `room` more tokens."""
    assert states is not None
    rows, heads, tokens, width = states.shape
    buffer = states.new_empty(rows, repeats, heads, tokens + room, width)
    buffer[:, :, :, :tokens] = states[:, None]
    return buffer.flatten(0, 1)


def give_room(cache: DynamicCache, repeats: int, room: int) -> None:
    """Every row of the cache `repeats` times; layers that keep all tokens get room for `room` more."""
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = RoomyLayer(layer, repeats, room)
        else:  # a sliding window, say, which does not grow
            layer.batch_repeat_interleave(repeats)
