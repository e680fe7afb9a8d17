"""Where a conversion's error in one place went: features that changed, died, were born, or none.

    x' - x = sum_both (b - a) d  +  sum_born b d  -  sum_died a d  +  (e' - e),  e = x - SAE(x)

The last term is dark: damage that the dictionary has no word for. Squared norms of the four do not
add up to the whole, since they are not orthogonal; what is missing is shown as `cross`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qll.lens.codes import SparseCodes
from qll.lens.sae import SAE

TERMS = ("changed", "born", "died", "dark")


class Ledger:
    """Running sums of squared norms of the four terms, and of the whole error.

    >>> from qll.load.sae_file import LatentMatrix, SAESpec, StoredSAE
    >>> eye, zeros = LatentMatrix(torch.eye(2)), {"b_enc": torch.zeros(2), "b_dec": torch.zeros(2)}
    >>> sae = SAE(StoredSAE(SAESpec("layers.0", 2, 2, 2, "topk", k=1), eye, eye, zeros))
    >>> x, ledger = torch.tensor([[2.0, 0.0]]), Ledger(sae)
    >>> ledger.update(sae.encode(x), sae.encode(x / 2), x, x / 2)
    >>> ledger.shares()["changed"], ledger.shares()["dark"]
    (1.0, 0.0)
    """

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.squares = dict.fromkeys(("whole", *TERMS), 0.0)

    def update(
        self,
        before: SparseCodes,
        after: SparseCodes,
        x: Float[Tensor, "tokens d_out"],
        x_after: Float[Tensor, "tokens d_out"],
        chosen: Bool[Tensor, " tokens"] | None = None,
    ) -> None:
        """Add the tokens of one window (only the `chosen` ones)."""
        if chosen is not None:
            where = chosen.nonzero()[:, 0]
            before, after, x, x_after = (
                part[where.to(device)]
                for part, device in (
                    (before, before.values.device),
                    (after, after.values.device),
                    (x, x.device),
                    (x_after, x_after.device),
                )
            )
        whole = (x_after.float() - x.float()).to(self.sae.device)
        old, new = _in_both(before, after), _in_both(after, before)
        terms = {
            "changed": self._vector(after, new) - self._vector(before, old),
            "born": self._vector(after, ~new),
            "died": -self._vector(before, ~old),
        }
        terms["dark"] = whole - sum(terms.values())
        for name, vectors in {"whole": whole, **terms}.items():
            self.squares[name] += float(vectors.cpu().double().square().sum())

    def shares(self) -> dict[str, float]:
        """Squared norm of each term over that of the whole error, and `cross`, which may be < 0.

        All 0 where nothing changed.
        """
        whole = self.squares["whole"]
        shares = {name: self.squares[name] / whole if whole else 0.0 for name in TERMS}
        return shares | {"cross": 1 - sum(shares.values()) if whole else 0.0}

    def _vector(self, codes: SparseCodes, chosen: Bool[Tensor, "tokens width"]) -> Tensor:
        """What the chosen entries write."""
        part = replace(codes, values=codes.values.masked_fill(~chosen, 0))
        vectors = self.sae.weighted_sum(part)
        matrix = self.sae.stored.vectors.get("inverse_matrix")
        vectors = vectors if matrix is None else vectors @ matrix
        return vectors if codes.scale is None else vectors * codes.scale


def _in_both(codes: SparseCodes, other: SparseCodes) -> Bool[Tensor, "tokens width"]:
    """Which entries of `codes` fire in `other` too."""
    found = torch.zeros_like(codes.values, dtype=torch.bool)
    for column in range(other.values.shape[1]):
        fires = other.values[:, column : column + 1] != 0
        found |= (codes.indices == other.indices[:, column : column + 1]) & fires
    return found & (codes.values != 0)
