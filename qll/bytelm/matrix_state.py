"""A memory that is a matrix: outer products are written, decay, are erased, and answer queries.

    additive   S_t = e^{g_t} S_{t-1} + k_t v_t^T                                y_t = q_t^T S_t
    delta      S_t = e^{g_t} (1 - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T        (k of length 1)

(Katharopoulos et al. 2020, eq. 18; Yang et al. 2024, "Gated Delta Networks", eq. 10.) Each position
may write several keys at once. A complex memory writes two, (k, v) and (ik, iv): with the real
inner product of split-real vectors this is y = (k* q) v, and since k and ik are orthogonal the
delta rule erases the whole complex line of k.

`chunked` splits the sequence: inside a chunk everything is a matrix product, with

    u_t = b_t (v_t - e^{c_t} S_0^T k_t - sum_{s<t} e^{c_t - c_s} (k_s . k_t) u_s)

solved for all t at once (the WY form; additive: u = v), and one small product per chunk carries S.
One chunk as long as the sequence is the parallel form; `recurrent` is the definition, byte by byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

MatrixState = Float[Tensor, "batch heads d_key d_value"]


@dataclass(frozen=True)
class Writes:
    """What a sequence of positions does to a matrix state."""

    queries: Float[Tensor, "batch heads seq d_key"]
    keys: Float[Tensor, "batch heads seq writes d_key"]
    values: Float[Tensor, "batch heads seq writes d_value"]
    log_decay: Float[Tensor, "batch heads seq"]
    """At most 0."""
    rate: Float[Tensor, "batch heads seq"] | None = None
    """b of the delta rule, in [0, 1]; None is additive."""


def recurrent(
    writes: Writes, state: MatrixState
) -> tuple[Float[Tensor, "batch heads seq d_value"], MatrixState]:
    """(reads, state after the last position), one position after the other.

    >>> one = torch.ones(1, 1, 3, 1)
    >>> add = Writes(one, one[..., None], one[..., None], torch.zeros(1, 1, 3))
    >>> recurrent(add, torch.zeros(1, 1, 1, 1))[0].flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    reads = []
    for t in range(writes.queries.shape[2]):
        keys, values = writes.keys[:, :, t], writes.values[:, :, t]
        state = state * writes.log_decay[:, :, t, None, None].exp()
        if writes.rate is not None:
            values = (values - keys @ state) * writes.rate[:, :, t, None, None]
        state = state + keys.transpose(-1, -2) @ values
        reads.append(writes.queries[:, :, t, None] @ state)
    return torch.cat(reads, dim=2), state


def chunked(
    writes: Writes, state: MatrixState, chunk: int
) -> tuple[Float[Tensor, "batch heads seq d_value"], MatrixState]:
    """What `recurrent` returns, by matrix products over chunks of `chunk` positions.

    >>> x = torch.randn(1, 1, 5, 4)
    >>> add = Writes(x, x[:, :, :, None], x[:, :, :, None], torch.zeros(1, 1, 5))
    >>> start = torch.zeros(1, 1, 4, 4)
    >>> chunked(add, start, 2)[0].allclose(recurrent(add, start)[0], atol=1e-5)
    True
    """
    seq = writes.queries.shape[2]
    chunk = min(chunk, seq)
    padding = -seq % chunk
    queries, log_decay = (_chunks(x, padding, chunk) for x in (writes.queries, writes.log_decay))
    keys, values = (_chunks(x, padding, chunk).flatten(3, 4) for x in (writes.keys, writes.values))
    many = writes.keys.shape[3]
    since_start = log_decay.cumsum(dim=-1)
    decay = _decay_between(since_start)
    if many > 1:
        decay = decay.repeat_interleave(many, dim=-1)
    at_write = since_start.repeat_interleave(many, dim=-1) if many > 1 else since_start
    erase = None
    if writes.rate is not None:
        rate = _chunks(writes.rate, padding, chunk).repeat_interleave(many, dim=-1)
        values, erase = _solved(keys, values, rate, decay, at_write, many)
    inside = (queries @ keys.transpose(-1, -2)) * decay
    queries = queries * since_start.exp()[..., None]
    to_end = (since_start[..., -1:] - at_write).exp()[..., None] * keys
    kept = since_start[..., -1].exp()
    if erase is None:
        before, state = _carried(to_end.transpose(-1, -2) @ values, since_start[..., -1], state)
    else:
        before, values, state = _erased(to_end, values, erase, kept, state)
    reads = inside @ values + queries @ before
    return reads.flatten(2, 3)[:, :, :seq], state


