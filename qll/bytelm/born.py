"""Born attention: weights |<k|q>|^2 over the past, normalised, in linear time.

The probability of finding state q in state k is a product of features, |<k|q>|^2 =
tr(k k^* q q^*) = phi(k) . phi(q) with phi(z) = z z^*, so the sums over the past are a matrix state
of d(d + 1)/2 rows for real vectors of width d, and d^2/4 for complex ones. The numbers are
ordinary probabilities: this is linear attention with a quadratic kernel.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from qll.bytelm.config import ModelConfig
from qll.bytelm.context import Context
from qll.bytelm.interference import Rates
from qll.bytelm.linears import linear, norm, through
from qll.bytelm.matrix_state import Writes, chunked, recurrent
from qll.bytelm.positions import mixer_angles
from qll.bytelm.rotary import rotate
from qll.bytelm.state import LayerState

SMALLEST = 1e-6  # added to the sum of the weights


def real_features(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch features"]:
    """phi with phi(x) . phi(y) = (x . y)^2: squares, and sqrt(2) times each product of two.

    >>> x = torch.tensor([1.0, 2.0]); float(real_features(x) @ real_features(x))
    25.0
    """
    first, second = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    return x[..., first] * x[..., second] * _weights(first == second, x)


def complex_features(z: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch features"]:
    """phi with phi(z) . phi(w) = |<z|w>|^2 for split-real z and w: the entries of z z^*.

    >>> z = torch.tensor([1.0, 0.0]); w = torch.tensor([0.0, 3.0])  # 1 and 3i
    >>> float(complex_features(z) @ complex_features(w))
    9.0
    """
    real, imaginary = z.unflatten(-1, (-1, 2)).unbind(-1)
    width = real.shape[-1]
    first, second = torch.triu_indices(width, width, device=z.device)
    weight = _weights(first == second, z)
    same = real[..., first] * real[..., second] + imaginary[..., first] * imaginary[..., second]
    first, second = torch.triu_indices(width, width, offset=1, device=z.device)
    cross = imaginary[..., first] * real[..., second] - real[..., first] * imaginary[..., second]
    return torch.cat((same * weight, cross * math.sqrt(2.0)), dim=-1)


class BornAttention(nn.Module):
    """The mixer; its state is (features x (values and 1))[batch, n_heads, features, d_head + 1]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.width = config, config.mixer.born_width
        narrow = config.n_heads * self.width
        self.features = complex_features if config.mixer.numbers == "complex" else real_features
        self.qk = linear(config, config.d_model, 2 * narrow)
        self.value = linear(config, config.d_model, config.d_model)
        self.rates = Rates(config, config.n_heads, 0)
        self.norm = norm(config, config.d_head)
        self.out = linear(config, config.d_model, config.d_model)
        if config.memory.global_tokens:
            tokens = config.memory.global_tokens
            self.prefix_keys = nn.Parameter(torch.randn(config.n_heads, tokens, self.width))
            self.prefix_values = nn.Parameter(torch.zeros(config.n_heads, tokens, config.d_head))

    def initial_state(self, like: Float[Tensor, "batch d_model"]) -> LayerState:
        """No weight on anything, or on the learned prefix; `like` gives the batch."""
        rows = self.features(like.new_zeros(self.width)).shape[0]
        heads, d_head = self.config.n_heads, self.config.d_head
        state = like.new_zeros(len(like), heads, rows, d_head + 1)
        if self.config.memory.global_tokens:
            keys = self.features(functional.normalize(self.prefix_keys, dim=-1))
            state = state + (keys.transpose(-1, -2) @ _with_one(self.prefix_values)).to(state)
        return (state,)

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: LayerState, context: Context
    ) -> tuple[Float[Tensor, "batch seq d_model"], LayerState]:
        """The mean of past values under the Born weights, and the state after the last position."""
        batch, seq, d_model = x.shape
        heads = self.config.n_heads
        narrow = through(self.qk, x, context).view(batch, seq, 2, heads, -1)
        queries, keys = narrow.permute(2, 0, 3, 1, 4)
        values = through(self.value, x, context).view(batch, seq, heads, -1).transpose(1, 2)
        log_decay, _ = self.rates(x)
        angles = mixer_angles(self.config, context.start, seq, self.width, x.device, state[0].dtype)
        with torch.autocast(x.device.type, enabled=False):
            wide = state[0].dtype
            queries, keys = (
                self.features(rotate(functional.normalize(part.to(wide), dim=-1), angles))
                for part in (queries, keys)
            )
            writes = Writes(
                queries, keys[..., None, :], _with_one(values.to(wide))[..., None, :], log_decay
            )
            mix = recurrent(writes, state[0]) if seq == 1 else None
            sums, after = mix or chunked(writes, state[0], self.config.mixer.chunk)
            context.note("states", after)
            reads = self.norm(sums[..., :-1] / (sums[..., -1:] + SMALLEST))
        reads = reads.transpose(1, 2).reshape(batch, seq, d_model)
        return through(self.out, reads, context), (after,)


def _weights(diagonal: Bool[Tensor, " features"], like: Tensor) -> Float[Tensor, " features"]:
    """1 on the diagonal, sqrt(2) for entries that stand for two, in the dtype of `like`."""
    return torch.where(diagonal, like.new_ones(()), like.new_full((), math.sqrt(2.0)))


def _with_one(values: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width_and_one"]:
    """Values with a last channel of ones, whose weighted sum is the sum of the weights."""
    return functional.pad(values, (0, 1), value=1.0)
