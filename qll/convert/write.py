"""The conversion loop: matrix by matrix, each written when it is done, resumable after kill -9.

Every unit leaves `work/cores/<unit>.safetensors` and one journal line; a resumed run skips what the
journal lists. `assemble` then makes the checkpoint of them.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qll import store
from qll.calibrate import MomentStore
from qll.convert.digits import significant
from qll.convert.fit import fit
from qll.convert.jobs import Executor, InOrder
from qll.convert.plan import Plan, PlanEntry
from qll.convert.units import tensor_path
from qll.convert.weights import metrics_of, read_weights
from qll.load import ReadAhead, Source
from qll.model import gain_of
from qll.options import ConvertOptions

JOURNAL = "journal.jsonl"
INDEX_DTYPE = torch.int32


def convert_units(
    source: Source,
    moments: MomentStore | None,
    plan: Plan,
    options: ConvertOptions,
    work: Path,
    events: Path,
    executor: Executor | None = None,
) -> list[dict[str, Any]]:
    """Fit and write every entry of `plan` into `work`; returns the per-matrix records in order.

    A record has the keys of report.json's compression.per_matrix. Entries that the journal already
    lists with the right bytes are not computed again. Without an `executor` one after the other.
    """
    store.make_folder(work)
    executor = executor or InOrder(source, moments, options, _expect)
    known = {line["unit"]: line for line in store.read_lines(work / JOURNAL)}
    done = {e.unit.name: known[e.unit.name] for e in plan.entries if _is_done(known, e, work)}
    waiting = [entry for entry in plan.entries if entry.unit.name not in done]
    with tqdm(
        total=len(plan.entries),
        initial=len(done),
        desc="convert",
        unit="unit",
        file=sys.stderr,
        disable=None,
    ) as bar:
        for line, seconds in executor.run(convert_unit, waiting, work):
            store.append_line(work / JOURNAL, line)
            for matrix in line["matrices"]:
                store.append_line(events, {"event": "converted", **matrix, "seconds": seconds})
            done[line["unit"]] = line
            bar.update()
            bar.set_postfix_str(line["unit"].removeprefix("model."))
    return [matrix for entry in plan.entries for matrix in done[entry.unit.name]["matrices"]]


def convert_unit(
    source: Source,
    moments: MomentStore | None,
    options: ConvertOptions,
    entry: PlanEntry,
    work: Path,
) -> tuple[dict[str, Any], float]:
    """Write the file of one entry into `work`; returns its journal line, and the seconds it took.

    A step for an executor: it touches nothing but its own file.
    """
    started, path = time.monotonic(), work / f"{entry.unit.name}.safetensors"
    tensors, matrices = convert_entry(source, moments, entry, options)
    store.write_tensors(path, tensors)
    line = {
        "unit": entry.unit.name,
        "spec": entry.to_json()["spec"],
        "sha256": store.sha256(path),
        "matrices": matrices,
    }
    return line, round(time.monotonic() - started, 3)


def _expect(source: Source, entry: PlanEntry) -> None:
    """Let the matrices of an entry be read; tables of the vocabulary are not."""
    if isinstance(source, ReadAhead) and entry.unit.block is not None:
        source.expect([f"{member}.weight" for member in entry.unit.members])


def _is_done(known: dict[str, dict[str, Any]], entry: PlanEntry, work: Path) -> bool:
    """Whether the journal has a line of this very spec and the file has the bytes it says."""
    line, path = known.get(entry.unit.name), work / f"{entry.unit.name}.safetensors"
    if line is None or line["spec"] != entry.to_json()["spec"] or not path.is_file():
        return False
    return store.sha256(path) == line["sha256"]


def convert_entry(
    source: Source, moments: MomentStore | None, entry: PlanEntry, options: ConvertOptions
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The tensors to save for one entry, and one record per member matrix."""
    members = entry.unit.members
    if entry.spec is None:
        return _dense_tensors(source, members, options), [
            _record(entry, k, 0.0, 0.0, 0.0) for k in range(len(members))
        ]
    weights = read_weights(source, members, options)
    metrics = metrics_of(source, moments, members, options)
    dtype = saved_dtype(source, options)
    fitted = fit(weights, entry.spec, metrics, dtype, options.sweeps)
    path = tensor_path(members)
    tensors = {f"{path}.cores.{k}": core for k, core in enumerate(fitted.network.cores)}
    tensors |= {
        f"{path}.indices.{k}": index.to(INDEX_DTYPE)
        for k, index in enumerate(fitted.network.indices)
    }
    records = [
        _record(entry, k, fitted.rel_error[k], fitted.metric_error[k], fitted.discarded_weight)
        for k in range(len(members))
    ]
    return tensors, records


def saved_dtype(source: Source, options: ConvertOptions) -> torch.dtype:
    """The dtype of saved tensors: the one asked for, or that of the source's first linear."""
    if options.dtype == "auto":
        return source.specs()["model.layers.0.self_attn.q_proj.weight"].dtype
    return getattr(torch, options.dtype)


def _dense_tensors(
    source: Source, members: tuple[str, ...], options: ConvertOptions
) -> dict[str, Tensor]:
    """The weights as they are; float64 is only paid for where a gain is folded in."""
    kind = saved_dtype(source, options)
    tensors = {}
    for member in members:
        if options.norms == "fold" and gain_of(member, source.config) is not None:
            weight = read_weights(source, (member,), options)[0]
        else:
            weight = source.read(f"{member}.weight")
        tensors[f"{member}.weight"] = weight.to(kind)
    return tensors


def _record(
    entry: PlanEntry, k: int, rel_error: float, metric_error: float, discarded: float
) -> dict[str, Any]:
    """One row of compression.per_matrix; a group's parameters are shared out by dense size."""
    out, into = entry.unit.shapes[k]
    share = out * into / entry.unit.dense_params
    spec = entry.spec
    return {
        "name": entry.unit.members[k],
        "group": None if len(entry.unit.members) == 1 else tensor_path(entry.unit.members),
        "shape": [out, into],
        "format": "dense" if spec is None else spec.format,
        "gauge": "none" if spec is None else spec.gauge,
        "modes": {} if spec is None else {name: list(dims) for name, dims in spec.modes.items()},
        "ranks": [] if spec is None else list(spec.ranks),
        "params": round(entry.params * share),
        "params_dense": out * into,
        "rel_error": significant(rel_error),
        "metric_error": significant(metric_error),
        "discarded_weight": significant(discarded),
        "predicted_loss": significant(entry.loss * share),
    }
