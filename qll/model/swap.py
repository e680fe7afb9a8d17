"""Exchange the dense matrices of a Llama for tensor networks, and back.

An entry names its members (one path, or several that share a bond) and the spec of their network.
`insert_networks` puts modules of the recorded shapes in their places, so that a state dict of cores
can be loaded; `rebuild_dense` turns them into plain Linears again.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import LlamaForCausalLM

from qll.errors import ConfigError, ShapeError
from qll.load import expected_specs
from qll.model.groups import GROUP_NAMES, TNGroup, TNMember, group_path
from qll.model.layers import TNEmbedding, TNLinear, TNTiedHead
from qll.model.packed import PackedLinear, Packings, packed_shapes
from qll.tn import JOINTS, NETWORKS, build, require_valid, tensor_shapes
from qll.tn.network import NetworkSpec
from qll.tn.packed import Packing

if TYPE_CHECKING:
    from qll.model.llama_tn import LlamaTNConfig

Entries = Mapping[tuple[str, ...], NetworkSpec]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def stored_shapes(
    members: tuple[str, ...], spec: NetworkSpec, packing: Packing | None = None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that an entry stores in a converted folder, in order.

    `<path>.cores.<i>` are floating point, `<path>.indices.<i>` int32; the path of a group of
    members is `entry_path`. With a packing each core is `<path>.cores.<i>.packed` (uint8) and
    `<path>.cores.<i>.scales` (bfloat16).

    >>> stored_shapes(("lm_head",), NetworkSpec("lowrank", (6, 4), (2,)))
    {'lm_head.cores.0': (6, 2), 'lm_head.cores.1': (2, 4)}
    """
    path, shapes = entry_path(members), tensor_shapes(spec)
    named: dict[str, tuple[int, ...]] = {}
    for i, shape in enumerate(shapes.cores):
        name = f"{path}.cores.{i}"
        named |= {name: shape} if packing is None else packed_shapes(name, shape, packing)
    return named | {f"{path}.indices.{i}": shape for i, shape in enumerate(shapes.indices)}


def entry_path(members: tuple[str, ...]) -> str:
    """Module path that holds what an entry stores: the matrix itself, or the group's module.

    >>> entry_path(("lm_head",))
    'lm_head'
    """
    return members[0] if len(members) == 1 else group_path(members)


def packed_numbers(config: LlamaTNConfig) -> dict[str, int]:
    """How many numbers each `.packed` tensor of a converted folder stands for; 0 for `.scales`."""
    entries = {entry_path(members): spec for members, spec in config.entries.items()}
    dense = expected_specs(config)
    found = {}
    for path in config.packings:
        if path in entries:
            cores = enumerate(tensor_shapes(entries[path]).cores)
            shapes = {f"{path}.cores.{i}": shape for i, shape in cores}
        else:
            shapes = {path: dense[f"{path}.weight"]}
        for name, shape in shapes.items():
            found |= {f"{name}.packed": prod(shape), f"{name}.scales": 0}
    return found


def insert_networks(
    model: LlamaForCausalLM, entries: Entries, packings: Packings | None = None
) -> None:
    """Replace the matrices of `entries` in `model` by network modules, cores not yet loaded.

    `packings` says which of them are packed, by `entry_path`; any other path in it is a dense
    matrix, which becomes a PackedLinear. A network in place of a tied embedding also serves as the
    output head. Raises ConfigError for an entry that names no matrix of this model, ShapeError for
    one of another shape.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(config)
    >>> insert_networks(model, {("lm_head",): NetworkSpec("lowrank", (32, 8), (2,))})
    >>> type(model.lm_head).__name__
    'TNLinear'
    """
    packings = dict(packings or {})
    for members, spec in entries.items():
        _check_entry(model, members, spec)
    for members, spec in entries.items():
        like = model.get_submodule(members[0]).weight
        packing = packings.pop(entry_path(members), None)
        if len(members) > 1:
            _insert_group(model, members, spec, like, packing)
        elif members[0] == EMBEDDING:
            table = TNEmbedding(spec, dtype=like.dtype, device=like.device, packing=packing)
            model.set_submodule(EMBEDDING, table)
            if model.config.tie_word_embeddings:
                model.set_submodule(HEAD, TNTiedHead(table))
                _tie(model, {})
        else:
            linear = TNLinear(spec, dtype=like.dtype, device=like.device, packing=packing)
            model.set_submodule(members[0], linear)
    for path, packing in packings.items():
        _insert_packed(model, path, packing)