def _chunks(x: Tensor, padding: int, chunk: int) -> Tensor:
    """[batch, heads, seq, ...] as [batch, heads, chunks, chunk, ...]; padding neither writes nor
    decays."""
    if padding:
        x = functional.pad(x, (0, 0) * (x.ndim - 3) + (0, padding))
    return x.unflatten(2, (-1, chunk))


def _decay_between(
    since_start: Float[Tensor, "*batch seq"],
) -> Float[Tensor, "*batch seq seq"]:
    """exp(c_t - c_s) for s <= t, 0 in the future; masked before exp, which so cannot overflow."""
    seq = since_start.shape[-1]
    past = torch.ones(seq, seq, dtype=torch.bool, device=since_start.device).tril()
    difference = since_start[..., :, None] - since_start[..., None, :]
    return difference.masked_fill(~past, -torch.inf).exp()


def _carried(
    written: Float[Tensor, "batch heads chunks d_key d_value"],
    log_decay: Float[Tensor, "batch heads chunks"],
    state: MatrixState,
) -> tuple[Tensor, MatrixState]:
    """States before every chunk, and after the last, of additive writes: one matrix product."""
    total = functional.pad(log_decay.cumsum(dim=-1), (1, 0))
    decay = _decay_between(total)
    entries = torch.cat((state[:, :, None], written), dim=2)
    states = (decay @ entries.flatten(3)).unflatten(-1, written.shape[-2:])
    return states[:, :, :-1], states[:, :, -1]


def _solved(
    keys: Tensor, values: Tensor, rate: Tensor, decay: Tensor, at_write: Tensor, many: int
) -> tuple[Tensor, Tensor]:
    """(what each write adds if the chunk starts from nothing, how it depends on the start)."""
    same = torch.arange(keys.shape[-2], device=keys.device) // many
    earlier = same[:, None] > same[None, :]
    decay = decay.repeat_interleave(many, dim=-2) if many > 1 else decay
    overlap = (keys @ keys.transpose(-1, -2)) * decay * rate[..., None]
    inverse = unit_lower_inverse(overlap * earlier)
    adds = inverse @ (values * rate[..., None])
    erase = inverse @ (keys * (rate * at_write.exp())[..., None])
    return adds, erase


def _erased(
    to_end: Tensor, values: Tensor, erase: Tensor, kept: Tensor, state: MatrixState
) -> tuple[Tensor, Tensor, MatrixState]:
    """States before every chunk, what is really written, and the last state, of the delta rule."""
    before, written = [], []
    for index in range(values.shape[2]):
        before.append(state)
        written.append(values[:, :, index] - erase[:, :, index] @ state)
        state = state * kept[:, :, index, None, None]
        state = state + to_end[:, :, index].transpose(-1, -2) @ written[-1]
    return torch.stack(before, dim=2), torch.stack(written, dim=2), state


def unit_lower_inverse(
    below: Float[Tensor, "*batch seq seq"],
) -> Float[Tensor, "*batch seq seq"]:
    """(1 + L)^-1 for a strictly lower triangular L, by doubling: log2(seq) rounds of products.

    [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]] for all diagonal blocks at once. It
    needs no linear algebra of the backend, and unlike a power series does not lose digits when
    keys repeat.

    >>> low = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    >>> unit_lower_inverse(low).tolist()
    [[1.0, 0.0], [-3.0, 1.0]]
    """
    seq, size = below.shape[-1], 1
    padding = (1 << (seq - 1).bit_length()) - seq
    below = functional.pad(below, (0, padding, 0, padding))
    full = seq + padding
    # inverses of the diagonal blocks of the current size
    inverse = below.new_ones(*below.shape[:-2], full, 1, 1)
    while size < full:
        pairs = full // (2 * size)
        blocks = below.unflatten(-1, (pairs, 2 * size)).unflatten(-3, (pairs, 2 * size))
        diagonal = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        corner = diagonal[..., size:, :size]
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -(second @ corner @ first)
        upper = torch.cat((first, torch.zeros_like(first)), dim=-1)
        inverse = torch.cat((upper, torch.cat((corner, second), dim=-1)), dim=-2)
        size *= 2
    return inverse[..., 0, :seq, :seq]
