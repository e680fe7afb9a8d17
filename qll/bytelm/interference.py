"""Causal interference: waves v with addresses k are superposed in a matrix, and a query reads them.

    S_t = e^{g_t} S_{t-1} + v_t k_t^*          y_t = sum_states e^{i theta} S_t q_t

v k^* q = v |k||q| e^{i(angle)}: writes whose keys agree with the query add up, others cancel, which
is the cross term 2 Re(psi_1^* psi_2) of two waves. This is gated linear attention with complex
keys (Katharopoulos et al. 2020; Yang et al. 2023); the K states of a head differ in decay and in
the phase at which they are read. With `numbers="real"` keys, queries and values are real vectors
of the same width and the phase is a sign-free weight: the twin, with the same parameters.

The delta variant first erases what the key would have read (Schlag et al. 2021), so that a new
fact replaces the old one instead of being added to it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qll.bytelm.complex_numbers import modulus, times_i
from qll.bytelm.config import ModelConfig
from qll.bytelm.context import Context
from qll.bytelm.linears import gate, linear, norm, through
from qll.bytelm.matrix_state import MatrixState, Writes, chunked, recurrent
from qll.bytelm.rotary import rotate
from qll.bytelm.state import LayerState

SHORTEST, LONGEST = 4.0, 512.0  # bytes after which a state has forgotten 63 %, at the start


class Interference(nn.Module):
    """The mixer; its state is one matrix per head and state, whatever the length of the past."""

    def __init__(self, config: ModelConfig, delta: bool = False) -> None:
        super().__init__()
        self.config, self.delta = config, delta
        self.states = 1 if delta else config.mixer.states
        self.complex = config.mixer.numbers == "complex"
        d_model, heads = config.d_model, config.n_heads
        self.qkvg = linear(config, d_model, 4 * d_model)
        self.rates = Rates(config, heads * self.states, heads if delta else 0)
        # of a single state it would be absorbed by what follows
        self.read_weight = nn.Parameter(self._start_weights(heads)) if self.states > 1 else None
        self.norm = norm(config, config.d_head)
        self.gate = gate(config, d_model)
        self.out = linear(config, d_model, d_model)
        if config.memory.global_tokens:
            shape = (2, heads, config.memory.global_tokens, config.d_head)
            self.prefix = nn.Parameter(torch.randn(shape) * config.d_head**-0.5)

    def _start_weights(self, heads: int) -> Tensor:
        """Phases 0 (complex) or weights 1 (real) of the states of every head."""
        start = torch.zeros if self.complex else torch.ones
        return start(self.states, heads)

    def initial_state(self, like: Float[Tensor, "batch d_model"]) -> LayerState:
        """Nothing written yet, or what the learned prefix writes; `like` gives the batch."""
        heads, width = self.config.n_heads, self.config.d_head
        state = like.new_zeros(len(like), self.states * heads, width, width)
        if self.config.memory.global_tokens:
            keys, values = self.prefix
            keys, values = self._many(keys), self._many(values)
            written = keys.flatten(1, 2).transpose(-1, -2) @ values.flatten(1, 2)
            state = state + written.repeat(self.states, 1, 1).to(state)
        return (state,)

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: LayerState, context: Context
    ) -> tuple[Float[Tensor, "batch seq d_model"], LayerState]:
        """What each position reads, and the state after the last one."""
        batch, seq, d_model = x.shape
        heads = self.config.n_heads
        parts = through(self.qkvg, x, context).view(batch, seq, 4, heads, -1)
        gates = parts[:, :, 3].reshape(batch, seq, d_model)
        queries, keys, values = parts[:, :, :3].permute(2, 0, 3, 1, 4)
        log_decay, rate = self.rates(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = state[0].dtype
            queries, keys = (rotate(part.to(wide), context.angles) for part in (queries, keys))
            writes = self._writes(queries, keys, values.to(wide), log_decay, rate)
            reads, after = self._mix(writes, state[0])
            context.note("states", after)
            reads = self.norm(self._superpose(reads))
        reads = reads.transpose(1, 2).reshape(batch, seq, d_model)
        return through(self.out, self.gate(gates, reads), context), (after,)

    def _writes(
        self, queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, rate: Tensor | None
    ) -> Writes:
        """Queries, keys and values of every state, keys scaled for the rule."""
        if self.delta:
            keys = functional.normalize(keys, dim=-1, eps=1e-6)
            queries = functional.normalize(queries, dim=-1, eps=1e-6)
        else:
            scale = 1 / math.sqrt(self.config.d_head)
            queries = queries * scale
        many = self.states
        queries = queries.repeat(1, many, 1, 1) if many > 1 else queries
        keys, values = self._many(keys), self._many(values)
        if many > 1:
            keys, values = (part.repeat(1, many, 1, 1, 1) for part in (keys, values))
        return Writes(queries, keys, values, log_decay, rate)

    def _many(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch writes width"]:
        """What one position writes: x, and i x with it when numbers are complex."""
        return torch.stack((x, times_i(x)), dim=-2) if self.complex else x[..., None, :]

    def _mix(self, writes: Writes, state: MatrixState) -> tuple[Tensor, MatrixState]:
        if writes.queries.shape[2] == 1:
            return recurrent(writes, state)
        return chunked(writes, state, self.config.mixer.chunk)

    def _superpose(self, reads: Float[Tensor, "batch all seq width"]) -> Tensor:
        """The sum of a head's states, each turned by its phase (complex) or weighted (real)."""
        if self.read_weight is None:
            return reads
        reads = reads.unflatten(1, (self.states, -1))
        weight = self.read_weight.to(reads)[:, :, None, None]
        if self.complex:
            return rotate(reads, (weight.cos(), weight.sin())).sum(dim=1)
        return (reads * weight).sum(dim=1)


class Rates(nn.Module):
    """How fast each head forgets, and how strongly it writes: functions of the position's vector.

    log decay = -exp(a) softplus(w x + b) (Gu and Dao 2023), so that decays are in (0, 1); write
    rates are sigmoids. A complex stream shows them its moduli only.
    """

    def __init__(self, config: ModelConfig, decays: int, rates: int) -> None:
        super().__init__()
        self.complex_stream = config.stream.numbers == "complex"
        seen = config.d_model // 2 if self.complex_stream else config.d_model
        self.decays = decays
        self.project = nn.Linear(seen, decays + rates)
        self.log_speed = nn.Parameter(self._spread(decays))

    @staticmethod
    def _spread(decays: int) -> Tensor:
        """Time scales in geometric progression; softplus(0) = log 2 is divided out."""
        scales = torch.linspace(math.log(SHORTEST), math.log(LONGEST), decays)
        return -scales - math.log(math.log(2))

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> tuple[Tensor, Tensor | None]:
        """(log decay[batch, decays, seq], write rate[batch, rates, seq] or None)."""
        seen = modulus(x).to(x.dtype) if self.complex_stream else x
        raw = self.project(seen).transpose(1, 2)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        speed = self.log_speed.to(raw).exp()[:, None]
        log_decay = -speed * functional.softplus(raw[:, : self.decays])
        rate = raw[:, self.decays :].sigmoid() if raw.shape[1] > self.decays else None
        return log_decay, rate
