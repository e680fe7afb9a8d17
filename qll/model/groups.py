"""Matrices that share a bond: the cores live in one TNGroup, the members point at it.

    model.layers.0.self_attn.qkv       TNGroup   all cores
    model.layers.0.self_attn.q_proj    TNMember  no parameters; asks the group

q, k and v see the same input, one after the other. The part of the work that they share is done
by the first and remembered for the others, as long as it is the very same tensor object, unchanged.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qll.model.layers import NetworkModule
from qll.tn.network import NetworkSpec
from qll.tn.packed import Packing

# Members of a group, by their last names -> the name of the group's module beside them.
GROUP_NAMES = {
    ("q_proj", "k_proj", "v_proj"): "qkv",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "qkvo",
    ("q_proj", "k_proj"): "query_key",
    ("v_proj", "o_proj"): "value_output",
    ("gate_proj", "up_proj"): "gate_up",
    ("gate_proj", "up_proj", "down_proj"): "gate_up_down",
}


def group_path(members: Sequence[str]) -> str:
    """Module path of the group of `members`; raises KeyError for a group we do not know.

    >>> group_path(["model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj"])
    'model.layers.3.mlp.gate_up'
    """
    parents = {path.rpartition(".")[0] for path in members}
    if len(parents) != 1:
        raise KeyError(tuple(members))
    return f"{parents.pop()}.{GROUP_NAMES[tuple(path.rpartition('.')[2] for path in members)]}"


class TNGroup(NetworkModule):
    """All cores of a joint network; `forward(x, member)` is W_member x."""

    def __init__(
        self,
        spec: NetworkSpec,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        packing: Packing | None = None,
    ) -> None:
        super().__init__(spec, dtype=dtype, device=device, packing=packing)
        self._memo: _Shared | None = None

    def forward(
        self, x: Float[Tensor, "*batch into"], member: int, readers: int = 1
    ) -> Float[Tensor, "*batch out"]:
        """W_member x; `readers` counts the members, this one too, that will be asked for this x."""
        network = self.network()
        if readers == 1 or torch.compiler.is_compiling() or x.is_inference():
            return network.apply(x, member)
        return network.apply(x, member, shared=self._projection(network, x, member, readers))

    def _projection(self, network: Any, x: Tensor, member: int, readers: int) -> Tensor:
        """The shared part for x: remembered, or computed when x is new or `member` asks again.

        Each member may use a remembered value once. So it never outlives a forward pass: not past
        an optimiser step, nor past the backward pass that frees its graph.
        """
        memo, state = self._memo, self._state(x)
        if memo is None or memo.x() is not x or memo.state != state or member in memo.used:
            memo = _Shared(weakref.ref(x), state, network.project(x), frozenset())
        used = memo.used | {member}
        done = len(used) == readers
        self._memo = None if done else _Shared(memo.x, state, memo.value, used)
        return memo.value

    def _state(self, x: Tensor) -> tuple[Any, ...]:
        """What must not have changed for a remembered value to be right."""
        cores = (*self.cores.parameters(), *self.cores.buffers())
        versions = tuple(None if core.is_inference() else core._version for core in cores)
        autocast = torch.is_autocast_enabled(x.device.type)
        return (x._version, versions, torch.is_grad_enabled(), autocast)

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles: without anything remembered."""
        return self.__dict__ | {"_memo": None}


class TNMember(nn.Module):
    """One matrix of a group, in the place of its Linear; has no parameters of its own."""

    def __init__(self, group: TNGroup, member: int, readers: int) -> None:
        super().__init__()
        # past nn.Module's registration: the cores belong to the group alone
        self.__dict__["group"] = group
        self.member, self.readers = member, readers

    @property
    def out_features(self) -> int:
        """Length of what `forward` returns: fewer than rows of `weight` for dropped channels."""
        return self.group.network().applied_shape(self.member)[0]

    @property
    def in_features(self) -> int:
        """Length of what `forward` takes."""
        return self.group.network().applied_shape(self.member)[1]

    @property
    def bias(self) -> None:
        """None: matrices with a bias are never converted."""
        return None

    @property
    def weight(self) -> Float[Tensor, "out into"]:
        """The matrix as in a dense model, rebuilt on every read; zeros at dropped channels."""
        return self.group.network().to_matrix(self.member)

    def forward(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        """W x for every vector x."""
        return self.group(x, self.member, self.readers)

    def extra_repr(self) -> str:
        """The member's place in its group."""
        return f"member {self.member} of {len(self.group.spec.members)}"


@dataclass(frozen=True)
class _Shared:
    """A remembered projection: of which x, in which state, and who has used it."""

    x: weakref.ref
    state: tuple[Any, ...]
    value: Tensor
    used: frozenset[int]
