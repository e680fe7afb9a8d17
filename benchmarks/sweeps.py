"""What sweeps, splits, gauges and sums buy: K-FAC error of single matrices at equal parameters.

    python benchmarks/sweeps.py --moments runs/qll/work/moments --matrices 15.mlp.down_proj

Per matrix, as multiples of the loss of a low-rank network of the same size:

- formats: every split into sites or panels that the planner chooses from, after 0, 2 and 4 sweeps,
  with the seconds of CPU of each fit; "sorted" is the same matrix with the channels of its MLP in
  the order of --disentangle channels, "rotated" with the residual stream in the eigenvectors of its
  own second moment (or of its gradient's, where the matrix writes it), the best basis any one block
  could ask for;
- sums: low rank plus a Kronecker sum with a share of the numbers, the two fitted in turns.

Writes benchmarks/results/sweeps.json, one matrix at a time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qll.calibrate import MomentStore
from qll.config import ConvertOptions
from qll.convert.candidates import ladder
from qll.convert.disentangle import TURNED, BlockGauge, choose_gauge
from qll.convert.fit import fit, spectra
from qll.convert.metric import Metric, factor
from qll.convert.truncation import truncated
from qll.convert.units import Unit, templates
from qll.convert.weights import metrics_of, read_weights
from qll.load import Source, open_source
from qll.tn.network import NetworkSpec

RESULT = Path(__file__).parent / "results" / "sweeps.json"
KEEP = 0.8
SHARES = (0.1, 0.3)
TURNS = 3  # of the two parts of a sum
OPTIONS = ConvertOptions()
WRITERS = ("o_proj", "down_proj")  # what they give is added to the residual stream


def main() -> None:
    """Measure the matrices asked for and add them to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=Path, required=True, help="folder left by `calibrate`")
    parser.add_argument("--llama_dir", type=Path, help="checkpoint; default: the embedded one")
    parser.add_argument("--matrices", nargs="+", default=["15.mlp.down_proj"])
    parser.add_argument("--formats", nargs="+", default=["kron", "mpo", "panels"])
    parser.add_argument("--sweeps", nargs="+", type=int, default=[0, 2, 4])
    arguments = parser.parse_args()
    source, moments = open_source(arguments.llama_dir), MomentStore(arguments.moments)
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {"matrices": {}}
    results |= {
        "model": source.name,
        "tokens": moments.tokens,
        "keep": KEEP,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    for name in arguments.matrices:
        weight, metric, gauge = read(source, moments, name)
        row = results["matrices"].setdefault(name, {})
        row["lowrank"] = base = single("lowrank", weight, metric, source)[0]
        places = [("", weight, metric), ("rotated ", *rotated(name, weight, metric))]
        if gauge.channels is not None:
            places.append(("sorted ", *in_gauge(name, weight, metric, gauge)))
        for label, matrix, seen in places:
            for format in arguments.formats:
                for key, found in formats(format, matrix, seen, source, arguments.sweeps):
                    row[label + key] = {**found, "loss": ratios(found["loss"], base)}
                    save(results)
        row["sums"] = {key: ratios(losses, base) for key, losses in sums(weight, metric, source)}
        save(results)


def save(results: dict) -> None:
    """Write what is there: every row as it comes."""
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


def ratios(losses: Sequence[float], base: float) -> list[float]:
    """Losses as multiples of `base`, four digits."""
    return [float(f"{loss / base:.4g}") for loss in losses]


def read(source: Source, moments: MomentStore, name: str) -> tuple[Tensor, Metric, BlockGauge]:
    """Weight and metric of <block>.<linear>, and the order of channels where it has any."""
    block, linear = name.split(".", 1)
    wanted = [path for path, (_, turn) in TURNED.items() if turn == "channels"]
    wanted = wanted if linear in wanted else [linear]
    members = [f"model.layers.{block}.{path}" for path in wanted]
    weights = dict(zip(wanted, read_weights(source, members, OPTIONS), strict=True))
    metrics = dict(zip(wanted, metrics_of(source, moments, members, OPTIONS), strict=True))
    freedoms = ["channels"] if len(wanted) > 1 else []
    gauge = choose_gauge(weights, metrics, source.config.head_dim, freedoms)
    return weights[linear], metrics[linear], gauge


def in_gauge(name: str, weight: Tensor, metric: Metric, gauge: BlockGauge) -> tuple[Tensor, Metric]:
    """Weight and metric in `gauge`."""
    linear = name.split(".", 1)[1]
    left, right = (
        gauge.moment(linear, moment, axis)
        for axis, moment in enumerate((metric.left, metric.right))
    )
    return gauge.weight(linear, weight), Metric(metric.kind, left, right)


def rotated(name: str, weight: Tensor, metric: Metric) -> tuple[Tensor, Metric]:
    """Weight and metric with the residual stream in an eigenbasis, strongest direction first."""
    writes = name.endswith(WRITERS)
    values, basis = torch.linalg.eigh(metric.left if writes else metric.right)
    values, basis = torch.diag(values.flip(0)), basis.flip(1)
    if writes:
        return basis.mT @ weight, Metric(metric.kind, values, metric.right)
    return weight @ basis, Metric(metric.kind, metric.left, values)


def formats(
    format: str, weight: Tensor, metric: Metric, source: Source, sweeps: Sequence[int]
) -> Iterator[tuple[str, dict]]:
    """(format and modes, losses and CPU seconds by number of sweeps) of every split."""
    unit = Unit(("matrix",), (tuple(weight.shape),))
    for spec in templates(unit, format, "interpolative", 3, source.config):
        sized = largest(unit, spec, weight, metric)
        losses, seconds = [], []
        for count in sweeps:
            started = time.process_time()
            found = fit([weight], sized, [metric], torch.float32, count)
            seconds.append(round(time.process_time() - started, 2))
            losses.append(metric.norm_squared(weight - found.network.to_matrix().double()))
        modes = " ".join(f"{side}{'x'.join(map(str, dims))}" for side, dims in spec.modes.items())
        yield f"{format} {modes}", {"sweeps": list(sweeps), "loss": losses, "seconds": seconds}


def single(format: str, weight: Tensor, metric: Metric, source: Source) -> tuple[float, int]:
    """(squared error, rank) of one network at KEEP."""
    unit = Unit(("matrix",), (tuple(weight.shape),))
    spec = largest(
        unit, templates(unit, format, "interpolative", 2, source.config)[0], weight, metric
    )
    found = fit([weight], spec, [metric], torch.float64)
    return metric.norm_squared(weight - found.network.to_matrix()), spec.ranks[0]


def largest(
    unit: Unit, spec: NetworkSpec, weight: Tensor, metric: Metric, keep: float = KEEP
) -> NetworkSpec:
    """`spec` at the ranks the planner would give it for `keep` of the parameters."""
    items = ladder(unit, spec, spectra([weight], spec, [metric]), 1)
    fitting = [item for item in items if item.params <= keep * unit.dense_params]
    return min(fitting, key=lambda item: item.loss).spec


def sums(weight: Tensor, metric: Metric, source: Source) -> Iterator[tuple[str, list[float]]]:
    """(split and share, losses after each turn) of low rank plus a Kronecker sum."""
    unit = Unit(("matrix",), (tuple(weight.shape),))
    left, right = factor(metric.left), factor(metric.right)
    low = templates(unit, "lowrank", "interpolative", 2, source.config)[0]
    for spec in templates(unit, "kron", "interpolative", 2, source.config):
        for share in SHARES:
            kron = largest(unit, spec, weight, metric, share * KEEP)
            rank = largest(unit, low, weight, metric, (1 - share) * KEEP).ranks[0]
            other, losses = torch.zeros_like(weight), []
            for _ in range(TURNS):
                first = truncated(weight - other, rank, left, right).to_matrix()
                other = fit([weight - first], kron, [metric], torch.float64, 1).network.to_matrix()
                losses.append(metric.norm_squared(weight - first - other))
            yield f"{spec.modes['out']} {spec.modes['in']} share {share}", losses


if __name__ == "__main__":
    main()
