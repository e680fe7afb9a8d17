"""Single entries of a matrix, alone or on top of a low-rank network: W = S, or W = S + A B.

ranks (kept,) or (kept, rank). S has `kept` values, in row-major order, and says where they are in
the cheaper of two ways: one bit per entry of W, packed into int32 words (word w, bit b is entry
32 w + b), or their positions; at kept = out * in nothing is said. Every word or position counts as
one number. There is no bond between the entries of S: its "spectrum" is the size of the entries.
Cores: values, then those of qll.tn.lowrank; indices: words or positions, then pivots.

>>> matrix = torch.tensor([[0.0, 2.0, 0.1], [3.0, 0.2, 0.0]])
>>> network = Sparse.decompose(matrix, NetworkSpec("sparse", (2, 3), ranks=(2,)))
>>> network.to_matrix().tolist(), network.cores[0].tolist()
([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]], [2.0, 3.0])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float64, Int, Int32, Int64
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qll.errors import UsageError
from qll.tn.entropy import von_neumann
from qll.tn.lowrank import LowRank
from qll.tn.network import NetworkSpec, TensorShapes
from qll.tn.svd import rank_for, widened

WORD = 32
# The positions behind a bit mask are remembered for matrices up to this size (int32, so at most
# 16 MB each): finding them costs more than a product with one token.
_REMEMBERED = 1 << 22
_places: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Sparse:
    """Kept entries, plus a low-rank network when there is a second rank."""

    spec: NetworkSpec
    cores: tuple[Tensor, ...]
    indices: tuple[Tensor, ...] = ()
    name: ClassVar[str] = "sparse"

    # -- closed forms ------------------------------------------------------------------------
    @classmethod
    def tensor_shapes(cls, spec: NetworkSpec) -> TensorShapes:
        """Shapes of the values, of the words or positions, and of the low-rank network.

        >>> Sparse.tensor_shapes(NetworkSpec("sparse", (8, 9), (40,)))
        TensorShapes(cores=((40,),), indices=((3,),))
        >>> Sparse.tensor_shapes(NetworkSpec("sparse", (8, 9), (2, 1)))
        TensorShapes(cores=((2,), (8, 1), (1, 9)), indices=((2,),))
        """
        kept, size = spec.ranks[0], spec.shape[0] * spec.shape[1]
        named = min(kept, -(-size // WORD))
        base = _base_spec(spec)
        shapes = TensorShapes(()) if base is None else LowRank.tensor_shapes(base)
        own = ((named,),) if kept < size else ()
        return TensorShapes(((kept,), *shapes.cores), (*own, *shapes.indices))

    @classmethod
    def max_ranks(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """(out * in,): every entry."""
        return (spec.shape[0] * spec.shape[1],)

    @classmethod
    def clamp(cls, spec: NetworkSpec) -> NetworkSpec:
        """Kept entries within 1 .. out * in, the rank (if any) within 1 .. min(out, in)."""
        if len(spec.ranks) not in (1, 2):
            raise UsageError(
                "a number of entries, and perhaps a rank, are needed",
                where=spec.format,
                expected="one or two ranks",
                found=spec.ranks,
            )
        limits = (spec.shape[0] * spec.shape[1], min(spec.shape))
        return spec.with_ranks(
            [max(1, min(rank, most)) for rank, most in zip(spec.ranks, limits, strict=False)]
        )

    # -- from a matrix -----------------------------------------------------------------------
    @classmethod
    def cut_spectra(cls, matrix: Float[Tensor, "out into"], spec: NetworkSpec) -> list[Tensor]:
        """[the absolute values of the entries, descending]."""
        return [widened(matrix).abs().flatten().sort(descending=True).values]

    @classmethod
    def decompose(cls, matrix: Float[Tensor, "out into"], spec: NetworkSpec) -> Sparse:
        """The best low-rank matrix (if any) and the largest entries of what it leaves."""
        spec = cls.clamp(spec).with_gauge("none")
        base = _base_spec(spec)
        part = None if base is None else LowRank.decompose(matrix, base)
        rest = matrix if part is None else matrix - part.to_matrix()
        return assembled(rest, largest(rest.abs(), spec.ranks[0]), part, spec)

    # -- verbs -------------------------------------------------------------------------------
    def transform_legs(self, out: Sequence[Tensor | None], into: Sequence[Tensor | None]) -> Sparse:
        """out[0] W into[0] with all its entries kept, since a product of them is not sparse;
        None leaves a side as it is. The gauge is kept."""
        full = NetworkSpec("lowrank", self.spec.shape, (min(self.spec.shape),))
        changed = LowRank.decompose(self.to_matrix(), full).transform_legs(out, into).to_matrix()
        spec = replace(self.spec, ranks=self.max_ranks(self.spec))
        return assembled(changed, torch.ones_like(changed, dtype=torch.bool), None, spec)

    def interpolate(self) -> Sparse:
        """The same matrix, the low-rank part in the interpolative gauge."""
        return self._with_base("interpolative", LowRank.interpolate)

    def expand(self) -> Sparse:
        """The same matrix, the low-rank part as two factors."""
        return self._with_base("none", LowRank.expand)

    def to_matrix(self) -> Float[Tensor, "out into"]:
        """W."""
        base = self.base()
        return self._entries() if base is None else self._entries() + base.to_matrix()

    def apply(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        """W x for each row of `x`; the entries are put in place first (half of them and more)."""
        base = self.base()
        image = torch.nn.functional.linear(x, self._entries())
        return image if base is None else image + base.apply(x)

    def rows(self, ids: Int[Tensor, "*ids"]) -> Float[Tensor, "*ids into"]:
        """Rows `ids` of W."""
        base = self.base()
        found = self._entries()[ids]
        return found if base is None else found + base.rows(ids)

    def flops(self, tokens: int) -> int:
        """FLOPs of `apply` on `tokens` rows: those of the dense product, zeros included."""
        base = self.base()
        own = 2 * tokens * self.spec.shape[0] * self.spec.shape[1]
        return own if base is None else own + base.flops(tokens)

    def bond_spectrum(self, k: int) -> Float64[Tensor, "r"]:
        """k = 0: the absolute values kept, descending; 1: that of the low-rank network."""
        if k == 1:
            return self.base().bond_spectrum()
        return widened(self.cores[0]).abs().sort(descending=True).values

    def entropy(self, k: int) -> float:
        """Entropy of the squared entries (k = 0) or of the low-rank bond (1), nats."""
        return von_neumann(self.bond_spectrum(k))

    def round(self, *, rtol: float | None = None, ranks: Sequence[int] | None = None) -> Sparse:
        """Fewer entries: relative error of S <= `rtol`, kept <= ranks[0]; the rest as it is."""
        sizes, base = self.bond_spectrum(0), self.base()
        kept = self.spec.ranks[0] if ranks is None else min(ranks[0], self.spec.ranks[0])
        kept = kept if rtol is None else min(kept, rank_for(sizes, rtol))
        entries = self._entries()
        spec = self.spec.with_ranks((kept, *self.spec.ranks[1:]))
        return assembled(entries, largest(entries.abs(), kept), base, spec)

    def base(self) -> LowRank | None:
        """The low-rank network, if there is one, on the same tensors."""
        spec = _base_spec(self.spec)
        if spec is None:
            return None
        pivots = self.indices[-1:] if spec.gauge == "interpolative" else ()
        return LowRank(spec, self.cores[1:], pivots)

    # -- private -----------------------------------------------------------------------------
    def _entries(self) -> Tensor:
        """S, zeros written out."""
        (values, *_), (out, into) = self.cores, self.spec.shape
        if values.shape[0] == out * into:
            return values.reshape(out, into)
        named = self.indices[0]
        if values.shape[0] > named.shape[0]:
            named = positions(named, values.shape[0], out * into)
        return values.new_zeros(out * into).index_add(0, named, values).reshape(out, into)

    def _with_base(self, gauge: str, verb) -> Sparse:
        base, spec = self.base(), self.spec.with_gauge(gauge)
        if base is None:
            return Sparse(spec, self.cores, self.indices)
        own = len(self.indices) - (1 if base.spec.gauge == "interpolative" else 0)
        part = verb(base)
        return Sparse(spec, (self.cores[0], *part.cores), (*self.indices[:own], *part.indices))


def assembled(
    entries: Float[Tensor, "out into"],
    mask: Bool[Tensor, "out into"],
    base: LowRank | None,
    spec: NetworkSpec,
) -> Sparse:
    """The network of `entries` where `mask` is set, plus `base`; spec.ranks[0] entries are set.

    >>> spec = NetworkSpec("sparse", (1, 2), (1,))
    >>> assembled(torch.ones(1, 2), torch.tensor([[False, True]]), None, spec).indices
    (tensor([1], dtype=torch.int32),)
    """
    kept, size = spec.ranks[0], mask.numel()
    named: tuple[Tensor, ...] = ()
    if kept < size:
        few = kept <= -(-size // WORD)
        named = (mask.flatten().nonzero().squeeze(1).int() if few else packed(mask),)
    cores = () if base is None else base.cores
    pivots = () if base is None else base.indices
    return Sparse(spec, (entries[mask], *cores), (*named, *pivots))


def largest(scores: Float[Tensor, "out into"], kept: int) -> Bool[Tensor, "out into"]:
    """Where the `kept` largest scores are, ties broken by position.

    >>> largest(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist()
    [[False, True, True]]
    """
    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:kept]] = True
    return mask.reshape(scores.shape)


def packed(mask: Bool[Tensor, "..."]) -> Int32[Tensor, " words"]:
    """A mask, flattened, as bits of int32 words, low bits first; the last word is filled with 0.

    >>> packed(torch.tensor([True, False, True])).tolist()
    [5]
    """
    flat = mask.flatten()
    bits = torch.nn.functional.pad(flat, (0, -len(flat) % WORD)).reshape(-1, WORD).long()
    words = (bits << torch.arange(WORD, device=bits.device)).sum(1)
    return torch.where(words >= 1 << (WORD - 1), words - (1 << WORD), words).int()


def positions(
    words: Int[Tensor, " words"], kept: int, size: int
) -> Int[Tensor, " kept"] | Int64[Tensor, " kept"]:
    """The first `kept` of the positions set in a mask of `size` entries, as `packed`; int32.

    A mask with fewer positions (of a network that was never loaded) repeats entry 0.

    >>> positions(torch.tensor([5], dtype=torch.int32), 2, 3).tolist()
    [0, 2]
    """
    if size > _REMEMBERED or torch.compiler.is_compiling() or words.is_inference():
        return _positions(words, kept, size)
    known = _places.get(words)
    if known is None or known[0] != (words._version, kept):
        known = ((words._version, kept), _positions(words, kept, size))
        _places[words] = known
    return known[1]


def _positions(words: Tensor, kept: int, size: int) -> Tensor:
    shifts = torch.arange(WORD, dtype=torch.int32, device=words.device)
    bits = (words.int()[:, None] >> shifts) & 1
    found = bits.flatten()[:size].nonzero().squeeze(1)[:kept].int()
    return torch.nn.functional.pad(found, (0, kept - len(found)))


def _base_spec(spec: NetworkSpec) -> NetworkSpec | None:
    """The spec of the low-rank network, if there is a rank for one."""
    if len(spec.ranks) < 2:
        return None
    return replace(spec, format=LowRank.name, ranks=spec.ranks[1:])
