"""Sparse codes: per token the features that fire and how strongly, never a dense row of all.

>>> codes = SparseCodes(torch.tensor([[2.0, 0.0]]), torch.tensor([[5, 0]]))
>>> codes.l0().tolist(), codes.dense(8).tolist()
([1], [[0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0]])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class SparseCodes:
    """Codes of some tokens. An entry of value 0 is padding and has index 0.

    values: activations [tokens, width]; indices: features [tokens, width], int64. A feature stands
    at most once in a row. scale, shift: how the run-time normalisation of each token is undone.
    """

    values: Float[Tensor, "tokens width"]
    indices: Int[Tensor, "tokens width"]
    scale: Float[Tensor, "tokens 1"] | None = None
    shift: Float[Tensor, "tokens 1"] | None = None

    def __len__(self) -> int:
        """Number of tokens."""
        return self.values.shape[0]

    def __getitem__(self, tokens: slice | Tensor) -> SparseCodes:
        """The codes of some tokens."""
        extra = [None if part is None else part[tokens] for part in (self.scale, self.shift)]
        return SparseCodes(self.values[tokens], self.indices[tokens], *extra)

    def l0(self) -> Int[Tensor, " tokens"]:
        """How many features fire on each token."""
        return (self.values != 0).sum(dim=1)

    def of(self, feature: int) -> Float[Tensor, " tokens"]:
        """The activation of one feature on each token.

        >>> SparseCodes(torch.tensor([[2.0], [3.0]]), torch.tensor([[5], [1]])).of(1).tolist()
        [0.0, 3.0]
        """
        return (self.values * (self.indices == feature)).sum(dim=1)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token, feature, value) of every activation that is not 0, token by token."""
        tokens, places = self.values.nonzero(as_tuple=True)
        return tokens, self.indices[tokens, places], self.values[tokens, places]

    def dense(self, d_sae: int) -> Float[Tensor, "tokens d_sae"]:
        """All features of every token: for small autoencoders and tests only."""
        full = self.values.new_zeros(len(self), d_sae)
        return full.scatter_add_(1, self.indices, self.values)

    def without(self, features: Sequence[int]) -> SparseCodes:
        """The same codes with `features` switched off.

        >>> SparseCodes(torch.tensor([[2.0, 1.0]]), torch.tensor([[5, 3]])).without([5]).values
        tensor([[0., 1.]])
        """
        banned = torch.as_tensor(list(features), device=self.indices.device)
        gone = torch.isin(self.indices, banned)
        return self._with(self.values.masked_fill(gone, 0), self.indices)

    def plus(self, feature: int, amount: float) -> SparseCodes:
        """The same codes with `amount` added to one feature's activation on every token.

        >>> SparseCodes(torch.tensor([[2.0]]), torch.tensor([[5]])).plus(5, 1.0).values.tolist()
        [[3.0, 0.0]]
        """
        there = (self.indices == feature) & (self.values != 0)
        values = torch.where(there, self.values + amount, self.values)
        absent = ~there.any(dim=1, keepdim=True)
        return self._with(
            torch.cat([values, absent * amount], dim=1).to(self.values.dtype),
            torch.cat([self.indices, absent * feature], dim=1),
        )

    def widened(self, width: int) -> SparseCodes:
        """The same codes with padding up to `width` entries a token."""
        more = (0, width - self.values.shape[1])
        return self._with(functional.pad(self.values, more), functional.pad(self.indices, more))

    def to(self, device: str | torch.device) -> SparseCodes:
        """The same codes on another device."""
        extra = [None if part is None else part.to(device) for part in (self.scale, self.shift)]
        return SparseCodes(self.values.to(device), self.indices.to(device), *extra)

    def _with(self, values: Tensor, indices: Tensor) -> SparseCodes:
        indices = indices.masked_fill(values == 0, 0)
        return SparseCodes(values, indices, self.scale, self.shift)


def concatenate(parts: Sequence[SparseCodes]) -> SparseCodes:
    """The codes of all tokens of `parts`, padded to one width.

    >>> one = SparseCodes(torch.ones(1, 1), torch.tensor([[4]]))
    >>> two = SparseCodes(torch.ones(1, 2), torch.tensor([[1, 2]]))
    >>> concatenate([one, two]).indices.tolist()
    [[4, 0], [1, 2]]
    """
    width = max(part.values.shape[1] for part in parts)
    parts = [part.widened(width) for part in parts]
    extra = [
        None if parts[0].scale is None else torch.cat([part.scale for part in parts]),
        None if parts[0].shift is None else torch.cat([part.shift for part in parts]),
    ]
    return SparseCodes(
        torch.cat([part.values for part in parts]),
        torch.cat([part.indices for part in parts]),
        *extra,
    )
