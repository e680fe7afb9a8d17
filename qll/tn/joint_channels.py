"""Gate, up and down matrices of an MLP with fewer channels between them.

    y = D (silu(G x) * (U x))      G, U [d_ff, d_model]    D [d_model, d_ff]

A channel is row j of G and U and column j of D. The nonlinearity acts on each alone, so channels
can be chosen but not mixed: k of them are kept and the other members' parts go with no overhead, so
the module that runs is an MLP of width k. (D is refitted to the kept channels by whoever fits:
`qll.tn.elimination`; MoDeGPT, Lin et al. 2024, section 3.2, type I.) Each of the three reduced
matrices is whole, or low rank where its own rank is below full.

members ((d_ff, d_model), (d_ff, d_model), (d_model, d_ff)), ranks (k, r_gate, r_up, r_down).
Stored: indices kept [k] and the pivots of the parts; cores of G', U' [k, d_model] and
D' [d_model, k] (`qll.tn.parts`), in the gauge of the spec.

>>> import torch
>>> spec = NetworkSpec("joint_channels", (8, 2), (2, 2, 2, 2), members=((3, 2), (3, 2), (2, 3)))
>>> matrices = [torch.ones(3, 2), torch.ones(3, 2), torch.tensor([[1.0, 0.1, 2.0], [1, 0, 2]])]
>>> network = JointChannels.decompose(matrices, spec)
>>> network.indices[0].tolist(), network.to_matrix(2)[0].tolist(), network.num_params
([0, 2], [1.0, 0.0, 2.0], 14)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from jaxtyping import Float, Float64, Int
from torch import Tensor

from qll.errors import ShapeError, UsageError
from qll.tn import parts
from qll.tn.elimination import eliminate
from qll.tn.entropy import von_neumann
from qll.tn.network import GAUGES, NetworkSpec, TensorShapes

_DOWN = 2  # the member that reads the channels


@dataclass(frozen=True)
class JointChannels:
    """An MLP's three matrices at the kept channels; see the module for what is stored."""

    spec: NetworkSpec
    cores: tuple[Tensor, ...]
    indices: tuple[Tensor, ...] = ()
    name: ClassVar[str] = "joint_channels"

    @classmethod
    def tensor_shapes(cls, spec: NetworkSpec) -> TensorShapes:
        """Shapes stored for `spec`; raises UsageError for a spec that cannot be."""
        if cls.clamp(spec).ranks != spec.ranks or spec.gauge not in GAUGES:
            raise UsageError(
                "ranks are not what their neighbours allow",
                where=spec.format,
                expected=cls.clamp(spec).ranks,
                found=spec.ranks,
            )
        own = parts.shapes(part_specs(spec))
        return TensorShapes(own.cores, ((spec.ranks[0],), *own.indices))

    @classmethod
    def max_ranks(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """Ranks at which any matrices of these shapes are represented exactly."""
        channels, model = _sizes(spec)
        return (channels, *[min(channels, model)] * 3)

    @classmethod
    def clamp(cls, spec: NetworkSpec) -> NetworkSpec:
        """Lower k to d_ff and the other ranks to min(k, d_model), at least 1."""
        channels, model = _sizes(spec)
        if len(spec.ranks) != 4:
            raise UsageError(
                "joint channels have four ranks: kept channels, gate, up, down",
                where=spec.format,
                found=spec.ranks,
            )
        kept, *own = spec.ranks
        kept = max(1, min(kept, channels))
        return spec.with_ranks((kept, *(max(1, min(rank, kept, model)) for rank in own)))

    @classmethod
    def readers(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """How many members share a projection with each: none, each has its own matrix."""
        return (1, 1, 1)

    @classmethod
    def decompose(
        cls, matrices: Sequence[Float[Tensor, "_ _"]], spec: NetworkSpec
    ) -> JointChannels:
        """The k channels with the largest columns of D, and their parts; gauge "none".

        Ranks are clamped. Raises UsageError for members that are no MLP, ShapeError for other
        matrices.
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
        kept = eliminate(matrices[_DOWN]).kept(spec.ranks[0]).to(matrices[_DOWN].device)
        reduced = (*(item[kept] for item in matrices[:_DOWN]), matrices[_DOWN][:, kept])
        own = [
            parts.truncated(item, part)
            for item, part in zip(reduced, part_specs(spec), strict=True)
        ]
        return cls.of_parts(spec.with_gauge("none"), kept, own)

    @classmethod
    def of_parts(
        cls, spec: NetworkSpec, kept: Int[Tensor, " k"], own: Sequence[parts.Part]
    ) -> JointChannels:
        """The network of three parts, in the gauge of `spec`, at the channels `kept`."""
        cores, indices = parts.pack(own)
        return cls(spec, cores, (kept, *indices))

    @property
    def num_params(self) -> int:
        """Numbers stored, kept channels and pivot indices counted."""
        return self.num_floats + sum(index.numel() for index in self.indices)

    @property
    def num_floats(self) -> int:
        """Floating-point numbers stored."""
        return sum(core.numel() for core in self.cores)

    def interpolate(self) -> JointChannels:
        """The same matrices with low-rank parts in the interpolative gauge."""
        return self._regauged("interpolative")

    def expand(self) -> JointChannels:
        """The same matrices with low-rank parts as two factors."""
        return self._regauged("none")

    def applied_shape(self, member: int) -> tuple[int, int]:
        """(out, in) of what `apply` does: the width between the members is k."""
        return part_specs(self.spec)[member].shape

    def apply(self, x: Float[Tensor, "*batch into"], member: int) -> Float[Tensor, "*batch out"]:
        """The reduced matrix of a member times every x: gate and up give k channels, down takes k.

        >>> spec = NetworkSpec("joint_channels", (5, 1), (1, 1, 1, 1),
        ...                    members=((2, 1), (2, 1), (1, 2)))
        >>> import torch
        >>> down = torch.tensor([[3.0, 1.0]])
        >>> network = JointChannels.decompose([torch.ones(2, 1), torch.ones(2, 1), down], spec)
        >>> network.apply(torch.tensor([2.0]), 0).tolist(), network.apply(torch.ones(1), 2).tolist()
        ([2.0], [3.0])
        """
        return parts.apply(self.reduced[member], x)

    def to_matrix(self, member: int) -> Float[Tensor, "out into"]:
        """W_member [out, in] as in a dense MLP: rows (or columns) of dropped channels are zero."""
        reduced = parts.matrix(self.reduced[member])
        full = reduced.new_zeros(self.spec.members[member])
        return full.index_copy(1 if member == _DOWN else 0, self.indices[0].long(), reduced)

    def rows(self, ids: Int[Tensor, "*batch"], member: int) -> Float[Tensor, "*batch into"]:
        """Rows `ids` of `to_matrix(member)`."""
        flat, kept = ids.reshape(-1), self.indices[0].long()
        if member == _DOWN:
            reduced = parts.rows(self.reduced[member], flat)
            found = reduced.new_zeros(len(flat), self.spec.members[member][1])
            found = found.index_copy(1, kept, reduced)
        else:
            found = self.to_matrix(member)[flat]
        return found.reshape(*ids.shape, -1)

    def flops(self, tokens: int) -> int:
        """Floating-point operations of applying every member to `tokens` vectors."""
        return sum(parts.flops(part, tokens) for part in self.reduced)

    def bond_spectrum(self, k: int) -> Float64[Tensor, "_"]:
        """Singular values: k = 0 of D' (channels against output), k = j + 1 of member j's part."""
        return parts.spectrum(self.reduced[_DOWN if k == 0 else k - 1])

    def entropy(self, k: int) -> float:
        """Von Neumann entropy of bond k, in nats."""
        return von_neumann(self.bond_spectrum(k))

    @property
    def reduced(self) -> list[parts.Part]:
        """The three reduced matrices."""
        return parts.unpack(part_specs(self.spec), self.cores, self.indices[1:])

    def _regauged(self, gauge: str) -> JointChannels:
        own = [parts.regauged(part, gauge) for part in self.reduced]
        return self.of_parts(self.spec.with_gauge(gauge), self.indices[0], own)


def part_specs(spec: NetworkSpec) -> tuple[NetworkSpec, ...]:
    """The low-rank specs of G', U' [k, d_model] and D' [d_model, k]."""
    return _part_specs(spec.shape[1], tuple(spec.ranks), spec.gauge)


@lru_cache(maxsize=1024)
def _part_specs(model: int, ranks: tuple[int, ...], gauge: str) -> tuple[NetworkSpec, ...]:
    kept, *own = ranks
    return parts.specs(((kept, model), (kept, model), (model, kept)), own, gauge)


def _sizes(spec: NetworkSpec) -> tuple[int, int]:
    """(d_ff, d_model); raises UsageError for members that are no MLP."""
    members = tuple(map(tuple, spec.members))
    channels, model = members[0] if members else (0, 0)
    expected = ((channels, model), (channels, model), (model, channels))
    if members != expected or tuple(spec.shape) != (2 * channels + model, model):
        raise UsageError(
            "the members are not the gate, up and down matrices of one MLP",
            where=spec.format,
            expected=expected,
            found=members,
        )
    return channels, model
