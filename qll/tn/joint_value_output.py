"""Value and output matrices of one attention layer with fewer channels per head between them.

Attention only averages value vectors over positions, so any matrix may act on the channels of a
head: O_h V_g = (O_h T^-1)(T V_g) for every query head h that reads key-value head g. So r channels
per head may be mixed from all d_head, and the r x r matrix T is free: in the interpolative gauge
it makes r columns of V_g' the identity, and kv_heads r^2 numbers need not be stored. At r = d_head
that is exact and saves d_head^2 per key-value head. (Shared inner dimension: MoDeGPT, Lin et al.
2024, type III, here for grouped queries and in any metric; the gauge is that of `qll.tn.gauge`.)

members (value, output), modes {"heads": (query heads, key-value heads), "d_head": (d_head,)},
ranks (r, r_output): r_output below full makes the reduced output matrix low rank. Stored:

- gauge "none": V' [kv_heads r, d_model], then O' [d_model, heads r] as a part (`qll.tn.parts`).
- gauge "interpolative": for every key-value head C_g [d_model - r, r] with V_g'^T = P_g [I; C_g],
  then O' as a part; indices pivots_g [r] for every head, then those of O'.

In the model a head's channels from r on are zero, so attention itself is unchanged.

>>> spec = NetworkSpec("joint_value_output", (12, 6), (2, 6), {"heads": (3, 3), "d_head": (2,)},
...                    members=((6, 6), (6, 6)))
>>> value, output = torch.eye(6).double(), torch.arange(36.0).reshape(6, 6).double()
>>> network = JointValueOutput.decompose([value, output], spec).interpolate()
>>> product = network.to_matrix(1) @ network.to_matrix(0)
>>> bool(torch.allclose(product, output)), network.num_floats, network.num_params
(True, 60, 66)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn.functional import pad

from qll.errors import ShapeError, UsageError
from qll.tn import parts
from qll.tn.entropy import von_neumann
from qll.tn.gauge import interpolative, write
from qll.tn.legs import exact, leading_basis, onto_bond
from qll.tn.network import GAUGES, NetworkSpec, TensorShapes
from qll.tn.svd import singular_values


@dataclass(frozen=True)
class JointValueOutput:
    """V and O over r channels per head; see the module for what is stored."""

    spec: NetworkSpec
    cores: tuple[Tensor, ...]
    indices: tuple[Tensor, ...] = ()
    name: ClassVar[str] = "joint_value_output"

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
        _, kv_heads, _ = heads_of(spec)
        rank, model = spec.ranks[0], spec.shape[1]
        own = parts.shapes((output_part(spec),))
        if spec.gauge == "none":
            return TensorShapes(((kv_heads * rank, model), *own.cores), own.indices)
        values = ((model - rank, rank),) * kv_heads
        return TensorShapes((*values, *own.cores), (*((rank,),) * kv_heads, *own.indices))

    @classmethod
    def max_ranks(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """Ranks at which any matrices of these shapes are represented exactly."""
        heads, _, d_head = heads_of(spec)
        rank = min(d_head, spec.shape[1])
        return (rank, min(spec.shape[1], heads * rank))

    @classmethod
    def clamp(cls, spec: NetworkSpec) -> NetworkSpec:
        """Lower r to d_head and r_output to min(d_model, heads r), at least 1."""
        heads, _, d_head = heads_of(spec)
        if len(spec.ranks) != 2:
            raise UsageError(
                "value and output have two ranks: channels per head, output matrix",
                where=spec.format,
                found=spec.ranks,
            )
        rank = max(1, min(spec.ranks[0], d_head, spec.shape[1]))
        return spec.with_ranks((rank, max(1, min(spec.ranks[1], heads * rank, spec.shape[1]))))

    @classmethod
    def readers(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """How many members share a projection with each: none, they read different vectors."""
        return (1, 1)

    @classmethod
    def decompose(
        cls, matrices: Sequence[Float[Tensor, "_ _"]], spec: NetworkSpec
    ) -> JointValueOutput:
        """Per key-value head the best r channels for the norm of its O_h V_g; gauge "none".

        Ranks are clamped. Raises UsageError for members that are no pair of value and output,
        ShapeError for other matrices.
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
        heads, kv_heads, d_head = heads_of(spec)
        value = exact(matrices[0]).unflatten(0, (kv_heads, d_head))
        output = exact(matrices[1]).unflatten(1, (heads, d_head))
        values, outputs = [], []
        for group, head_value in enumerate(value):
            share = heads // kv_heads
            readers = output[:, group * share : (group + 1) * share].transpose(0, 1)
            stacked = readers.flatten(0, 1)  # [share * d_model, d_head]
            # left singular vectors of O V span the best outputs; their images the best channels
            basis = leading_basis(stacked @ head_value, spec.ranks[0])
            mixing = basis.mT @ stacked
            values.append(mixing @ head_value)
            outputs += list(basis.unflatten(0, (share, -1)))
        kind = torch.promote_types(matrices[0].dtype, torch.float32)
        to = {"dtype": kind, "device": matrices[0].device}
        part = parts.truncated(torch.cat(outputs, 1).to(**to), output_part(spec))
        return cls.of_parts(spec, torch.cat(values).to(**to), part)

    @classmethod
    def of_parts(
        cls, spec: NetworkSpec, value: Float[Tensor, "rows model"], output: parts.Part
    ) -> JointValueOutput:
        """The network of V' [kv_heads r, d_model] and the part O' in gauge "none"."""
        own = parts.regauged(output, "none")
        cores, _ = parts.pack([own])
        return cls(spec.with_gauge("none"), (value, *cores))

    @property
    def num_params(self) -> int:
        """Numbers stored, pivot indices counted."""
        return self.num_floats + sum(index.numel() for index in self.indices)

    @property
    def num_floats(self) -> int:
        """Floating-point numbers stored."""
        return sum(core.numel() for core in self.cores)

    def interpolate(self) -> JointValueOutput:
        """The same function with kv_heads r^2 numbers fewer, and O' in the same gauge."""
        if self.spec.gauge == "interpolative":
            return self
        heads, kv_heads, _ = heads_of(self.spec)
        rests, pivots, mixes = [], [], []
        for value in self.cores[0].unflatten(0, (kv_heads, -1)):
            rest, own = interpolative(value.mT)
            mix = exact(value)[:, own.cpu()]  # V_g' = mix [I, C^T] P^T
            rests.append(rest.to(value))
            pivots.append(own.to(value.device))
            mixes += [mix] * (heads // kv_heads)
        mix = torch.block_diag(*mixes)
        output = self.output
        if isinstance(output, Tensor):
            output = (exact(output) @ mix).to(output)
        else:
            output = output.transform_legs([None], [mix]).interpolate()
        cores, indices = parts.pack([output])
        spec = self.spec.with_gauge("interpolative")
        return JointValueOutput(spec, (*rests, *cores), (*pivots, *indices))

    def expand(self) -> JointValueOutput:
        """The same function with V' written out and O' as two factors."""
        if self.spec.gauge == "none":
            return self
        return self.of_parts(self.spec, self._value(), self.output)

    def applied_shape(self, member: int) -> tuple[int, int]:
        """(out, in) of what `apply` does: as in the dense model."""
        return self.spec.members[member]

    def apply(self, x: Float[Tensor, "*batch into"], member: int) -> Float[Tensor, "*batch out"]:
        """Value: r channels in the first places of each head, zeros behind. Output: reads those.

        >>> spec = NetworkSpec("joint_value_output", (4, 2), (1, 2), {"heads": (1, 1),
        ...                    "d_head": (2,)}, members=((2, 2), (2, 2)))
        >>> matrices = [torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.eye(2)]
        >>> spec = JointValueOutput.clamp(spec)
        >>> network = JointValueOutput.decompose(matrices, spec)
        >>> value = network.apply(torch.tensor([1.0, 2.0]), 0)
        >>> float(value[1]), network.apply(value, 1).tolist()
        (0.0, [3.0, 0.0])
        """
        heads, kv_heads, d_head = heads_of(self.spec)
        rank = self.spec.ranks[0]
        if member == 1:
            kept = x.unflatten(-1, (heads, d_head))[..., :rank].flatten(-2)
            return parts.apply(self.output, kept)
        if self.spec.gauge == "none":
            found = torch.nn.functional.linear(x, self.cores[0]).unflatten(-1, (kv_heads, rank))
        else:
            stored = zip(self.cores[:kv_heads], self.indices[:kv_heads], strict=True)
            found = torch.stack([onto_bond(x, rest, pivots) for rest, pivots in stored], -2)
        return pad(found, (0, d_head - rank)).flatten(-2)

    def to_matrix(self, member: int) -> Float[Tensor, "out into"]:
        """V or O as in a dense model: the pair computes what `apply` does.

        Each alone is in a basis of its own; `aligned` brings them near to the original ones.
        """
        heads, kv_heads, d_head = heads_of(self.spec)
        rank = self.spec.ranks[0]
        if member == 1:
            split = parts.matrix(self.output).unflatten(1, (heads, rank))
            return pad(split, (0, d_head - rank)).flatten(1)
        split = self._value().unflatten(0, (kv_heads, rank))
        return pad(split, (0, 0, 0, d_head - rank)).flatten(0, 1)

    def aligned(self, value: Float[Tensor, "out into"]) -> list[Float64[Tensor, "_ _"]]:
        """V and O in the basis of the original V: the same function, comparable matrix by matrix.

        Per head B = V_g' V_g^+ turns O_h' into O_h' B and V_g' into B^+ V_g'.
        """
        heads, kv_heads, d_head = heads_of(self.spec)
        originals = exact(value).unflatten(0, (kv_heads, d_head))
        reduced = exact(self._value()).unflatten(0, (kv_heads, -1))
        mixes = reduced @ torch.linalg.pinv(originals)
        values = torch.linalg.pinv(mixes) @ reduced
        outputs = exact(parts.matrix(self.output)).unflatten(1, (heads, -1)).transpose(0, 1)
        outputs = outputs @ mixes.repeat_interleave(heads // kv_heads, 0)
        return [values.flatten(0, 1), outputs.transpose(0, 1).flatten(1)]

    def rows(self, ids: Int[Tensor, "*batch"], member: int) -> Float[Tensor, "*batch into"]:
        """Rows `ids` of `to_matrix(member)`."""
        return self.to_matrix(member)[ids]

    def flops(self, tokens: int) -> int:
        """Floating-point operations of applying both members to `tokens` vectors."""
        _, kv_heads, _ = heads_of(self.spec)
        values = self.cores[: kv_heads if self.spec.gauge == "interpolative" else 1]
        return 2 * tokens * sum(core.numel() for core in values) + parts.flops(self.output, tokens)

    def bond_spectrum(self, k: int) -> Float64[Tensor, "_"]:
        """Singular values: k = 0 of all O_h V_g (stacked over the heads of a group) over the
        channels, k = 1 of the output matrix."""
        if k == 1:
            return parts.spectrum(self.output)
        heads, kv_heads, _ = heads_of(self.spec)
        values = exact(self._value()).unflatten(0, (kv_heads, -1))
        outputs = exact(parts.matrix(self.output)).unflatten(1, (heads, -1)).transpose(0, 1)
        found = []
        for value, readers in zip(values, outputs.unflatten(0, (kv_heads, -1)), strict=True):
            left = torch.linalg.qr(readers.flatten(0, 1), mode="r").R
            found.append(singular_values(left @ torch.linalg.qr(value.mT, mode="r").R.mT))
        return torch.cat(found).sort(descending=True).values

    def entropy(self, k: int) -> float:
        """Von Neumann entropy of bond k, in nats."""
        return von_neumann(self.bond_spectrum(k))

    @property
    def output(self) -> parts.Part:
        """O' [d_model, heads r]."""
        _, kv_heads, _ = heads_of(self.spec)
        first, pivots = (kv_heads, kv_heads) if self.spec.gauge == "interpolative" else (1, 0)
        return parts.unpack((output_part(self.spec),), self.cores[first:], self.indices[pivots:])[0]

    def _value(self) -> Float[Tensor, "rows model"]:
        """V' [kv_heads r, d_model], written out."""
        if self.spec.gauge == "none":
            return self.cores[0]
        _, kv_heads, _ = heads_of(self.spec)
        stored = zip(self.indices[:kv_heads], self.cores[:kv_heads], strict=True)
        return torch.cat([write(pivots, rest).mT for pivots, rest in stored])


def output_part(spec: NetworkSpec) -> NetworkSpec:
    """The low-rank spec of O' [d_model, heads r]."""
    heads = spec.modes["heads"][0]
    return _output_part((spec.shape[1], heads * spec.ranks[0]), spec.ranks[1], spec.gauge)


@lru_cache(maxsize=1024)
def _output_part(shape: tuple[int, int], rank: int, gauge: str) -> NetworkSpec:
    return parts.specs((shape,), (rank,), gauge)[0]


def heads_of(spec: NetworkSpec) -> tuple[int, int, int]:
    """(query heads, key-value heads, d_head); raises UsageError for other members."""
    heads, kv_heads = spec.modes["heads"]
    (d_head,) = spec.modes["d_head"]
    model = spec.shape[1]
    expected = ((kv_heads * d_head, model), (model, heads * d_head))
    if (
        tuple(map(tuple, spec.members)) != expected
        or heads % kv_heads
        or spec.shape[0] != kv_heads * d_head + model
    ):
        raise UsageError(
            "the members are not the value and output matrices of these heads",
            where=spec.format,
            expected=expected,
            found=spec.members,
        )
    return heads, kv_heads, d_head
