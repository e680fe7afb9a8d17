"""What a model remembers between two calls: the position, and a few tensors per block.

An attention block remembers rotated keys and values of its window, so its tensors grow up to the
context; a block with a matrix state remembers a fixed number of bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

LayerState = tuple[Tensor, ...]


@dataclass(frozen=True)
class State:
    """Everything that the past leaves behind; every tensor has the batch as first axis."""

    position: int
    """Bytes read so far."""
    layers: tuple[LayerState, ...]
    """What each block remembers."""
    memory: Float[Tensor, "batch tokens d_model"] | None = None
    """The recurrent memory, if there is one."""
    shift: int = 0
    """Learned position of the first byte: drawn in training, 0 otherwise."""

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """The state with `change` applied to each of its tensors.

        >>> import torch
        >>> state = State(3, ((torch.zeros(2, 5),),)).map(lambda tensor: tensor[:1])
        >>> state.layers[0][0].shape, state.num_bytes()
        (torch.Size([1, 5]), 20)
        """
        layers = tuple(tuple(change(tensor) for tensor in layer) for layer in self.layers)
        memory = None if self.memory is None else change(self.memory)
        return replace(self, layers=layers, memory=memory)

    def detach(self) -> State:
        """The state cut off from the graph: what is carried from one training step to the next."""
        return self.map(Tensor.detach)

    def num_bytes(self) -> int:
        """Bytes that the state's tensors hold."""
        sizes: list[int] = []
        self.map(lambda tensor: sizes.append(tensor.numel() * tensor.element_size()) or tensor)
        return sum(sizes)
