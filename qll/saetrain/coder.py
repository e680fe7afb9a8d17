"""An autoencoder while it learns: its parameters, its loss, and how it becomes a file.

Everything happens in units in which targets have mean square distance 1 from their mean, so that a
learning rate means the same at every place and the squared error per token is the FVU; the units
are multiplied into the weights when it is saved.

    z = x - b_dec                 (a transcoder reads x itself)
    f = activation(W_enc z + b_enc)             y = sum_i f_i W_dec_i + b_dec  (+ W_skip x)

topk        the k largest, after a ReLU (Gao et al. 2024, "Scaling and evaluating SAEs")
multitopk   the same, and an eighth of the error with 4 k features is added to the loss (ibid.)
jumprelu    h where h > threshold (Rajamanoharan et al. 2024, arXiv 2407.14435), with the penalty
            l0_weight (L0 / k - 1)^2 and pseudo-derivatives of `qll.saetrain.jumprelu`
transcoder  topk from the input of a module to its output (Dunefsky et al. 2024)

AuxK (Gao et al.): the d / 2 strongest dead features reconstruct the error the others leave.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from qll.load.sae_file import LatentMatrix, SAESpec, StoredSAE
from qll.load.sae_names import hookpoint_of
from qll.saetrain.jumprelu import fires, jump_relu
from qll.saetrain.select import passing, strongest
from qll.saetrain.settings import Kind
from qll.saetrain.sparse import Pattern, combine, products

MULTI = 4  # multitopk is good up to so many times k
MULTI_WEIGHT = 1 / 8
# bfloat16 may misplace a pre-activation by this share; who is in doubt is computed exactly
MARGIN = 0.02


@dataclass(frozen=True)
class CoderShape:
    """What an autoencoder is, before it has weights."""

    hookpoint: str
    """The module whose output it writes (and reads, unless it is a transcoder)."""
    kind: Kind
    d_in: int
    d_out: int
    d_sae: int
    k: int
    skip: bool = False
    l0_weight: float = 1.0
    bandwidth: float = 0.05

    @property
    def transcodes(self) -> bool:
        """Whether it reads another place than it writes."""
        return self.kind == "transcoder"

    @property
    def reads(self) -> str:
        """The place it reads, by the house's name."""
        return hookpoint_of(f"{self.hookpoint}.input" if self.transcodes else self.hookpoint)


@dataclass(frozen=True)
class Codes:
    """What some tokens gave: the loss to minimise, and what a step reports."""

    loss: Float[Tensor, ""]
    error: Float[Tensor, "tokens d_out"]
    """Reconstruction minus target."""
    fires: Int[Tensor, " d_sae"]
    """Tokens each feature fired on."""


