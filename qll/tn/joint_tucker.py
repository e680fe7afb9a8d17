"""Query, key, value and output matrices of one attention layer as one Tucker tensor over heads.

Each member is a stack of heads [h_j, d_head, d_model]; the output matrix, which reads heads and
writes the model, enters transposed. Stacked along heads (grouped-query attention: fewer key and
value heads) they are one tensor with a core and three factors that all members share:

    W_j[h, c, i] = sum G[a, b, m] H_j[h, a] D[c, b] M[i, m]      H = the H_j, one below another

(Gu et al., "TensorLLM", 2025, without its repetition of key and value heads.) modes {"heads":
(9, 3, 3, 9), "d_head": (64,), "d_model": (576,)}; members in the order query, key, value and, if
there is a fourth, output. ranks (r_heads, r_d_head, r_d_model). Stored as `qll.tn.tucker` stores
the stack: cores G, H, D, M, or G and the three coefficient blocks with pivots.

>>> modes = {"heads": (2, 1, 1, 2), "d_head": (3,), "d_model": (6,)}
>>> spec = NetworkSpec("joint_tucker", (18, 6), (6, 3, 6), modes,
...                    members=((6, 6), (3, 6), (3, 6), (6, 6)))
>>> output = torch.arange(36.0).reshape(6, 6)
>>> matrices = [torch.eye(6), torch.ones(3, 6), torch.zeros(3, 6), output]
>>> network = JointTucker.decompose(matrices, spec).interpolate()
>>> bool(torch.allclose(network.to_matrix(3), output, atol=1e-4)), network.num_floats
(True, 108)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from qll.errors import ShapeError, UsageError
from qll.tn.contract import contract
from qll.tn.legs import lookup, onto_bond, onto_leg
from qll.tn.network import NetworkSpec, TensorShapes
from qll.tn.tucker import SWEEPS, Tucker

_OUTPUT = 3  # the member that reads heads and writes the model


@dataclass(frozen=True)
class JointTucker:
    """Heads of several attention matrices around one core; bonds heads, d_head, d_model."""

    spec: NetworkSpec
    cores: tuple[Tensor, ...]
    indices: tuple[Tensor, ...] = ()
    name: ClassVar[str] = "joint_tucker"

    @classmethod
    def tensor_shapes(cls, spec: NetworkSpec) -> TensorShapes:
        """Shapes stored for `spec` in its gauge; raises UsageError for a spec that cannot be."""
        return Tucker.tensor_shapes(_stacked(spec))

    @classmethod
    def max_ranks(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """Ranks at which any matrices of these shapes are represented exactly."""
        return Tucker.max_ranks(_stacked(spec))

    @classmethod
    def clamp(cls, spec: NetworkSpec) -> NetworkSpec:
        """Lower each rank to its leg's size and to the product of the other ranks, at least 1."""
        return spec.with_ranks(Tucker.clamp(_stacked(spec)).ranks)

    @classmethod
    def cut_spectra(
        cls, matrices: Sequence[Float[Tensor, "_ _"]], spec: NetworkSpec
    ) -> list[Float64[Tensor, "_"]]:
        """Singular values of the stack's unfoldings over heads, d_head and d_model."""
        return Tucker.cut_spectra(_stack(matrices, spec), _stacked(spec))

    @classmethod
    def decompose(
        cls,
        matrices: Sequence[Float[Tensor, "_ _"]],
        spec: NetworkSpec,
        sweeps: int = SWEEPS,
    ) -> JointTucker:
        """Tucker of the stacked heads by HOSVD and HOOI sweeps, gauge "none", ranks clamped.

        Raises UsageError for heads that do not fit the members, ShapeError for other matrices.
        """
        stack = Tucker.decompose(_stack(matrices, spec), _stacked(spec), sweeps)
        return _joint(spec, stack)

    @property
    def num_params(self) -> int:
        """Numbers stored, pivot indices counted."""
        return self._tucker.num_params

    @property
    def num_floats(self) -> int:
        """Floating-point numbers stored."""
        return self._tucker.num_floats

    @property
    def members(self) -> int:
        """How many matrices share the core."""
        return len(self.spec.members)

    @classmethod
    def readers(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """How many members share `project(x)` with each, itself counted: query, key and value."""
        inputs = min(len(spec.members), _OUTPUT)
        return (*(inputs,) * inputs, *(1,) * (len(spec.members) - inputs))

    def applied_shape(self, member: int) -> tuple[int, int]:
        """(out, in) of what `apply` does."""
        return self.spec.members[member]

    def shares_input(self, member: int) -> bool:
        """Whether `project(x)` serves this member: true for query, key and value."""
        return member != _OUTPUT

    def transform_legs(
        self, out: Sequence[Tensor | None], into: Sequence[Tensor | None]
    ) -> JointTucker:
        """Legs of the stack: heads by out[0], d_head by out[1] (left), d_model by into[0] (right).

        So a query matrix becomes W into[0] and the output matrix into[0]^T W. Keeps the gauge.
        """
        return _joint(self.spec, self._tucker.transform_legs(out, into))

    def interpolate(self) -> JointTucker:
        """The same matrices in the interpolative gauge: sum r_k^2 numbers fewer."""
        return _joint(self.spec, self._tucker.interpolate())

    def expand(self) -> JointTucker:
        """The same matrices with gauge "none"."""
        return _joint(self.spec, self._tucker.expand())

    def project(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch shared"]:
        """What query, key and value share: G M^T x with d_head written out, [.., r_heads d_head].

        Member j only mixes r_heads into its own heads.
        """
        heads, channels, model = self.cores[0].shape
        bond = onto_bond(x, *self._factor(2)) @ self.cores[0].reshape(-1, model).mT
        return onto_leg(bond.unflatten(-1, (heads, channels)), *self._factor(1)).flatten(-2)

    def apply(
        self,
        x: Float[Tensor, "*batch into"],
        member: int,
        shared: Float[Tensor, "*batch shared"] | None = None,
    ) -> Float[Tensor, "*batch out"]:
        """W_member x; `shared` is `project(x)` if known already (no use to the output matrix).

        >>> modes = {"heads": (2, 1), "d_head": (2,), "d_model": (4,)}
        >>> spec = NetworkSpec("joint_tucker", (6, 4), (3, 2, 4), modes, members=((4, 4), (2, 4)))
        >>> network = JointTucker.decompose([torch.eye(4), torch.eye(4)[2:]], spec)
        >>> network.apply(torch.arange(4.0), 1).round().tolist()
        [2.0, 3.0]
        """
        if not self.shares_input(member):
            return self._apply_output(x)
        shared = self.project(x) if shared is None else shared
        ranked = shared.unflatten(-1, (self.cores[0].shape[0], self.spec.modes["d_head"][0]))
        return (self._heads(member) @ ranked).flatten(-2)

    def to_matrix(self, member: int) -> Float[Tensor, "out into"]:
        """W_member as a dense matrix."""
        core, _, channels, model = self.expand().cores
        stack = contract("abm,ha,cb,im->hci", core, self._heads(member), channels, model)
        matrix = stack.flatten(0, 1)
        return matrix if self.shares_input(member) else matrix.mT

    def rows(self, ids: Int[Tensor, "*batch"], member: int) -> Float[Tensor, "*batch into"]:
        """Rows `ids` of W_member; the matrix is not formed."""
        flat, core = ids.reshape(-1), self.cores[0]
        if self.shares_input(member):
            size = self.spec.modes["d_head"][0]
            heads = self._heads(member)[flat // size]
            channels = lookup(*self._factor(1), flat % size)
            bonds = contract("abm,ta,tb->tm", core, heads, channels, tokens="t")
            found = onto_leg(bonds, *self._factor(2))
        else:
            bonds = torch.tensordot(lookup(*self._factor(2), flat), core, dims=([1], [2]))
            found = (self._heads(member) @ onto_leg(bonds, *self._factor(1))).flatten(-2)
        return found.reshape(*ids.shape, self.spec.members[member][1])

    def flops(self, tokens: int) -> int:
        """Floating-point operations of applying every member to `tokens` vectors."""
        heads, channels, model = self.cores[0].shape
        own, size = self.spec.modes["heads"], self.spec.modes["d_head"][0]
        core = heads * channels * model
        leg = sum(factor.numel() for factor in self.cores[3:])
        inner = self.cores[2].numel()
        shared = leg + core + heads * inner + sum(own[:_OUTPUT]) * heads * size
        output = sum(h * (inner + heads * channels) + core + leg for h in own[_OUTPUT:])
        return 2 * tokens * (shared + output)

    def bond_spectrum(self, k: int) -> Float64[Tensor, "_"]:
        """Singular values of the stack over leg k: 0 heads, 1 d_head, 2 d_model."""
        return self._tucker.bond_spectrum(k)

    def entropy(self, k: int) -> float:
        """Von Neumann entropy between leg k and the others, in nats."""
        return self._tucker.entropy(k)

    def round(
        self, *, rtol: float | None = None, ranks: Sequence[int] | None = None
    ) -> JointTucker:
        """Truncate to `ranks`, or to a relative Frobenius error of at most `rtol`; same gauge."""
        return _joint(self.spec, self._tucker.round(rtol=rtol, ranks=ranks))

    @property
    def _tucker(self) -> Tucker:
        return Tucker(_stacked(self.spec), self.cores, self.indices)

    def _factor(self, leg: int) -> tuple[Tensor, Tensor | None]:
        """A factor as stored, with its pivots if it has some."""
        return self.cores[1 + leg], self.indices[leg] if self.indices else None

    def _heads(self, member: int) -> Float[Tensor, "heads rank"]:
        """H_j: the member's rows of the heads factor."""
        counts = self.spec.modes["heads"]
        start = sum(counts[:member])
        ids = torch.arange(start, start + counts[member], device=self.cores[1].device)
        return lookup(*self._factor(0), ids)

    def _apply_output(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        """The transposed path: heads and channels onto their bonds, the core, then the model."""
        size = self.spec.modes["d_head"][0]
        channels = onto_bond(x.unflatten(-1, (-1, size)), *self._factor(1))
        ranked = (self._heads(_OUTPUT).mT @ channels).flatten(-2)
        return onto_leg(ranked @ self.cores[0].flatten(0, 1), *self._factor(2))


def _joint(spec: NetworkSpec, stack: Tucker) -> JointTucker:
    changed = replace(spec, ranks=stack.spec.ranks, gauge=stack.spec.gauge)
    return JointTucker(changed, stack.cores, stack.indices)


def _stacked(spec: NetworkSpec) -> NetworkSpec:
    """The Tucker spec of the stack [heads, d_head, d_model] that the joint spec stands for."""
    sizes = [tuple(spec.modes.get(name, ())) for name in ("heads", "d_head", "d_model")]
    if tuple(map(len, sizes)) != (len(spec.members), 1, 1) or not 1 <= len(spec.members) <= 4:
        raise UsageError(
            "modes need a head count per member (query, key, value, output), d_head and d_model",
            where=spec.format,
            expected=f"{len(spec.members)} heads",
            found=dict(spec.modes),
        )
    heads, (channels,), (model,) = sizes
    expected = [(count * channels, model) for count in heads]
    expected[_OUTPUT:] = [shape[::-1] for shape in expected[_OUTPUT:]]
    total = sum(out for out, _ in expected)
    if tuple(expected) != tuple(map(tuple, spec.members)) or tuple(spec.shape) != (total, model):
        raise UsageError(
            "members are not what their heads multiply to",
            where=spec.format,
            expected=(*expected, (total, model)),
            found=(*spec.members, spec.shape),
        )
    legs = (sum(heads), channels, model)
    stack = {"stack": legs}
    return NetworkSpec("tucker", (legs[0] * channels, model), spec.ranks, stack, spec.gauge)


def _stack(matrices: Sequence[Tensor], spec: NetworkSpec) -> Float[Tensor, "rows model"]:
    found = tuple(tuple(matrix.shape) for matrix in matrices)
    if found != tuple(map(tuple, spec.members)):
        raise ShapeError(
            "matrices differ from the members of the spec",
            where=spec.format,
            expected=spec.members,
            found=found,
        )
    return torch.cat([m.mT if j == _OUTPUT else m for j, m in enumerate(matrices)])
