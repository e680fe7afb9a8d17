"""Query and key matrices of one attention layer with fewer rotary pairs per head.

A score is the sum over rotary pairs of the products of a pair of query and a pair of key channels,
turned by the positions. Turning allows no mixing of pairs, but any pair can be left out: the same
ones for all query heads that read a key-value head. Hugging Face row order: channels i and
i + d_head / 2 of a head are a pair. (CR decomposition: MoDeGPT, Lin et al. 2024, type II, made to
respect rotary pairs and grouped queries.)

members (query, key), modes {"heads": (query heads, key-value heads), "d_head": (d_head,)}, ranks
(pairs kept per head,). Stored, whatever the gauge: cores Q' [heads 2 p, d_model], K' [kv_heads 2 p,
d_model], per head first the p first channels of the pairs, then the p second ones; indices kept [p]
for every key-value head. In the model the dropped channels are zero, so attention is unchanged.

>>> spec = NetworkSpec("joint_query_key", (8, 3), (1,), {"heads": (1, 1), "d_head": (4,)},
...                    members=((4, 3), (4, 3)))
>>> matrix = torch.tensor([1.0, 5.0, 1.0, 5.0])[:, None].expand(4, 3)
>>> network = JointQueryKey.decompose([matrix, matrix], spec)
>>> network.indices[0].tolist(), network.to_matrix(1)[:, 0].tolist(), network.num_params
([1], [0.0, 5.0, 0.0, 5.0], 13)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from qll.errors import ShapeError, UsageError
from qll.tn.entropy import von_neumann
from qll.tn.network import GAUGES, NetworkSpec, TensorShapes
from qll.tn.svd import singular_values


@dataclass(frozen=True)
class JointQueryKey:
    """Q and K at the kept rotary pairs; see the module for what is stored."""

    spec: NetworkSpec
    cores: tuple[Tensor, ...]
    indices: tuple[Tensor, ...] = ()
    name: ClassVar[str] = "joint_query_key"

    @classmethod
    def tensor_shapes(cls, spec: NetworkSpec) -> TensorShapes:
        """Shapes stored for `spec`; raises UsageError for a spec that cannot be."""
        if cls.clamp(spec).ranks != spec.ranks or spec.gauge not in GAUGES:
            raise UsageError(
                "more rotary pairs than a head has",
                where=spec.format,
                expected=cls.clamp(spec).ranks,
                found=spec.ranks,
            )
        heads, kv_heads, _ = heads_of(spec)
        (kept,), model = spec.ranks, spec.shape[1]
        cores = ((heads * 2 * kept, model), (kv_heads * 2 * kept, model))
        return TensorShapes(cores, ((kept,),) * kv_heads)

    @classmethod
    def max_ranks(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """All pairs of a head."""
        return (heads_of(spec)[2] // 2,)

    @classmethod
    def clamp(cls, spec: NetworkSpec) -> NetworkSpec:
        """Lower the pairs to d_head / 2, at least 1."""
        (most,) = cls.max_ranks(spec)
        if len(spec.ranks) != 1:
            raise UsageError("one rank: rotary pairs", where=spec.format, found=spec.ranks)
        return spec.with_ranks((max(1, min(spec.ranks[0], most)),))

    @classmethod
    def readers(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """How many members share a projection with each: none, each has its own matrix."""
        return (1, 1)

    @classmethod
    def decompose(
        cls, matrices: Sequence[Float[Tensor, "_ _"]], spec: NetworkSpec
    ) -> JointQueryKey:
        """Keeps per head the pairs with the largest rows, of query and key together; rank clamped.

        Raises UsageError for members that are no query and key, ShapeError for other matrices.
        """
        spec = cls.clamp(spec)
        found = tuple(tuple(item.shape) for item in matrices)
        if found != tuple(map(tuple, spec.members)):
            raise ShapeError(
                "matrices differ from the members of the spec",
                where=spec.format,
                expected=spec.members,
                found=found,
            )
        sizes = sum(
            item.double().square().sum(1)[pair_rows(spec, member)].sum((1, 2))
            for member, item in enumerate(matrices)
        )
        _, kv_heads, _ = heads_of(spec)
        kept = sizes.reshape(kv_heads, -1).topk(spec.ranks[0]).indices.sort().values
        return cls.of_pairs(spec, matrices, kept)

    @classmethod
    def of_pairs(
        cls,
        spec: NetworkSpec,
        matrices: Sequence[Float[Tensor, "_ _"]],
        kept: Int[Tensor, "kv_heads pairs"],
    ) -> JointQueryKey:
        """The rows of `matrices` at the pairs `kept` of each key-value head."""
        network = cls(spec.with_ranks((kept.shape[1],)), (), tuple(kept.contiguous()))
        cores = (matrix[network.places(member)] for member, matrix in enumerate(matrices))
        return replace(network, cores=tuple(cores))

    @property
    def num_params(self) -> int:
        """Numbers stored, kept pairs counted."""
        return self.num_floats + sum(index.numel() for index in self.indices)

    @property
    def num_floats(self) -> int:
        """Floating-point numbers stored."""
        return sum(core.numel() for core in self.cores)

    def interpolate(self) -> JointQueryKey:
        """The same: there is no bond to fix."""
        return replace(self, spec=self.spec.with_gauge("interpolative"))

    def expand(self) -> JointQueryKey:
        """The same."""
        return replace(self, spec=self.spec.with_gauge("none"))

    def applied_shape(self, member: int) -> tuple[int, int]:
        """(out, in) of what `apply` does: as in the dense model."""
        return self.spec.members[member]

    def apply(self, x: Float[Tensor, "*batch into"], member: int) -> Float[Tensor, "*batch out"]:
        """W_member x with zeros at the dropped channels.

        >>> spec = NetworkSpec("joint_query_key", (8, 3), (1,), {"heads": (1, 1), "d_head": (4,)},
        ...                    members=((4, 3), (4, 3)))
        >>> network = JointQueryKey.decompose([torch.ones(4, 3), torch.ones(4, 3)], spec)
        >>> network.apply(torch.ones(3), 0).tolist()
        [3.0, 0.0, 3.0, 0.0]
        """
        found = torch.nn.functional.linear(x, self.cores[member])
        full = found.new_zeros(*found.shape[:-1], self.spec.members[member][0])
        return full.index_copy(-1, self.places(member), found)

    def to_matrix(self, member: int) -> Float[Tensor, "out into"]:
        """W_member with zero rows at the dropped channels."""
        core = self.cores[member]
        return core.new_zeros(self.spec.members[member]).index_copy(0, self.places(member), core)

    def rows(self, ids: Int[Tensor, "*batch"], member: int) -> Float[Tensor, "*batch into"]:
        """Rows `ids` of `to_matrix(member)`."""
        return self.to_matrix(member)[ids]

    def flops(self, tokens: int) -> int:
        """Floating-point operations of applying both members to `tokens` vectors."""
        return 2 * tokens * self.num_floats

    def bond_spectrum(self, k: int) -> Float64[Tensor, "_"]:
        """Singular values of both matrices over the model leg, descending; k = 0."""
        return singular_values(torch.cat(list(self.cores)))

    def entropy(self, k: int) -> float:
        """Von Neumann entropy of bond k, in nats."""
        return von_neumann(self.bond_spectrum(k))

    def places(self, member: int) -> Int64[Tensor, " rows"]:
        """Where the rows of a core are in the dense matrix."""
        heads, kv_heads, d_head = heads_of(self.spec)
        count = (heads, kv_heads)[member]
        kept = torch.stack(self.indices).long()
        pairs = kept.repeat_interleave(count // kv_heads, 0)  # [count, kept]
        starts = torch.arange(count, device=pairs.device)[:, None] * d_head
        return torch.cat([starts + pairs, starts + pairs + d_head // 2], 1).flatten()


def pair_rows(spec: NetworkSpec, member: int) -> Int64[Tensor, "pairs heads 2"]:
    """Rows of a member that belong to each rotary pair of each key-value head.

    Pair number kv_head * d_head / 2 + i; a query matrix has the rows of all heads of the group.

    >>> spec = NetworkSpec("joint_query_key", (12, 3), (1,), {"heads": (2, 1), "d_head": (4,)},
    ...                    members=((8, 3), (4, 3)))
    >>> pair_rows(spec, 0).tolist()
    [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
    """
    heads, kv_heads, d_head = heads_of(spec)
    share = heads // kv_heads if member == 0 else 1
    rows = torch.arange(kv_heads * share * d_head).reshape(kv_heads, share, 2, d_head // 2)
    return rows.permute(0, 3, 1, 2).flatten(0, 1)


def heads_of(spec: NetworkSpec) -> tuple[int, int, int]:
    """(query heads, key-value heads, d_head); raises UsageError for other members."""
    heads, kv_heads = spec.modes["heads"]
    (d_head,) = spec.modes["d_head"]
    expected = tuple((count * d_head, spec.shape[1]) for count in (heads, kv_heads))
    total = (heads + kv_heads) * d_head
    members = tuple(map(tuple, spec.members))
    if members != expected or spec.shape[0] != total or heads % kv_heads or d_head % 2:
        raise UsageError(
            "the members are not the query and key matrices of these heads",
            where=spec.format,
            expected=expected,
            found=spec.members,
        )
    return heads, kv_heads, d_head