class Coder(nn.Module):
    """Parameters in the coder's own units, and the scales that lead there.

    >>> coder = Coder(CoderShape("layers.0", "topk", 4, 4, 8, k=2), seed=0)
    >>> x = torch.randn(64, 4)
    >>> coder.start(x, x, torch.zeros(4))
    >>> bool(coder(x, x).fires.sum() <= 2 * 64), coder.W_dec.norm(dim=1).allclose(torch.ones(8))
    (True, True)
    """

    def __init__(self, shape: CoderShape, seed: int) -> None:
        super().__init__()
        self.shape, generator = shape, torch.Generator().manual_seed(seed)
        directions = torch.randn(shape.d_sae, shape.d_in, generator=generator)
        directions = functional.normalize(directions, dim=1)
        self.W_enc = nn.Parameter(directions)
        # a transcoder has no direction to begin with on its other side: it starts from nothing
        decoder = torch.zeros(shape.d_sae, shape.d_out) if shape.transcodes else directions.clone()
        self.W_dec = nn.Parameter(decoder)
        self.b_enc = nn.Parameter(torch.zeros(shape.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(shape.d_out))
        if shape.skip:
            self.W_skip = nn.Parameter(torch.zeros(shape.d_out, shape.d_in))
        if shape.kind == "jumprelu":
            self.log_threshold = nn.Parameter(torch.zeros(shape.d_sae))
        self.register_buffer("scale_in", torch.ones(()))
        self.register_buffer("scale_out", torch.ones(()))

    @torch.no_grad()
    def start(
        self,
        x: Float[Tensor, "tokens d_in"],
        y: Float[Tensor, "tokens d_out"],
        center: Float[Tensor, " d_out"],
    ) -> None:
        """Take units and b_dec from the first activations, and thresholds at the wanted rate."""
        for scale, values in ((self.scale_in, x), (self.scale_out, y)):
            scale.copy_((values - values.mean(dim=0)).square().sum(dim=1).mean().sqrt())
        self.b_dec.copy_(center / self.scale_out)
        if self.shape.transcodes:  # what b_dec does for the input of an autoencoder
            self.b_enc.copy_(-self.W_enc @ (x.mean(dim=0) / self.scale_in))
        if self.shape.kind == "jumprelu":
            few = x[:2048] / self.scale_in - self.b_dec
            rate = 1 - self.shape.k / self.shape.d_sae
            places = torch.quantile(few @ self.W_enc.T, rate, dim=0)
            self.log_threshold.copy_(places.clamp(min=1e-3).log())

    def forward(
        self,
        x: Float[Tensor, "tokens d_in"],
        y: Float[Tensor, "tokens d_out"],
        dead: Bool[Tensor, " d_sae"] | None = None,
        auxk: float = 0.0,
        precision: torch.dtype = torch.float32,
    ) -> Codes:
        """Loss and by-products on activations x -> y, given in the units of the model.

        dead: features that AuxK gives work to, with weight `auxk`.
        """
        z, target = x / self.scale_in, y / self.scale_out
        straight = self.b_dec + functional.linear(z, self.W_skip) if self.shape.skip else self.b_dec
        if not self.shape.transcodes:
            z = z - self.b_dec.detach()
        pattern, values, loss = self._encode(z, target - straight, precision)
        error = combine(values, self.W_dec, pattern) + straight - target
        loss = loss + error.square().sum(dim=1).mean()
        if auxk and dead is not None and dead.any():
            loss = loss + auxk * self._auxk(z, error.detach(), dead, precision)
        counts = pattern.indices[values > 0].bincount(minlength=self.shape.d_sae)
        return Codes(loss, error.detach(), counts)

    def _encode(
        self, z: Tensor, wanted: Tensor, precision: torch.dtype
    ) -> tuple[Pattern, Tensor, Tensor | float]:
        """Which features fire and how strongly, and what the kind adds to the loss."""
        shape = self.shape
        if shape.kind == "jumprelu":
            threshold = self.log_threshold.exp()
            floor = (threshold.detach() - shape.bandwidth / 2).clamp(min=0) * (1 - MARGIN)
            pattern = passing(z, self.W_enc, self.b_enc, floor, precision)
            before = self._before(z, pattern)
            own = threshold.index_select(0, pattern.indices)
            l0 = fires(before, own, shape.bandwidth).sum() / len(z)
            penalty = shape.l0_weight * (l0 / shape.k - 1).square()
            return pattern, jump_relu(before, own, shape.bandwidth), penalty
        width = shape.k if shape.kind != "multitopk" else min(MULTI * shape.k, shape.d_sae)
        chosen = strongest(z, self.W_enc, self.b_enc, width, precision)
        pattern = Pattern.of(chosen, shape.d_sae)
        values = self._before(z, pattern).relu()
        if shape.kind != "multitopk":
            return pattern, values, 0.0
        error = combine(values, self.W_dec, pattern) - wanted
        first = values.view(len(z), width)[:, : shape.k].flatten()
        narrow = Pattern.of(chosen[:, : shape.k].contiguous(), shape.d_sae)
        return narrow, first, MULTI_WEIGHT * error.square().sum(dim=1).mean()

    def _before(self, z: Tensor, pattern: Pattern) -> Tensor:
        """Pre-activations of the entries of `pattern`, in float32."""
        bias = self.b_enc
        if not self.shape.transcodes:
            # z holds b_dec as a constant; this adds zero, and the gradient that is missing there,
            # summed over tokens before it meets the matrix
            bias = bias - self.W_enc.detach() @ (self.b_dec - self.b_dec.detach())
        return products(z, self.W_enc, pattern) + bias.index_select(0, pattern.indices)

    def _auxk(self, z: Tensor, error: Tensor, dead: Tensor, precision: torch.dtype) -> Tensor:
        places = dead.nonzero()[:, 0]
        most = self.shape.d_out // 2
        k = min(most, len(places))
        chosen = strongest(z, self.W_enc[places], self.b_enc[places], k, precision)
        pattern = Pattern.of(places[chosen], self.shape.d_sae)
        made = combine(self._before(z, pattern).relu(), self.W_dec, pattern)
        return min(len(places) / most, 1.0) * (made + error).square().sum(dim=1).mean()

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Take from the decoder's gradient what would only change the length of its rows."""
        if not self.shape.transcodes:
            along = torch.linalg.vecdot(self.W_dec.grad, self.W_dec)
            self.W_dec.grad.addcmul_(along[:, None], self.W_dec, value=-1)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Bring the rows of the decoder back to length 1."""
        if not self.shape.transcodes:
            self.W_dec.copy_(functional.normalize(self.W_dec, dim=1))

    @torch.no_grad()
    def revive(
        self,
        features: Int[Tensor, " n"],
        x: Float[Tensor, "tokens d_in"],
        error: Float[Tensor, "tokens d_out"],
        generator: torch.Generator,
    ) -> None:
        """Start `features` anew, each for a token that is badly reconstructed.

        Tokens are drawn by squared error (Bricken et al. 2023); the feature then reads what the
        token is and writes what it lacked.
        """
        chances = error.square().sum(dim=1).cpu().double()
        drawn = chances.multinomial(len(features), replacement=True, generator=generator)
        drawn = drawn.to(x.device)
        lacked = functional.normalize(-error[drawn], dim=1)
        read, mean = lacked, x.mean(dim=0) / self.scale_in
        if self.shape.transcodes:
            read = functional.normalize(x[drawn] / self.scale_in - mean, dim=1)
            lacked = lacked * self.W_dec.norm(dim=1).mean()
        self.W_enc[features] = read * self.W_enc.norm(dim=1).mean()
        self.W_dec[features] = lacked
        self.b_enc[features] = -self.W_enc[features] @ mean if self.shape.transcodes else 0
        if self.shape.kind == "jumprelu":
            self.log_threshold[features] = self.log_threshold.median()

    @torch.no_grad()
    def stored(self, dtype: torch.dtype) -> StoredSAE:
        """The autoencoder in the units of the model, as it is written to a file."""
        shape, ratio = self.shape, self.scale_out / self.scale_in
        vectors = {"b_enc": self.b_enc * self.scale_out, "b_dec": self.b_dec * self.scale_out}
        if shape.skip:
            vectors["W_skip"] = self.W_skip * ratio
        if shape.kind == "jumprelu":
            vectors["threshold"] = self.log_threshold.exp() * self.scale_out
        spec = SAESpec(
            shape.reads,
            shape.d_in,
            shape.d_sae,
            shape.d_out,
            "jumprelu" if shape.kind == "jumprelu" else "topk",
            k=None if shape.kind == "jumprelu" else shape.k,
            subtract_b_dec=not shape.transcodes,
            writes=hookpoint_of(shape.hookpoint),
            facts={
                "multi_topk": shape.kind == "multitopk",
                "normalize_decoder": not shape.transcodes,
            },
        )
        return StoredSAE(
            spec,
            LatentMatrix((self.W_enc * ratio).detach().to("cpu", dtype)),
            LatentMatrix(self.W_dec.detach().to("cpu", dtype)),
            {name: vector.detach().cpu() for name, vector in vectors.items()},
        )
