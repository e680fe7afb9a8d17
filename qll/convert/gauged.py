"""A checkpoint and its moments in another gauge: what conversion reads instead of the files.

The same function in other bases (qll.convert.disentangle), so everything downstream takes them
for an ordinary checkpoint. Bases are chosen once, from weights and moments, and kept in a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from qll import store
from qll.calibrate import LinearMoments, MomentStore
from qll.convert.disentangle import FREEDOMS, TURNED, BlockGauge, choose_gauge
from qll.convert.weights import metrics_of, read_weights
from qll.load import Source, TensorSpec
from qll.options import ConvertOptions


class GaugedSource:
    """`source` with the matrices of block k in `gauges[k]`; see `qll.load.Source`."""

    def __init__(self, source: Source, gauges: Sequence[BlockGauge]) -> None:
        self.source = source
        self.gauges = tuple(gauges)
        self.path: Path = source.path
        self.name: str = source.name
        self.format: str = source.format
        self.row_order: str = source.row_order
        self.config: LlamaConfig = source.config
        self.fingerprint: str = source.fingerprint
        self.files: tuple[Path, ...] = source.files
        self.bytes_on_disk: int = source.bytes_on_disk

    def specs(self) -> dict[str, TensorSpec]:
        """Those of the source: a gauge changes no shape, and no dtype that is saved."""
        return self.source.specs()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor in its gauge, or some of its rows; a turned matrix is float32 at least."""
        place = _place(name.removesuffix(".weight"))
        if place is None:
            return self.source.read(name, rows)
        block, linear = place
        weight = self.gauges[block].weight(linear, self.source.read(name))
        return weight if rows is None else weight[rows]


class GaugedMoments(MomentStore):
    """`moments` as they would be of a model in `gauges`."""

    def __init__(self, moments: MomentStore, gauges: Sequence[BlockGauge]) -> None:
        super().__init__(moments.folder, moments.prior)
        self.gauges = tuple(gauges)

    def block(self, index: int) -> dict[str, LinearMoments]:
        """Moments of the seven linear layers of block `index`, by Hugging Face module path."""
        return {path: self._turned(path, found) for path, found in super().block(index).items()}

    def linear(self, path: str) -> LinearMoments:
        """Moments of the one linear at `path`."""
        return self._turned(path, super().linear(path))

    def _turned(self, path: str, moments: LinearMoments) -> LinearMoments:
        block, linear = _place(path)
        gauge, grad = self.gauges[block], moments.grad
        return replace(
            moments,
            input=gauge.moment(linear, moments.input, 1),
            grad=None if grad is None else gauge.moment(linear, grad, 0),
        )


def disentangled(
    source: Source, moments: MomentStore | None, options: ConvertOptions, path: Path
) -> tuple[GaugedSource, GaugedMoments | None]:
    """Checkpoint and moments in the gauge of options.disentangle, kept in the file `path`."""
    if not path.is_file():
        store.make_folder(path.parent)
        store.write_tensors(path, _chosen(source, moments, options))
    tensors = load_file(path)
    gauges = [
        BlockGauge(**{freedom: tensors.get(f"{block}.{freedom}") for freedom in FREEDOMS})
        for block in range(source.config.num_hidden_layers)
    ]
    there = None if moments is None else GaugedMoments(moments, gauges)
    return GaugedSource(source, gauges), there


def _chosen(
    source: Source, moments: MomentStore | None, options: ConvertOptions
) -> dict[str, Tensor]:
    """The bases of every block by <block>.<freedom>."""
    wanted = FREEDOMS if options.disentangle == "all" else (options.disentangle,)
    tensors = {}
    for block in range(source.config.num_hidden_layers):
        members = [f"model.layers.{block}.{linear}" for linear in TURNED]
        weights = read_weights(source, members, options)
        metrics = metrics_of(source, moments, members, options)
        gauge = choose_gauge(
            dict(zip(TURNED, weights, strict=True)),
            dict(zip(TURNED, metrics, strict=True)),
            source.config.head_dim,
            wanted,
        )
        tensors |= {f"{block}.{freedom}": getattr(gauge, freedom) for freedom in wanted}
    return tensors


def _place(path: str) -> tuple[int, str] | None:
    """(block, linear) of a module path, or None when no gauge turns it."""
    parts = path.split(".", 3)
    inside = parts[:2] == ["model", "layers"] and parts[-1] in TURNED
    return (int(parts[2]), parts[3]) if inside else None
