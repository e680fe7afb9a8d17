"""The plan: which matrix becomes which network at which ranks, under one budget.

A `Plan` is JSON a person can edit and pass back. `make_plan` measures the singular values of every
unit in its metric, lists candidates, and lets `choose` spend the budget.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig

from qll import store
from qll.calibrate import MomentStore
from qll.config import ConvertOptions
from qll.convert.allocate import choose
from qll.convert.candidates import Candidate, dense, exact, ladder
from qll.convert.fit import spectra
from qll.convert.metric import Metric, metric_of, plain, shrink
from qll.convert.units import (
    EMBEDDING,
    HEAD,
    Unit,
    embedding_unit,
    group_unit,
    head_unit,
    single_units,
    template,
)
from qll.errors import ConfigError
from qll.load import Source
from qll.model import fold_gain, gain_of
from qll.tn import tensor_shapes
from qll.tn.network import NetworkSpec

logger = logging.getLogger("qll.convert")

# which formats a unit of each kind is offered, by --format
GROUPS_OF = {
    "auto": ("qkv", "gate_up"),
    "joint_tree": ("qkv", "gate_up"),
    "joint_tucker": ("qkvo",),
}
# what a joint format does with the matrices it does not cover
SINGLE_OF = {"auto": "lowrank", "joint_tree": "lowrank", "joint_tucker": "lowrank"}
HALF = 0.5  # a K-FAC error squared is twice the predicted loss (second-order Taylor term)


@dataclass(frozen=True)
class PlanEntry:
    """One unit and what it becomes; spec None leaves it dense. loss: predicted, of its metric."""

    unit: Unit
    spec: NetworkSpec | None
    loss: float

    @property
    def params(self) -> int:
        """Numbers stored for the unit."""
        return self.unit.dense_params if self.spec is None else tensor_shapes(self.spec).num_params

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the counts beside the choice."""
        return {
            "members": list(self.unit.members),
            "shapes": [list(shape) for shape in self.unit.shapes],
            "format": "dense" if self.spec is None else self.spec.format,
            "spec": None if self.spec is None else self.spec.to_json(),
            "predicted_loss": self.loss,
            "params": self.params,
            "params_dense": self.unit.dense_params,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PlanEntry:
        """The entry written by `to_json`; the counts are computed anew."""
        unit = Unit(tuple(value["members"]), tuple(tuple(shape) for shape in value["shapes"]))
        spec = None if value["spec"] is None else NetworkSpec.from_json(value["spec"])
        return cls(unit, spec, float(value["predicted_loss"]))


@dataclass(frozen=True)
class Plan:
    """Entries in model order, and what they were chosen under."""

    entries: tuple[PlanEntry, ...]
    keep: float
    metric: str
    budget: int

    def of_block(self, block: int | None) -> list[PlanEntry]:
        """Entries of one block; None: embedding and head."""
        return [entry for entry in self.entries if entry.unit.block == block]

    @property
    def block_params(self) -> int:
        """Numbers stored for all block linears."""
        return sum(entry.params for entry in self.entries if entry.unit.block is not None)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` is its inverse."""
        return {
            "keep": self.keep,
            "metric": self.metric,
            "budget": self.budget,
            "block_params": self.block_params,
            "entries": [entry.to_json() for entry in self.entries],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        """The plan written by `to_json`, perhaps edited."""
        entries = tuple(PlanEntry.from_json(entry) for entry in value["entries"])
        return cls(entries, value["keep"], value["metric"], value["budget"])

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        store.write_json(path, self.to_json())


def load_plan(path: Path) -> Plan:
    """The plan saved at `path`; raises ConfigError when it is not one."""
    try:
        return Plan.from_json(store.read_json(path))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "not a plan", where=path, found=repr(error), hint="write one with `qll plan`"
        ) from None


def make_plan(source: Source, moments: MomentStore | None, options: ConvertOptions) -> Plan:
    """The plan for `source` under `options`; moments may be None for the plain metric.

    Reads one block at a time. Raises UsageError when the budget cannot be met.
    """
    config = source.config
    candidates: list[Candidate] = []
    blocks = tqdm(
        range(config.num_hidden_layers), "plan", unit="block", file=sys.stderr, disable=None
    )
    for block in blocks:
        candidates += block_candidates(source, moments, options, block)
    total = sum(unit.dense_params for unit in single_units(config, 0)) * config.num_hidden_layers
    budget = int(options.keep * total)
    chosen = _spend(candidates, budget, options)
    entries = [PlanEntry(item.unit, item.spec, item.loss) for item in chosen]
    entries += _vocabulary_entries(source, moments, options)
    return Plan(tuple(entries), options.keep, options.metric, budget)


def block_candidates(
    source: Source, moments: MomentStore | None, options: ConvertOptions, block: int
) -> list[Candidate]:
    """Everything the units of one block could become."""
    config = source.config
    members = [unit.members[0] for unit in single_units(config, block)]
    weights = dict(zip(members, read_weights(source, members, options), strict=True))
    metrics = dict(zip(members, metrics_of(source, moments, members, options), strict=True))
    found = []
    for unit, format in _offers(config, options, block):
        if format == "dense":
            found.append(dense(unit))
            continue
        spec = template(unit, format, options.gauge, options.sites, config)
        if options.keep == 1.0:
            found.append(exact(unit, spec))
            continue
        chosen = [metrics[member] for member in unit.members]
        values = spectra([weights[member] for member in unit.members], spec, chosen)
        scale = _loss_scale(values, options)
        found += [
            Candidate(item.unit, item.spec, item.params, item.loss * scale)
            for item in ladder(unit, spec, values)
        ]
    return found


def read_weights(source: Source, members: Sequence[str], options: ConvertOptions) -> list[Tensor]:
    """The float64 weights of `members`, with the norm gain multiplied in when norms are folded."""
    weights = []
    for member in members:
        weight = source.read(f"{member}.weight").to(torch.float64)
        gain = _gain(source, member, options)
        weights.append(weight if gain is None else fold_gain(weight, gain))
    return weights


def metrics_of(
    source: Source, moments: MomentStore | None, members: Sequence[str], options: ConvertOptions
) -> list[Metric]:
    """The metric of each member, for the weights that `read_weights` gives."""
    if members[0] in (EMBEDDING, HEAD):
        return [_vocabulary_metric(source, moments, members[0], options)]
    if moments is None or options.metric == "plain":
        return [plain() for _ in members]
    known = moments.block(int(members[0].split(".")[2]))
    metrics = []
    for member in members:
        of_member, gain = known[member], _gain(source, member, options)
        if gain is not None:
            of_member = replace(of_member, input=_before_gain(of_member.input, gain))
        metrics.append(metric_of(of_member, options.metric))
    return metrics


def _gain(source: Source, member: str, options: ConvertOptions) -> Tensor | None:
    """The float64 gain of the norm in front of `member` when it is to be folded, else None."""
    name = gain_of(member, source.config) if options.norms == "fold" else None
    return None if name is None else source.read(name).to(torch.float64)


def _before_gain(moment: Tensor, gain: Tensor) -> Tensor:
    """The second moment of the norm's output before its gain; a zero gain leaves a zero channel."""
    inverse = torch.where(gain == 0, torch.zeros_like(gain), 1 / gain)
    return moment * inverse[:, None] * inverse[None, :]


def _offers(config: LlamaConfig, options: ConvertOptions, block: int) -> Iterator[tuple[Unit, str]]:
    """(unit, format) pairs offered under --format."""
    groups = [group_unit(config, block, name) for name in GROUPS_OF.get(options.format, ())]
    covered = {member for unit in groups for member in unit.members}
    joint = "joint_tucker" if options.format == "joint_tucker" else "joint_tree"
    yield from ((unit, joint) for unit in groups)
    for unit in single_units(config, block):
        if options.format == "auto":
            yield unit, "dense"
            yield unit, "lowrank"
        elif unit.members[0] not in covered:
            yield unit, SINGLE_OF.get(options.format, options.format)


def _spend(candidates: list[Candidate], budget: int, options: ConvertOptions) -> list[Candidate]:
    if options.keep == 1.0:
        # exact storage may exceed the dense count by its pivot indices, so nothing is left to
        # choose: the format asked for, or dense under auto
        kept = [c for c in candidates if (c.spec is None) == (options.format in ("auto", "dense"))]
        return kept
    if options.format == "dense":
        raise ConfigError(
            "dense matrices cannot be shrunk",
            where="--format dense",
            expected="--keep 1",
            found=f"--keep {options.keep}",
        )
    if options.allocation == "global":
        return choose(candidates, budget)
    chosen = []
    units = {item.unit.members: item.unit for item in candidates}
    for unit in units.values():
        own = [item for item in candidates if item.unit == unit]
        chosen += choose(own, int(options.keep * unit.dense_params))
    return chosen


def _loss_scale(values: Sequence[Tensor], options: ConvertOptions) -> float:
    """What makes losses of different matrices comparable: nats in K-FAC, else a relative error."""
    if options.metric == "kfac":
        return HALF
    return 1.0 / max(float(values[0].square().sum()), 1e-300)


def _vocabulary_entries(
    source: Source, moments: MomentStore | None, options: ConvertOptions
) -> list[PlanEntry]:
    """Entries of the embedding and of an untied head."""
    units = [embedding_unit(source.config)]
    if not source.config.tie_word_embeddings:
        units.append(head_unit(source.config))
    entries = []
    for unit in units:
        if options.keep_embeddings == 1.0:
            entries.append(PlanEntry(unit, None, 0.0))
            continue
        format = (
            options.format if options.format in ("mpo", "tree", "kron", "tucker") else "lowrank"
        )
        spec = template(unit, format, options.gauge, options.sites, source.config)
        weights = read_weights(source, unit.members, options)
        metrics = metrics_of(source, moments, unit.members, options)
        values = spectra(weights, spec, metrics)
        items = ladder(unit, spec, values)
        item = choose(items, int(options.keep_embeddings * unit.dense_params))[0]
        entries.append(PlanEntry(unit, item.spec, item.loss * _loss_scale(values, options)))
    return entries


def _vocabulary_metric(
    source: Source, moments: MomentStore | None, member: str, options: ConvertOptions
) -> Metric:
    """Rows weighted by how often a token occurs (plus one, so that unseen tokens still count);
    columns, for a matrix that is also the head, by the second moment of the head's input."""
    if moments is None or options.metric == "plain":
        return plain()
    counts = moments.token_counts.to(torch.float64) + 1.0
    rows = counts / counts.mean()
    if member == EMBEDDING and not source.config.tie_word_embeddings:
        return Metric(options.metric, left=rows)
    head = moments.head()
    columns = shrink(head.input / head.tokens, 0.0)
    if member == HEAD:
        return Metric(options.metric, left=rows, right=columns)
    columns = columns / columns.diagonal().mean() + torch.eye(len(columns), dtype=torch.float64)
    return Metric(options.metric, left=rows, right=columns)
