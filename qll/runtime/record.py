"""One decoding step recorded as a CUDA graph: replayed, it costs no launches from Python.

A recorded step has fixed shapes: one token per text, attention over the whole cache behind a mask.
Where there is no GPU the runtime itself is the decoder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qll.runtime.cache import Cache
from qll.runtime.llama import Runtime

Decoder = Callable[[Tensor], Tensor]
WARM_UP = 3


def decoder(runtime: Runtime, cache: Cache) -> Decoder:
    """A function from the last ids [batch, 1] to the next logits [batch, 1, vocab]; fills `cache`.

    On CUDA the step is recorded at its first use; elsewhere it is the runtime's own forward.
    """
    if runtime.device.type == "cuda":
        return Recorded(runtime, cache)
    return lambda ids: runtime(ids, cache)


class Recorded:
    """The recorded step and its input and output tensors."""

    def __init__(self, runtime: Runtime, cache: Cache) -> None:
        self.runtime, self.cache = runtime, cache
        self.ids = torch.zeros(cache.batch, 1, dtype=torch.long, device=runtime.device)
        self.position = torch.zeros(1, dtype=torch.long, device=runtime.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    def __call__(self, ids: Int[Tensor, "batch one"]) -> Float[Tensor, "batch one vocab"]:
        """Logits behind `ids`, which take the next place of the cache."""
        self.cache.require_room(1)
        self.ids.copy_(ids)
        self.position.fill_(self.cache.filled)
        if self.graph is None:
            self._record()
        self.graph.replay()
        self.cache.filled += 1
        return self.logits.clone()

    def _record(self) -> None:
        # the steps that warm up write what the replay will write again
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._step()

    def _step(self) -> Tensor:
        return self.runtime.step(self.ids, self.position, self.cache, self.cache.length)
