"""Which sharing between matrices pays: predicted K-FAC loss at equal numbers stored.

    python benchmarks/shared_bases.py --moments runs/qll/work/moments --blocks 2,15,27

For each block, three tables at the same parameters, every bond stored interpolatively:

- inner: `joint_channels`, `joint_value_output` and `joint_query_key` against one low-rank network
  per member, ranks shared out between the members for the least summed loss;
- bonds: `joint_tree` of q/k/v and of gate/up against the same;
- neighbours: one basis for the same matrix of two neighbouring blocks against one low-rank network
  each. The basis is that of the two matrices stacked, in the mean of their input moments, and each
  member is then refitted in its own metric, which is the best it can do with that basis.

Writes benchmarks/results/shared_bases.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qll.calibrate import MomentStore
from qll.convert.candidates import HALF, RANK_STEP, Candidate, dense, ladder
from qll.convert.fit import spectra
from qll.convert.inner import INNER, inner_ladder
from qll.convert.metric import Metric, factor
from qll.convert.planner import GROUPS_OF
from qll.convert.units import Unit, group_unit, linear_shapes, template
from qll.convert.weights import metrics_of, read_weights
from qll.load import Source, open_source
from qll.options import ConvertOptions

RESULT = Path(__file__).parent / "results" / "shared_bases.json"
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
OPTIONS = ConvertOptions()
Block = dict[str, tuple[Tensor, Metric]]


def main() -> None:
    """Measure the blocks asked for and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=Path, required=True, help="folder left by `calibrate`")
    parser.add_argument("--llama_dir", type=Path, help="checkpoint; default: the embedded one")
    parser.add_argument("--blocks", default="2,15,27")
    parser.add_argument("--tables", default="groups,neighbours", help="which to measure again")
    arguments = parser.parse_args()
    source, moments = open_source(arguments.llama_dir), MomentStore(arguments.moments)
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {"blocks": {}}
    results |= {"model": source.name, "tokens": moments.tokens}
    for block in map(int, arguments.blocks.split(",")):
        here = read(source, moments, block)
        tables = {}
        if "groups" in arguments.tables:
            tables["groups"] = groups(source, here, block)
        if "neighbours" in arguments.tables and block + 1 < source.config.num_hidden_layers:
            tables["neighbours"] = neighbours(here, read(source, moments, block + 1))
        for table, found in tables.items():
            rows = results["blocks"].setdefault(str(block), {}).setdefault(table, {})
            for name, row in found:
                rows[name] = row
                save(results)


def save(results: dict) -> None:
    """Write what is there: every row as it comes."""
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


def read(source: Source, moments: MomentStore, block: int) -> Block:
    """Weight and metric of every linear of a block, by its path in the block."""
    paths = list(linear_shapes(source.config))
    members = [f"model.layers.{block}.{path}" for path in paths]
    weights = read_weights(source, members, OPTIONS)
    metrics = metrics_of(source, moments, members, OPTIONS)
    return dict(zip(paths, zip(weights, metrics, strict=True), strict=True))


def groups(source: Source, here: Block, block: int) -> Iterator[tuple[str, dict]]:
    """(format and group, losses by keep) for every joint format that auto is offered."""
    for format in ("joint_tree", *INNER):
        for name in GROUPS_OF[format]:
            unit = group_unit(source.config, block, name)
            pairs = [here[member.split(".", 3)[3]] for member in unit.members]
            weights, metrics = zip(*pairs, strict=True)
            spec = template(unit, format, "interpolative", 3, source.config)
            if format in INNER:
                items = inner_ladder(unit, spec, weights, metrics)
            else:
                values = spectra(weights, spec, metrics)
                items = scaled(ladder(unit, spec, values), HALF)
            alone = [single(*pair, source) for pair in pairs]
            yield f"{format} {name}", compared([items], alone, unit.dense_params)


def neighbours(here: Block, there: Block) -> Iterator[tuple[str, dict]]:
    """(matrix, losses by keep) of one basis for both blocks and of a network each."""
    for path in here:
        pairs = [here[path], there[path]]
        (out, into), count = pairs[0][0].shape, 2 * pairs[0][0].numel()
        unit = Unit((path, path), ((out, into),) * 2)
        shared = [
            # B [r, in] once, two matrices [out, r], the identity of the stack left out
            Candidate(unit, None, rank * (into + 2 * out) - rank**2 + rank, loss)
            for rank, loss in shared_basis(pairs)
        ]
        alone = [single(*pair, None) for pair in pairs]
        yield path, compared([[*shared, dense(unit)]], alone, count)


def shared_basis(pairs: Sequence[tuple[Tensor, Metric]]) -> Iterator[tuple[int, float]]:
    """(rank, loss) of a common input basis, each member refitted in its own metric."""
    roots = [factor(metric.left).root for _, metric in pairs]
    middle = factor(sum(metric.right for _, metric in pairs) / len(pairs))
    seen = [root.mT @ weight @ middle.root for root, (weight, _) in zip(roots, pairs, strict=True)]
    gram = sum(item.mT @ item for item in seen)
    order = torch.linalg.eigh(gram).eigenvectors.flip(1).mT
    for rank in range(4 * RANK_STEP, min(len(order), sum(map(len, seen))), 4 * RANK_STEP):
        basis = order[:rank] @ middle.inverse
        yield rank, sum(HALF * refitted(weight, metric, basis) for weight, metric in pairs)


def refitted(weight: Tensor, metric: Metric, basis: Tensor) -> float:
    """Squared error of the best A B with this B."""
    seen = basis @ metric.right
    factors = torch.linalg.solve(seen @ basis.mT, seen @ weight.mT).mT
    return metric.norm_squared(weight - factors @ basis)


def single(weight: Tensor, metric: Metric, source: Source | None) -> list[Candidate]:
    """One matrix: dense, or low rank in steps."""
    unit = Unit(("matrix",), (tuple(weight.shape),))
    config = None if source is None else source.config
    spec = template(unit, "lowrank", "interpolative", 3, config)
    items = ladder(unit, spec, spectra([weight], spec, [metric]))
    return [*scaled(items, HALF), dense(unit)]


def scaled(items: Sequence[Candidate], scale: float) -> list[Candidate]:
    """The candidates with their losses in nats."""
    return [Candidate(item.unit, item.spec, item.params, item.loss * scale) for item in items]


def compared(
    joint: Sequence[Sequence[Candidate]], alone: Sequence[Sequence[Candidate]], count: int
) -> dict[str, dict[str, float | list[int] | None]]:
    """By keep: the least loss of the joint format and of the separate networks, nats per token."""
    rows = {}
    for keep in KEEPS:
        budget = int(keep * count)
        fitting = [item for item in joint[0] if item.params <= budget]
        best = min(fitting, key=lambda item: item.loss, default=None)
        rows[str(keep)] = {
            "joint": None if best is None else best.loss,
            "ranks": None if best is None or best.spec is None else list(best.spec.ranks),
            "separate": cheapest(alone, budget),
        }
    return rows


def cheapest(menus: Sequence[Sequence[Candidate]], budget: int) -> float:
    """Least summed loss of one candidate per menu within the budget (Lagrangian bisection)."""
    low, high, best = 1e-16, 1e3, float("nan")
    for _ in range(80):
        price = (low * high) ** 0.5
        chosen = [min(menu, key=lambda item: item.loss + price * item.params) for menu in menus]
        if sum(item.params for item in chosen) > budget:
            low = price
        else:
            high, best = price, sum(item.loss for item in chosen)
    return best


if __name__ == "__main__":
    main()
