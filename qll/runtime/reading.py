"""From the modules of a transformers block to the forms in which its matrices can run.

What a format drops for good is dropped here for the arithmetic too: attention runs over the rotary
pairs and value channels that are left (`qll.tn.joint_query_key`, `joint_value_output`), an MLP over
its channels. Rows of query and key are brought into the order in which the two numbers of a rotary
pair are neighbours, and the order of MLP channels is that of gate's pivots; both are free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from qll.model.groups import TNGroup, TNMember
from qll.model.layers import TNTiedHead
from qll.model.packed import PackedLinear
from qll.runtime.forms import (
    Coded,
    Contracted,
    Factors,
    Form,
    Pivoted,
    Whole,
    forms_of,
    forms_of_part,
    matrix_of,
)
from qll.runtime.kernels import coded_kernel, coded_kernels
from qll.tn import JOINTS, JointChannels, JointNetwork, JointQueryKey, JointTree, JointValueOutput
from qll.tn.gauge import row_order, write
from qll.tn.lowrank import LowRank
from qll.tn.network import MatrixNetwork
from qll.tn.packed import unpack

Candidates = list[Form]


@dataclass(frozen=True)
class BlockForms:
    """Candidates for every matrix of a block, and the sizes of its attention."""

    query_key_value: list[Candidates]
    output: Candidates
    gate_up: list[Candidates]
    down: Candidates
    pairs: Int[Tensor, "kv_heads pairs"] | None
    """Rotary pairs of every key-value head; None: all, in order."""
    d_key: int
    """Length of a query or key vector of one head."""
    d_value: int
    """Length of a value vector of one head."""


def read_block(block: LlamaDecoderLayer) -> BlockForms:
    """The candidates for the matrices of one block, the dense matrix last in each list."""
    attention, mlp = block.self_attn, block.mlp
    d_head = attention.head_dim
    pairs, d_key, d_value = None, d_head, d_head
    query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
    if network := _joint(query, JointQueryKey):
        pairs, d_key = torch.stack(network.indices).long(), 2 * network.spec.ranks[0]
    if network := _joint(value, JointValueOutput):
        d_value = network.spec.ranks[0]
    reading = _members([query, key, value])
    orders = [_neighbours(_length(module, d_head), d_key, d_head) for module in (query, key)]
    kv_heads = _length(value, d_head) // d_head
    orders.append(torch.arange(kv_heads * d_value))
    orders = _blocks(reading, orders)
    gate_up, down = _members([mlp.gate_proj, mlp.up_proj]), _members([mlp.down_proj])[0]
    gate_up, down = _share_order(gate_up, down)
    return BlockForms(
        [_permuted(forms, rows) for forms, rows in zip(reading, orders, strict=True)],
        _members([attention.o_proj])[0],
        gate_up,
        down,
        pairs,
        d_key,
        d_value,
    )


def read_matrix(module: nn.Module) -> Candidates:
    """The candidates for one matrix that shares nothing, or whose group is another's."""
    if isinstance(module, TNMember):
        return _member(module)
    if isinstance(module, TNTiedHead):
        module = module.embedding
    if not hasattr(module, "network"):
        whole = Whole(module.weight.detach())
        return [*_coded(module), whole] if isinstance(module, PackedLinear) else [whole]
    network = module.network()
    if isinstance(network, LowRank):
        return forms_of(network)
    shape, size = tuple(network.spec.shape), _bytes(network)
    own = Contracted(network.apply, shape, network.flops(1), size)
    return [own, Whole(matrix_of(network))]


def _coded(module: PackedLinear) -> Candidates:
    """The codes as they are, where there is a kernel that reads them."""
    kernel = coded_kernel(module.packing, module.shape)
    if kernel not in coded_kernels(module.scales.dtype, module.scales.device):
        return []
    codes = unpack(module.packed, module.packing.bits, *module.shape)
    return [Coded(codes, module.scales, module.packing.group, kernel)]


def _members(modules: list[nn.Module]) -> list[Candidates]:
    """Candidates for modules that read the same x; members of one tree or Tucker are one."""
    found: list[Candidates] = []
    done: set[TNGroup] = set()
    for module in modules:
        group = getattr(module, "group", None)
        if group is None or not _shares(group, module.member):
            found.append(read_matrix(module))
        elif group not in done:
            done.add(group)
            found.append(_sharing(group.network(), module.readers))
    return found