def rebuild_dense(model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    """Replace every network of `model` by the matrix it stands for, in `dtype`.

    Networks are contracted in float32 (or in their own dtype if that is wider).
    """
    modules = {name: m for name, m in model.named_modules() if isinstance(m, TN_MODULES)}
    for name, module in modules.items():
        if isinstance(module, TNTiedHead | TNGroup):
            continue
        model.set_submodule(name, _dense_module(module, dtype))
    for name, module in modules.items():
        if isinstance(module, TNGroup):
            parent, _, last = name.rpartition(".")
            delattr(model.get_submodule(parent), last)
    head = modules.get(HEAD)
    if isinstance(head, TNTiedHead):
        table = model.get_submodule(EMBEDDING)
        model.set_submodule(HEAD, _linear(table.weight))
        _tie(model, {f"{HEAD}.weight": f"{EMBEDDING}.weight"})
        model.tie_weights()


TN_MODULES = (TNLinear, TNEmbedding, TNTiedHead, TNGroup, TNMember, PackedLinear)


def _insert_packed(model: LlamaForCausalLM, path: str, packing: Packing) -> None:
    shape = _matrix_shape(model, path)
    if not isinstance(model.get_submodule(path), nn.Linear):
        raise ConfigError("only a Linear can be packed without a network", where=path)
    like = model.get_submodule(path).weight
    linear = PackedLinear(shape, packing, dtype=like.dtype, device=like.device)
    model.set_submodule(path, linear)


def _insert_group(
    model: LlamaForCausalLM,
    members: tuple[str, ...],
    spec: NetworkSpec,
    like: torch.Tensor,
    packing: Packing | None,
) -> None:
    path = group_path(members)
    group = TNGroup(spec, dtype=like.dtype, device=like.device, packing=packing)
    parent, _, last = path.rpartition(".")
    model.get_submodule(parent).add_module(last, group)
    for position, (member, readers) in enumerate(
        zip(members, JOINTS[spec.format].readers(spec), strict=True)
    ):
        model.set_submodule(member, TNMember(group, position, readers))


def _dense_module(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, PackedLinear):
        return _linear(module.weight.to(dtype))
    owner = module.group if isinstance(module, TNMember) else module
    with torch.no_grad():
        network = owner.network()
        wide = torch.promote_types(network.cores[0].dtype, torch.float32)
        cores = tuple(core.to(wide) for core in network.cores)
        network = build(network.spec, cores, network.indices)
        member = (module.member,) if isinstance(module, TNMember) else ()
        matrix = network.to_matrix(*member).to(dtype).contiguous()
    if isinstance(module, TNEmbedding):
        return nn.Embedding.from_pretrained(matrix, freeze=False)
    return _linear(matrix)


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    return linear


def _tie(model: LlamaForCausalLM, tied: dict[str, str]) -> None:
    """Tell transformers which parameters are one: with a network there is no parameter to tie."""
    model._tied_weights_keys = tied
    model.all_tied_weights_keys = dict(tied)


def _check_entry(model: LlamaForCausalLM, members: tuple[str, ...], spec: NetworkSpec) -> None:
    where = "|".join(members)
    last_names = tuple(path.rpartition(".")[2] for path in members)
    if len(members) > 1 and last_names not in GROUP_NAMES:
        raise ConfigError("no such group of matrices", where=where, expected=list(GROUP_NAMES))
    formats = NETWORKS if len(members) == 1 else JOINTS
    if spec.format not in formats:
        raise ConfigError(
            "unknown tensor network format",
            where=where,
            expected=", ".join(formats),
            found=spec.format,
            hint="the folder may come from a newer version",
        )
    require_valid(spec, where)
    shapes = tuple(_matrix_shape(model, path) for path in members)
    expected, found = (shapes, spec.members) if len(members) > 1 else (shapes[0], spec.shape)
    if expected != found:
        raise ShapeError(
            "network has another shape than the matrix it stands for",
            where=where,
            expected=expected,
            found=found,
        )


def _matrix_shape(model: LlamaForCausalLM, path: str) -> tuple[int, ...]:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ConfigError("the model has no such matrix", where=path) from None
    tied_head = path == HEAD and model.config.tie_word_embeddings
    if not isinstance(module, nn.Linear | nn.Embedding) or tied_head:
        raise ConfigError(
            "not a matrix that can be replaced by a network",
            where=path,
            found=f"{type(module).__name__}{' tied to the embedding' if tied_head else ''}",
        )
    if getattr(module, "bias", None) is not None:
        raise ConfigError("a matrix with a bias cannot be replaced", where=path)
    return tuple(module.weight.shape)
