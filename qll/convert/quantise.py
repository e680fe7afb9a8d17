"""The last step before the shards: finished float cores -> packed integers, unit by unit.

Reads the cores of the work folder, or what training made of them, and leaves
`<unit>.packed.safetensors` and a journal line beside it; a resumed run computes only what is not
there or was made from other cores. A unit outside the blocks (embedding, head) stays as it is.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from qll import store
from qll.calibrate import MomentStore
from qll.convert.alternate import round_matrix, round_network
from qll.convert.digits import significant
from qll.convert.fit import comparable_members, relative_errors
from qll.convert.metric import Metric
from qll.convert.plan import Plan, PlanEntry
from qll.convert.stored import unit_path, unit_tensors
from qll.convert.units import tensor_path
from qll.convert.weights import metrics_of, read_weights
from qll.load import Source
from qll.options import ConvertOptions
from qll.tn import build, tensor_shapes
from qll.tn.packed import Packing, dequantise, pack
from qll.tn.rounding import Rounded

JOURNAL = "packed.jsonl"
Tensors = dict[str, Shaped[Tensor, "..."]]


def packings_of(plan: Plan, options: ConvertOptions) -> dict[str, Packing]:
    """What `options.bits` packs, by module path: every block linear, networks and dense alike."""
    if not options.bits:
        return {}
    paths = []
    for entry in (entry for entry in plan.entries if entry.unit.block is not None):
        members = entry.unit.members
        paths += members if entry.spec is None else [tensor_path(members)]
    return dict.fromkeys(paths, Packing(options.bits, options.bits_group))


def quantise_units(
    source: Source,
    moments: MomentStore | None,
    plan: Plan,
    options: ConvertOptions,
    work: Path,
    trained: Path | None,
    events: Path,
    records: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Pack every block linear in `work`; returns `records` with the errors of what is stored.

    Does nothing when options.bits is 0. A packed matrix also gets `bits` and `bytes`.
    """
    if not options.bits:
        return [dict(record) for record in records]
    done = {line["unit"]: line for line in store.read_lines(work / JOURNAL)}
    changed: dict[str, dict[str, Any]] = {}
    packing = Packing(options.bits, options.bits_group)
    entries = [entry for entry in plan.entries if entry.unit.block is not None]
    bar = tqdm(entries, f"{options.bits} bits", unit="unit", file=sys.stderr, disable=None)
    for entry in bar:
        bar.set_postfix_str(entry.unit.name.removeprefix("model."))
        path = unit_path(work, entry, packed=True)
        tensors = unit_tensors(work, trained, entry)
        made_from = _sha256(tensors)
        line = done.get(entry.unit.name)
        if line is None or not _is_done(line, made_from, packing, path):
            started = time.monotonic()
            line = _pack_unit(source, moments, entry, options, tensors, path)
            line |= {"made_from": made_from, **packing.to_json()}
            store.append_line(work / JOURNAL, line)
            seconds = round(time.monotonic() - started, 3)
            for matrix in line["matrices"]:
                store.append_line(events, {"event": "packed", **matrix, "seconds": seconds})
        changed |= {matrix["name"]: matrix for matrix in line["matrices"]}
    return [{**record, **changed.get(record["name"], {})} for record in records]


def quantise_tensors(
    entry: PlanEntry,
    tensors: Tensors,
    weights: Sequence[Shaped[Tensor, "_ _"]],
    metrics: Sequence[Metric],
    packing: Packing,
) -> tuple[Tensors, list[Shaped[Tensor, "_ _"]]]:
    """Packed tensors of `entry` from its float ones, and the dense members that they stand for,
    comparable with the dense `weights`.
    """
    if entry.spec is None:
        packed, members = {}, []
        for member, metric in zip(entry.unit.members, metrics, strict=True):
            found = round_matrix(tensors[f"{member}.weight"], packing, metric)
            packed |= _named(member, found.rounded, packing)
            members.append(found.matrix)
        return packed, members
    path = tensor_path(entry.unit.members)
    shapes = tensor_shapes(entry.spec)
    cores = [tensors[f"{path}.cores.{k}"] for k in range(len(shapes.cores))]
    names = [f"{path}.indices.{k}" for k in range(len(shapes.indices))]
    network = build(entry.spec, cores, [tensors[name] for name in names])
    found = round_network(network, packing, metrics)
    packed = {name: tensors[name] for name in names}
    for k, rounded in enumerate(found.rounded):
        packed |= _named(f"{path}.cores.{k}", rounded, packing)
    return packed, comparable_members(found.network, weights)


def unpacked_tensors(entry: PlanEntry, tensors: Tensors, packing: Packing) -> Tensors:
    """The float tensors of `entry` that packed ones stand for; the inverse of quantise_tensors."""
    found = {}
    shapes = zip(entry.unit.members, entry.unit.shapes, strict=True)
    if entry.spec is None:
        named = {f"{member}.weight": (member, shape) for member, shape in shapes}
    else:
        path, cores = tensor_path(entry.unit.members), tensor_shapes(entry.spec).cores
        named = {f"{path}.cores.{k}": (f"{path}.cores.{k}", s) for k, s in enumerate(cores)}
        found = {name: t for name, t in tensors.items() if name.startswith(f"{path}.indices.")}
    for name, (stored, shape) in named.items():
        parts = tensors[f"{stored}.packed"], tensors[f"{stored}.scales"].float()
        found[name] = dequantise(*parts, shape, packing)
    return found


def _pack_unit(
    source: Source,
    moments: MomentStore | None,
    entry: PlanEntry,
    options: ConvertOptions,
    tensors: Tensors,
    path: Path,
) -> dict[str, Any]:
    """Write the packed file of one unit; returns its journal line but for what it was made from."""
    members, packing = entry.unit.members, Packing(options.bits, options.bits_group)
    metrics = metrics_of(source, moments, members, options)
    weights = read_weights(source, members, options)
    packed, matrices = quantise_tensors(entry, tensors, weights, metrics, packing)
    store.write_tensors(path, packed)
    size = sum(tensor.nbytes for tensor in packed.values())
    found = []
    for k, weight in enumerate(weights):
        errors = [significant(e) for e in relative_errors(weight, matrices[k], metrics[k])]
        share = weight.numel() / entry.unit.dense_params
        facts = {"name": members[k], "rel_error": errors[0], "metric_error": errors[1]}
        found.append(facts | {"bits": packing.bits, "bytes": round(size * share)})
    return {"unit": entry.unit.name, "sha256": store.sha256(path), "matrices": found}


def _sha256(tensors: Tensors) -> str:
    """Of names, shapes and numbers."""
    return hashlib.sha256(save(dict(sorted(tensors.items())))).hexdigest()


def _is_done(line: Mapping[str, Any], made_from: str, packing: Packing, path: Path) -> bool:
    """Whether the journal's line is of these cores and this packing, and the file is its own."""
    same = (line["made_from"], line["bits"], line["group"])
    if same != (made_from, packing.bits, packing.group) or not path.is_file():
        return False
    return store.sha256(path) == line["sha256"]


def _named(name: str, rounded: Rounded, packing: Packing) -> Tensors:
    codes = pack(rounded.codes, packing.bits)
    return {f"{name}.packed": codes, f"{name}.scales": rounded.scales}
