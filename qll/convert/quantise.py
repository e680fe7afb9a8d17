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
from qll.convert.jobs import Executor, InOrder
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
    """What is packed, by module path: every block linear, networks and dense alike."""
    found = {}
    for entry in (entry for entry in plan.entries if entry.unit.block is not None):
        members, packing = entry.unit.members, packing_of(entry, options)
        if packing is not None:
            paths = members if entry.spec is None else [tensor_path(members)]
            found |= dict.fromkeys(paths, packing)
    return found


def packing_of(entry: PlanEntry, options: ConvertOptions) -> Packing | None:
    """How a block linear is packed: at the width of its entry, else at that of --bits.

    >>> from qll.convert.units import Unit
    >>> entry = PlanEntry(Unit(("w",), ((2, 32),)), None, 0.0, bits=3)
    >>> packing_of(entry, ConvertOptions(bits_per_weight=3.5)), packing_of(entry, ConvertOptions())
    (Packing(bits=3, group=32), None)
    """
    bits = (entry.bits or options.bits) if options.is_packed else 0
    return Packing(bits, options.bits_group) if bits else None


def quantise_units(
    source: Source,
    moments: MomentStore | None,
    plan: Plan,
    options: ConvertOptions,
    work: Path,
    trained: Path | None,
    events: Path,
    records: Sequence[Mapping[str, Any]],
    executor: Executor | None = None,
) -> list[dict[str, Any]]:
    """Pack every block linear in `work`; returns `records` with the errors of what is stored.

    Does nothing without --bits or --bits_per_weight. A packed matrix also gets `bits` and `bytes`.
    Without an `executor` one after the other.
    """
    if not options.is_packed:
        return [dict(record) for record in records]
    executor = executor or InOrder(source, moments, options)
    known = {line["unit"]: line for line in store.read_lines(work / JOURNAL)}
    entries = [entry for entry in plan.entries if entry.unit.block is not None]
    lines, waiting = [], []
    for entry in entries:
        if _is_done(known, entry, packing_of(entry, options), work, trained):
            lines.append(known[entry.unit.name])
        else:
            waiting.append(entry)
    packed = executor.run(pack_unit, waiting, work, trained)
    bar = tqdm(
        packed,
        "pack",
        total=len(entries),
        initial=len(lines),
        unit="unit",
        file=sys.stderr,
        disable=None,
    )
    for line, seconds in bar:
        bar.set_postfix_str(line["unit"].removeprefix("model."))
        store.append_line(work / JOURNAL, line)
        for matrix in line["matrices"]:
            store.append_line(events, {"event": "packed", **matrix, "seconds": seconds})
        lines.append(line)
    changed = {matrix["name"]: matrix for line in lines for matrix in line["matrices"]}
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


def pack_unit(
    source: Source,
    moments: MomentStore | None,
    options: ConvertOptions,
    entry: PlanEntry,
    work: Path,
    trained: Path | None,
) -> tuple[dict[str, Any], float]:
    """Write the packed file of one unit; returns its journal line and the seconds it took. A step
    for an executor."""
    started, path = time.monotonic(), unit_path(work, entry, packed=True)
    tensors = unit_tensors(work, trained, entry)
    members, packing = entry.unit.members, packing_of(entry, options)
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
    line = {"unit": entry.unit.name, "sha256": store.sha256(path), "matrices": found}
    line |= {"made_from": _sha256(tensors), **packing.to_json()}
    return line, round(time.monotonic() - started, 3)


def _sha256(tensors: Tensors) -> str:
    """Of names, shapes and numbers."""
    return hashlib.sha256(save(dict(sorted(tensors.items())))).hexdigest()


def _is_done(
    known: Mapping[str, Mapping[str, Any]],
    entry: PlanEntry,
    packing: Packing,
    work: Path,
    trained: Path | None,
) -> bool:
    """Whether the journal has a line of these cores and this packing, and the file is its own."""
    line, path = known.get(entry.unit.name), unit_path(work, entry, packed=True)
    if line is None or not path.is_file():
        return False
    made_from = _sha256(unit_tensors(work, trained, entry))
    same = (line["made_from"], line["bits"], line["group"])
    return same == (made_from, packing.bits, packing.group) and (
        store.sha256(path) == line["sha256"]
    )


def _named(name: str, rounded: Rounded, packing: Packing) -> Tensors:
    codes = pack(rounded.codes, packing.bits)
    return {f"{name}.packed": codes, f"{name}.scales": rounded.scales}