def _shares(group: TNGroup, member: int) -> bool:
    return JOINTS[group.spec.format].readers(group.spec)[member] > 1


def _sharing(network: JointNetwork, readers: int) -> Candidates:
    """The first `readers` members as one matrix, one below another."""
    whole = Whole(torch.cat([matrix_of(network, member) for member in range(readers)]))
    if isinstance(network, JointTree) and _is_star(network):
        basis, rest, *_ = network.cores
        if network.spec.gauge == "none":
            return [Factors(torch.cat(network.cores[1:]), basis), whole]
        order = row_order(network.indices[0], whole.shape[0])
        written = Factors(write(network.indices[0], rest), basis)
        return [Pivoted(rest, basis, order), written, whole]

    def apply(x: Tensor) -> Tensor:
        shared = network.project(x)
        return torch.cat([network.apply(x, member, shared) for member in range(readers)], -1)

    return [Contracted(apply, whole.shape, network.flops(1), _bytes(network)), whole]


def _is_star(network: JointTree) -> bool:
    shared, *own = network.spec.ranks
    outs = (out for out, _ in network.spec.members)
    return all(rank >= min(out, shared) for rank, out in zip(own, outs, strict=True))


def _member(module: TNMember) -> Candidates:
    """The candidates for a member of a group that shares no product with its neighbours."""
    network, member = module.group.network(), module.member
    if isinstance(network, JointQueryKey):
        return [Whole(network.cores[member])]
    if isinstance(network, JointChannels):
        return forms_of_part(network.reduced[member])
    if isinstance(network, JointValueOutput):
        if member == 1:
            return forms_of_part(network.output)
        full = matrix_of(network, 0).unflatten(0, (network.spec.modes["heads"][1], -1))
        return [Whole(full[:, : network.spec.ranks[0]].flatten(0, 1))]
    shape = network.applied_shape(member)
    size = _bytes(network)
    own = Contracted(lambda x: network.apply(x, member), shape, network.flops(1), size)
    return [own, Whole(matrix_of(network, member))]


def _bytes(network: JointNetwork | MatrixNetwork) -> int:
    return sum(core.numel() * core.element_size() for core in network.cores)


def _joint(module: nn.Module, kind: type) -> JointNetwork | None:
    if not isinstance(module, TNMember) or module.group.spec.format != kind.name:
        return None
    return module.group.network()


def _length(module: nn.Module, d_head: int) -> int:
    """Rows of the dense matrix in the place of `module`."""
    if isinstance(module, TNMember):
        return module.group.spec.members[module.member][0]
    return module.out_features


def _neighbours(rows: int, d_key: int, d_head: int) -> Int[Tensor, " rows"]:
    """The order that puts rotary pairs (i, i + half) of every head side by side.

    >>> _neighbours(4, 4, 4).tolist()
    [0, 2, 1, 3]
    """
    heads = rows // d_head
    places = torch.arange(heads * d_key).reshape(heads, 2, d_key // 2)
    return places.transpose(1, 2).flatten()


def _blocks(reading: list[Candidates], orders: list[Tensor]) -> list[Tensor]:
    """The row orders of query, key and value as those of the matrices that hold them."""
    orders, found = list(orders), []
    for forms in reading:
        order = orders.pop(0)
        while len(order) < forms[0].shape[0]:
            order = torch.cat([order, orders.pop(0) + len(order)])
        found.append(order)
    return found


def _share_order(
    gate_up: list[Candidates], down: Candidates
) -> tuple[list[Candidates], Candidates]:
    """MLP channels in the order of gate's pivots, so that only up is reordered, if anything."""
    first = gate_up[0][0]
    movable = all(not isinstance(form, Contracted) for form in (*gate_up[-1], *down))
    if len(gate_up) != 2 or not isinstance(first, Pivoted) or not movable:
        return gate_up, down
    order = first.stored_rows()
    moved = [[form.permuted(order, None) for form in forms] for forms in gate_up]
    return moved, [form.permuted(None, order) for form in down]


def _permuted(forms: Candidates, rows: Tensor) -> Candidates:
    if torch.equal(rows, torch.arange(len(rows))):
        return forms
    return [form.permuted(rows.to(_device(form)), None) for form in forms]


def _device(form: Form) -> torch.device:
    if isinstance(form, Contracted):
        return torch.device("cpu")
    if isinstance(form, Coded):
        return form.codes.device
    return (form.matrix if isinstance(form, Whole) else form.right).device
