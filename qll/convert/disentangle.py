"""The gauge freedoms inside a block of a Llama, used to make its matrices easier to split.

Three changes of basis leave the block the same function and are absorbed in its weights, so the
saved folder is an ordinary one: the order of the MLP's channels (rows of gate and up, columns of
down), an orthogonal basis of the values of each key-value head (rows of v, columns of o), and a
rotation of each rotary pair of each key-value head (rows of q and k; it commutes with the rotary
embedding, which turns the same plane). A truncated SVD does not see them; what splits an index
into legs or panels does. All three are orthogonal, so second moments of inputs and of output
gradients turn alike: G becomes R G R^T.

Rotating the residual stream is left out: it would untie a tied embedding, which costs parameters,
and take the stream out of the basis that autoencoders were trained in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from qll.convert.metric import Metric
from qll.convert.panelling import importance

# linear of a block -> (axis of its weight that turns, freedom that turns it)
TURNED = {
    "self_attn.q_proj": (0, "rotary"),
    "self_attn.k_proj": (0, "rotary"),
    "self_attn.v_proj": (0, "heads"),
    "self_attn.o_proj": (1, "heads"),
    "mlp.gate_proj": (0, "channels"),
    "mlp.up_proj": (0, "channels"),
    "mlp.down_proj": (1, "channels"),
}
FREEDOMS = ("channels", "heads", "rotary")


@dataclass(frozen=True)
class BlockGauge:
    """A basis per freedom; None leaves it as it is."""

    channels: Int64[Tensor, " d_ff"] | None = None
    """The old place of each channel of the MLP."""
    heads: Float64[Tensor, "kv_heads d_head d_head"] | None = None
    """R of the values of each key-value head: v becomes R v."""
    rotary: Float64[Tensor, "kv_heads d_head d_head"] | None = None
    """R of the keys, and of the queries that meet them; mixes i and i + d_head / 2 only."""

    def weight(self, linear: str, weight: Float[Tensor, "out into"]) -> Float[Tensor, "out into"]:
        """The weight of `linear` (a key of TURNED) in this gauge, float32 at least where turned.

        >>> gauge = BlockGauge(channels=torch.tensor([1, 0]))
        >>> gauge.weight("mlp.down_proj", torch.tensor([[1.0, 2.0]])).tolist()
        [[2.0, 1.0]]
        """
        axis, freedom = TURNED[linear]
        basis = getattr(self, freedom)
        return weight if basis is None else turned(weight, basis, axis)

    def moment(self, linear: str, moment: Float[Tensor, "n n"], axis: int) -> Float[Tensor, "n n"]:
        """The second moment of the output gradient (axis 0) or the input (1) in this gauge."""
        turning, freedom = TURNED[linear]
        basis = getattr(self, freedom)
        if basis is None or axis != turning:
            return moment
        return turned(turned(moment, basis, 0), basis, 1)


def turned(
    tensor: Float[Tensor, "rows columns"],
    basis: Int64[Tensor, " size"] | Float64[Tensor, "kv_heads d_head d_head"],
    axis: int,
) -> Float[Tensor, "rows columns"]:
    """`tensor` with one axis in another basis: reordered, or each head's entries times its R.

    Consecutive heads share the R of their key-value head.

    >>> swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    >>> turned(torch.eye(4), swap, 0)[:, 2:].tolist()
    [[0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    """
    if basis.ndim == 1:
        return tensor.index_select(axis, basis)
    kv_heads, d_head, _ = basis.shape
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).movedim(axis, 0)
    heads = wide.reshape(kv_heads, -1, d_head, wide.shape[1])
    image = torch.einsum("kij,khjn->khin", basis.to(wide.dtype), heads)
    return image.reshape(wide.shape).movedim(0, axis)


def choose_gauge(
    weights: Mapping[str, Float64[Tensor, "_ _"]],
    metrics: Mapping[str, Metric],
    d_head: int,
    freedoms: Sequence[str] = FREEDOMS,
) -> BlockGauge:
    """The gauge in which what matters in the metric comes first.

    `weights` and `metrics` by linear of the block. Channels by falling importance to gate, up and
    down together; values and rotary pairs on their principal axes.

    >>> weights = {name: torch.ones(4, 4).double() for name in TURNED}
    >>> weights["mlp.up_proj"][2] = 9.0
    >>> metrics = dict.fromkeys(TURNED, Metric("plain"))
    >>> choose_gauge(weights, metrics, d_head=2, freedoms=["channels"]).channels.tolist()
    [2, 0, 1, 3]
    """
    chosen = {
        "channels": lambda: _falling_channels(weights, metrics),
        "heads": lambda: _principal_values(weights, metrics, d_head),
        "rotary": lambda: _principal_pairs(weights, metrics, d_head),
    }
    return BlockGauge(**{freedom: chosen[freedom]() for freedom in freedoms})


def _falling_channels(weights: Mapping[str, Tensor], metrics: Mapping[str, Metric]) -> Tensor:
    total = sum(
        importance(weights[linear], metrics[linear], axis)
        for linear, (axis, freedom) in TURNED.items()
        if freedom == "channels"
    )
    return total.argsort(descending=True, stable=True)


def _principal_values(
    weights: Mapping[str, Tensor], metrics: Mapping[str, Metric], d_head: int
) -> Tensor:
    """Rows: eigenvectors of the second moment of each head's values, the largest first."""
    heads = _row_moments(weights, metrics, "self_attn.v_proj", d_head)
    return torch.linalg.eigh(heads).eigenvectors.flip(-1).mT.contiguous()


def _principal_pairs(
    weights: Mapping[str, Tensor], metrics: Mapping[str, Metric], d_head: int
) -> Tensor:
    """Rotations that diagonalise the 2 x 2 moment of each pair, queries and keys weighed alike."""
    keys = _row_moments(weights, metrics, "self_attn.k_proj", d_head)
    queries = _row_moments(weights, metrics, "self_attn.q_proj", d_head)
    queries = queries.reshape(len(keys), -1, d_head, d_head).sum(1)
    half = d_head // 2
    total = sum(moment / _pair_traces(moment, half) for moment in (keys, queries))
    first, second = total.diagonal(0, -2, -1).split(half, dim=-1)
    cross = total.diagonal(half, -2, -1)
    angle = 0.5 * torch.atan2(2 * cross, first - second)
    cosine, sine = torch.diag_embed(angle.cos()), torch.diag_embed(angle.sin())
    upper, lower = torch.cat((cosine, sine), -1), torch.cat((-sine, cosine), -1)
    return torch.cat((upper, lower), -2)


def _row_moments(
    weights: Mapping[str, Tensor], metrics: Mapping[str, Metric], linear: str, d_head: int
) -> Float64[Tensor, "heads d_head d_head"]:
    """W_h G_in W_h^T of each head h: the second moment of its outputs."""
    seen = Metric("", right=metrics[linear].right).weighted(weights[linear])
    heads = weights[linear].reshape(-1, d_head, seen.shape[1])
    return torch.einsum("hin,hjn->hij", seen.reshape(heads.shape), heads)


def _pair_traces(moment: Shaped[Tensor, "heads d d"], half: int) -> Tensor:
    """Per entry (i, j), the geometric mean of the traces of the pairs of i and of j."""
    diagonal = moment.diagonal(0, -2, -1)
    trace = (diagonal[..., :half] + diagonal[..., half:]).clamp(min=1e-300).sqrt()
    both = torch.cat((trace, trace), -1)
    return both[..., :, None] * both[..., None, :]
