"""The part of a model that a place can change: from the place's block on, fed from readings.

What is done to a place cannot reach the blocks before it. So they are not run again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from qll.lens.hooks import states_from
from qll.lens.readings import Readings
from qll.load.sae_names import site_of


class Rest(NamedTuple):
    """A model from the block of a hookpoint on, with hooks and all."""

    readings: Readings
    hookpoint: str

    @torch.no_grad()
    def states(
        self,
        number: int,
        tokens: slice = slice(None),
        *,
        copies: int = 1,
        cache: DynamicCache | None = None,
    ) -> Float[Tensor, "copies tokens d_model"]:
        """What the output matrix reads on some tokens of a window, `copies` times side by side.

        cache: holds the tokens before, in these blocks, and is added to. Hooks set meanwhile work.

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from qll.lens.readings import read
        >>> config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8,
        ...                      num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> rest = Rest(read(model, torch.tensor([[1, 2, 3]]), ["layers.0"]), "layers.1.mlp")
        >>> whole, cache = rest.states(0), DynamicCache()
        >>> parts = [rest.states(0, part, cache=cache) for part in (slice(0, 2), slice(2, 3))]
        >>> torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)
        True
        """
        model, block = self.readings.model, site_of(self.hookpoint).block
        if block:
            stream = self.readings.at(f"layers.{block - 1}", number)[tokens].to(model.dtype)
            stream = stream.expand(copies, -1, -1)
            return states_from(model, block, stream, cache)
        # the embedding is no block: what hangs on it needs its ids
        ids = self.readings.windows[number][tokens].to(model.device).expand(copies, -1)
        found = model.base_model(input_ids=ids, cache=cache, use_cache=cache is not None)
        return found.last_hidden_state
