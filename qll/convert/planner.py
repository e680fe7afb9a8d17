"""From a checkpoint and its moments to a plan.

The singular values of every unit are measured in its metric, candidates listed from them, and
`choose` spends the budget: once by predicted losses, and under --losses measured once more, by the
losses that the cuts of the first plan turned out to have. Embedding and head have a budget of their
own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig

from qll import store
from qll.calibrate import MomentStore
from qll.convert.allocate import choose
from qll.convert.candidates import HALF, RANK_STEP, Candidate, dense, exact, ladder, useful
from qll.convert.digits import significant
from qll.convert.fit import spectra
from qll.convert.inner import INNER, inner_ladder
from qll.convert.inner_parts import member_scales
from qll.convert.jobs import Executor, InOrder
from qll.convert.metric import Metric
from qll.convert.outliers import outlier_ladder
from qll.convert.plan import BitBudget, Plan, PlanEntry
from qll.convert.scales import fit_scales, rescaled, weighted_by_depth
from qll.convert.sensitivity import Trial, measure
from qll.convert.units import (
    Unit,
    embedding_unit,
    group_unit,
    head_unit,
    single_units,
    template,
    templates,
)
from qll.convert.weights import metrics_of, read_weights
from qll.convert.widths import Losses, rounding_losses, with_widths
from qll.errors import UsageError
from qll.load import Source, expect_block
from qll.options import ConvertOptions
from qll.tn.network import NetworkSpec

# which formats a unit of each kind is offered, by --format
GROUPS_OF = {
    "joint_tree": ("qkv", "gate_up"),
    "joint_tucker": ("qkvo",),
    "joint_channels": ("gate_up_down",),
    "joint_value_output": ("value_output",),
    "joint_query_key": ("query_key",),
}
# the joint formats that auto is offered, by --sharing
SHARED = {"none": (), "bonds": ("joint_tree",), "inner": INNER, "all": ("joint_tree", *INNER)}


def make_plan(
    source: Source,
    moments: MomentStore | None,
    options: ConvertOptions,
    trial: Trial | None = None,
    work: Path | None = None,
    executor: Executor | None = None,
) -> Plan:
    """The plan for `source` under `options`; moments may be None for the plain metric.

    `trial` says where losses are measured, for options.losses "measured". Reads one block at a
    time and leaves what it found in a file of `work`, if there is one, for a resumed run. Without
    an `executor` block after block. Raises UsageError when the budget cannot be met.
    """
    config = source.config
    executor = executor or InOrder(source, moments, options, expect_block)
    candidates = _all_candidates(config.num_hidden_layers, work, executor)
    total = sum(unit.dense_params for unit in single_units(config, 0)) * config.num_hidden_layers
    budget = int((options.bits_per_weight or options.keep) * total)
    if options.losses == "depth":
        candidates = weighted_by_depth(candidates, config.num_hidden_layers)
    chosen, measured = _spend(candidates, budget, options), ()
    if options.losses == "measured" and _has_choice(options):
        if trial is None:
            raise UsageError("needs text to measure losses on", where="--losses measured")
        measured = tuple(measure(source, moments, options, chosen, trial))
        chosen = _spend(rescaled(candidates, fit_scales(measured), chosen), budget, options)
    entries = [
        PlanEntry(item.unit, item.spec, significant(item.loss), item.bits) for item in chosen
    ]
    entries += _vocabulary_entries(source, moments, options)
    bits = BitBudget(options.bits_per_weight, options.bits_group)
    return Plan(
        *(tuple(entries), options.keep, options.metric, budget, measured),
        bits if options.bits_per_weight else None,
    )


def block_candidates(
    source: Source, moments: MomentStore | None, options: ConvertOptions, block: int
) -> list[Candidate]:
    """Everything the units of one block could become; one unit is in memory at a time."""
    found = []
    for unit, format in _offers(source.config, options, block):
        if format == "dense":
            found.append(dense(unit))
            continue
        weights = read_weights(source, unit.members, options)
        metrics = metrics_of(source, moments, unit.members, options)
        found += _unit_candidates(unit, format, weights, metrics, options, source.config)
    if not options.bits_per_weight:
        return found
    rounding = _rounding(source, moments, options, block)
    return list(with_widths(found, rounding, options.bits_group))


def _rounding(
    source: Source, moments: MomentStore | None, options: ConvertOptions, block: int
) -> dict[str, Losses]:
    """What each matrix of a block loses at every width; one is in memory at a time."""
    found = {}
    for unit in single_units(source.config, block):
        (weight,) = read_weights(source, unit.members, options)
        (metric,) = metrics_of(source, moments, unit.members, options)
        found[unit.name] = rounding_losses(weight, metric, options.bits_group)
    return found


def keep_candidates(
    source: Source, moments: MomentStore | None, options: ConvertOptions, block: int, work: Path
) -> int:
    """Write `block_candidates` into their file of `work`; returns the block. A step."""
    found = block_candidates(source, moments, options, block)
    store.write_json(_candidates_path(work, block), [item.to_json() for item in found])
    return block


def _all_candidates(layers: int, work: Path | None, executor: Executor) -> list[Candidate]:
    """The candidates of every block, in the order of the blocks."""
    bar = partial(tqdm, desc="plan", unit="block", file=sys.stderr, disable=None)
    if work is None:
        found = bar(executor.run(_numbered_candidates, range(layers)), total=layers)
        return [item for _, items in sorted(found, key=lambda pair: pair[0]) for item in items]
    waiting = [block for block in range(layers) if not _candidates_path(work, block).is_file()]
    for _ in bar(executor.run(keep_candidates, waiting, work), total=len(waiting)):
        pass
    read = (store.read_json(_candidates_path(work, block)) for block in range(layers))
    return [Candidate.from_json(value) for values in read for value in values]


def _numbered_candidates(
    source: Source, moments: MomentStore | None, options: ConvertOptions, block: int
) -> tuple[int, list[Candidate]]:
    return block, block_candidates(source, moments, options, block)


def _candidates_path(work: Path, block: int) -> Path:
    return work / f"block.{block:04d}.json"


def _unit_candidates(
    unit: Unit,
    format: str,
    weights: Sequence[Tensor],
    metrics: Sequence[Metric],
    options: ConvertOptions,
    config: LlamaConfig,
) -> list[Candidate]:
    """Everything that one unit could become in one format."""
    specs = templates(unit, format, options.gauge, options.sites, config)
    if options.is_exact:
        return [exact(unit, specs[0])]
    if format in INNER:
        is_whole = options.format == "auto" and options.singles == "dense"
        return inner_ladder(unit, specs[0], weights, metrics, _rank_step(options), is_whole)
    items = [item for spec in specs for item in _ladder(unit, spec, weights, metrics, options)]
    return items if len(specs) == 1 else useful(items, unit.dense_params)


def _ladder(
    unit: Unit,
    spec: NetworkSpec,
    weights: Sequence[Tensor],
    metrics: Sequence[Metric],
    options: ConvertOptions,
) -> list[Candidate]:
    """The ladder of one spec with losses that compare between matrices."""
    step = _rank_step(options)
    if spec.format == "sparse" and options.format == "auto":
        share, keep = options.outliers, options.keep
        items = outlier_ladder(unit, spec, weights[0], metrics[0], share, keep, step)
        scale = member_scales(weights, metrics)[0]
    else:
        values = spectra(weights, spec, metrics)
        items = ladder(unit, spec, values, step)
        scale = _loss_scale(values, options)
    return [replace(item, loss=item.loss * scale) for item in items]


def _offers(config: LlamaConfig, options: ConvertOptions, block: int) -> Iterator[tuple[Unit, str]]:
    """(unit, format) pairs offered under --format."""
    # equal shares leave nothing to choose: auto is then one low-rank network per matrix
    format = "lowrank" if _is_uniform_auto(options) else options.format
    joints = SHARED[options.sharing] if format == "auto" else (format,)
    groups = [
        (group_unit(config, block, name), joint)
        for joint in joints
        for name in GROUPS_OF.get(joint, ())
    ]
    yield from groups
    covered = {member for unit, _ in groups for member in unit.members}
    for unit in single_units(config, block):
        if format == "auto":
            yield unit, "dense"
            if options.singles != "dense":
                yield unit, "lowrank"
            if options.singles == "panels":
                yield unit, "panels"
            if options.outliers:
                yield unit, "sparse"
        elif unit.members[0] not in covered:
            # the matrices that a joint format leaves over
            yield unit, "lowrank" if groups else format


def _has_choice(options: ConvertOptions) -> bool:
    """Whether losses of different matrices are weighed against each other at all."""
    return options.allocation == "global" and not options.is_exact


def _is_uniform_auto(options: ConvertOptions) -> bool:
    return options.format == "auto" and options.allocation == "uniform" and not options.is_exact


def _spend(candidates: list[Candidate], budget: int, options: ConvertOptions) -> list[Candidate]:
    if options.is_exact:
        # exact storage may exceed the dense count by its pivot indices, so nothing is left to
        # choose: the format asked for, or dense under auto
        kept = [c for c in candidates if (c.spec is None) == (options.format in ("auto", "dense"))]
        return kept
    if options.format == "dense" and not options.bits_per_weight:
        raise UsageError(
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


def _rank_step(options: ConvertOptions) -> int:
    """Steps of eight run fast; an equal share per matrix is filled to the last rank instead, since
    nothing else could use what is left over."""
    return RANK_STEP if options.allocation == "global" else 1


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
        items = ladder(unit, spec, values, step=1)
        item = choose(items, int(options.keep_embeddings * unit.dense_params))[0]
        entries.append(
            PlanEntry(unit, item.spec, significant(item.loss * _loss_scale(values, options)))
        )
    return entries
