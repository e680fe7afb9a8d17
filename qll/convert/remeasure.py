"""Errors of matrices after training: what the records of the closed forms no longer say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from qll.calibrate import MomentStore
from qll.convert.assemble import block_tensors
from qll.convert.digits import significant
from qll.convert.fit import comparable_members, relative_errors
from qll.convert.plan import Plan, PlanEntry
from qll.convert.quantise import packing_of, unpacked_tensors
from qll.convert.units import tensor_path
from qll.convert.weights import metrics_of, read_weights
from qll.load import Source
from qll.options import ConvertOptions
from qll.tn import build


def measured_again(
    source: Source,
    moments: MomentStore | None,
    plan: Plan,
    options: ConvertOptions,
    cores: Path,
    trained: Path,
    records: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """`records` with rel_error and metric_error of the trained tensors, as they will be stored.

    discarded_weight stays: it belongs to the cut, not to what training made of it.
    """
    found: dict[str, tuple[float, float]] = {}
    for block in range(source.config.num_hidden_layers):
        stored = block_tensors(
            source, plan, options, cores, block, trained, as_float=not options.is_packed
        )
        for entry in plan.of_block(block):
            members = entry.unit.members
            packing = packing_of(entry, options)
            tensors = unpacked_tensors(entry, stored, packing) if packing else stored
            weights = read_weights(source, members, options)
            metrics = metrics_of(source, moments, members, options)
            matrices = stored_matrices(entry, tensors, weights)
            for item in zip(members, weights, matrices, metrics, strict=True):
                plain, weighted = relative_errors(*item[1:])
                found[item[0]] = (significant(plain), significant(weighted))
    names = ("rel_error", "metric_error")
    return [
        record | dict(zip(names, found[record["name"]], strict=True))
        if record["name"] in found
        else record
        for record in records
    ]


def stored_matrices(
    entry: PlanEntry, tensors: dict[str, Tensor], weights: Sequence[Float[Tensor, "_ _"]]
) -> list[Float[Tensor, "_ _"]]:
    """The matrix each member of `entry` stands for, comparable with its dense `weights`."""
    members = entry.unit.members
    if entry.spec is None:
        return [tensors[f"{member}.weight"] for member in members]
    path = tensor_path(members)
    parts: dict[str, list[Tensor]] = {"cores": [], "indices": []}
    for kind, values in parts.items():
        while (name := f"{path}.{kind}.{len(values)}") in tensors:
            values.append(tensors[name])
    network = build(entry.spec, tuple(parts["cores"]), tuple(parts["indices"]))
    return comparable_members(network, weights)
