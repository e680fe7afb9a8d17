"""What a model remembers between two calls: the position, and a few tensors per block.

An attention block remembers rotated keys and values of its window, so its tensors grow up to the
context; a block with a matrix state remembers a fixed number of bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

LayerState = tuple[Tensor, ...]


@dataclass(frozen=True)
class State:
    """Everything that the past leaves behind; every tensor has the batch as first axis."""

    position: int
    """Bytes read so far."""
    layers: tuple[LayerState, ...]
    """What each block remembers."""

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """The state with `change` applied to each of its tensors."""
        layers = tuple(tuple(change(tensor) for tensor in layer) for layer in self.layers)
        return State(self.position, layers)

    def detach(self) -> State:
        """The state cut off from the graph: what is carried from one training step to the next."""
        return self.map(Tensor.detach)

    def num_bytes(self) -> int:
        """Bytes that the state's tensors hold."""
        return sum(
            tensor.numel() * tensor.element_size() for layer in self.layers for tensor in layer
        )
