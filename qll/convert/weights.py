"""What is fitted: the weights of a unit as they will be stored, and the metric they are fitted in.

Both planner and fit read them here, so that a folded norm gain changes both in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qll.calibrate import MomentStore
from qll.convert.metric import Metric, metric_of, plain, shrink
from qll.convert.units import EMBEDDING, HEAD
from qll.load import Source
from qll.model import fold_gain, gain_of
from qll.options import ConvertOptions

MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def read_weights(source: Source, members: Sequence[str], options: ConvertOptions) -> list[Tensor]:
    """The float64 weights of `members`, with the norm gain multiplied in when norms are folded."""
    weights = []
    for member in members:
        weight = source.read(f"{member}.weight").to(torch.float64)
        gain = _gain(source, member, options)
        weights.append(weight if gain is None else fold_gain(weight, gain))
    return weights


class ReadMetrics(Sequence[Metric]):
    """The metric of each member of one MLP, read when it is asked for and not kept: three moments
    of 14336 channels in Llama 3 8B are 5 GB."""

    def __init__(
        self, source: Source, moments: MomentStore, members: Sequence[str], options: ConvertOptions
    ) -> None:
        self.source, self.moments, self.members = source, moments, tuple(members)
        self.options = options

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, place: int) -> Metric:
        return _linear_metric(self.source, self.moments, self.members[place], self.options)


def metrics_of(
    source: Source, moments: MomentStore | None, members: Sequence[str], options: ConvertOptions
) -> Sequence[Metric]:
    """The metric of each member, for the weights that `read_weights` gives."""
    if members[0] in (EMBEDDING, HEAD):
        return [_vocabulary_metric(source, moments, members[0], options)]
    if moments is None or options.metric == "plain":
        return [plain() for _ in members]
    if len(members) == len(MLP) and all(map(str.endswith, members, MLP)):
        return ReadMetrics(source, moments, members, options)
    return [_linear_metric(source, moments, member, options) for member in members]


def _linear_metric(
    source: Source, moments: MomentStore, member: str, options: ConvertOptions
) -> Metric:
    of_member, gain = moments.linear(member), _gain(source, member, options)
    if gain is not None:
        of_member = replace(of_member, input=_before_gain(of_member.input, gain))
    return metric_of(of_member, options.metric)


def _gain(source: Source, member: str, options: ConvertOptions) -> Tensor | None:
    """The float64 gain of the norm in front of `member` when it is to be folded, else None."""
    name = gain_of(member, source.config) if options.norms == "fold" else None
    return None if name is None else source.read(name).to(torch.float64)


def _before_gain(moment: Tensor, gain: Tensor) -> Tensor:
    """The second moment of the norm's output before its gain; a zero gain leaves a zero channel."""
    inverse = torch.where(gain == 0, torch.zeros_like(gain), 1 / gain)
    return moment * inverse[:, None] * inverse[None, :]


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
    moment = head.input / head.tokens
    gain = _gain(source, member, options)
    columns = shrink(moment if gain is None else _before_gain(moment, gain), 0.0)
    if member == HEAD:
        return Metric(options.metric, left=rows, right=columns)
    columns = columns / columns.diagonal().mean() + torch.eye(len(columns), dtype=torch.float64)
    return Metric(options.metric, left=rows, right=columns)
