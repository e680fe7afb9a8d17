"""A codebook in the residual stream: what flows on is said in a few of a fixed set of directions.

    vq     z = norm(x), q the nearest code, x + gain * q   (straight through: van den Oord 2017)
    topk   a = the k largest of relu(W_enc z + b), x + W_dec a
    dense  the same without the selection: topk's twin, with the same parameters
    sae    x + gain * (sae(x) - x) with a frozen autoencoder trained before (`use_sae`)

The layer's own loss pulls codes towards what they stand for, and (vq) the stream towards its codes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from qll.bytelm.config import ModelConfig
from qll.bytelm.context import Context
from qll.bytelm.norm import RMSNorm
from qll.errors import ShapeError, UsageError
from qll.lens.sae import SAE

COMMITMENT = 0.25  # weight of moving the stream to its code, of van den Oord et al. 2017


class Concept(nn.Module):
    """The concept layer of a model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind, self.k = config.concept.kind, config.concept.k
        codes, width = config.concept.codes, config.d_model
        if self.kind == "sae":
            # what `use_sae` or a saved model fills; it never learns
            shapes = {"W_enc": (codes, width), "b_enc": (codes,), "W_dec": (codes, width)}
            for name, shape in (*shapes.items(), ("b_dec", (width,))):
                self.register_buffer(name, torch.zeros(shape))
            self.gain = nn.Parameter(torch.zeros(width))
            return
        self.norm = RMSNorm(width)
        self.codebook = nn.Parameter(torch.randn(codes, width) * (width**-0.5))
        if self.kind == "vq":
            self.gain = nn.Parameter(torch.full((width,), 0.1))
        else:
            self.W_enc = nn.Parameter(self.codebook.detach().clone())
            self.b_enc = nn.Parameter(torch.zeros(codes))

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], context: Context
    ) -> Float[Tensor, "batch seq d_model"]:
        """The stream after the codebook; its loss is noted, and the codes used."""
        if self.kind == "vq":
            return self._quantised(x, context)
        if self.kind == "sae":
            return x + self.gain * (self._reconstructed(x, context) - x)
        z = self.norm(x)
        strengths = functional.linear(z, self.W_enc, self.b_enc).relu()
        if self.kind == "topk":
            strengths = strongest(strengths, self.k)
        said = strengths @ self.codebook
        if context.notes is not None:
            target = z.detach().to(said)
            missing = (said - target).square().sum() / target.square().sum()
            context.note("codebook", missing)
            context.note("codes", strengths.detach())
        return x + said

    def _quantised(self, x: Tensor, context: Context) -> Tensor:
        z = self.norm(x)
        index = nearest(z.detach(), self.codebook.detach())
        code = self.codebook[index].to(z.dtype)
        if context.notes is not None:
            learns = (code - z.detach()).square().mean()
            commits = (z - code.detach()).square().mean()
            context.note("codebook", learns + COMMITMENT * commits)
            context.note("codes", index)
        return x + self.gain * (z + (code - z).detach())

    def _reconstructed(self, x: Tensor, context: Context) -> Tensor:
        strengths = functional.linear(x - self.b_dec, self.W_enc, self.b_enc).relu()
        strengths = strongest(strengths, self.k)
        context.note("codes", strengths.detach())
        return strengths @ self.W_dec + self.b_dec


def nearest(
    z: Float[Tensor, "*batch width"], codebook: Float[Tensor, "codes width"]
) -> Int[Tensor, " *batch"]:
    """Index of the code with the least distance to each vector.

    >>> nearest(torch.tensor([[0.9, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])).tolist()
    [1]
    """
    codebook = codebook.to(z.dtype)
    return (2 * z @ codebook.T - codebook.square().sum(dim=1)).argmax(dim=-1)


def strongest(strengths: Float[Tensor, "*batch codes"], k: int) -> Float[Tensor, "*batch codes"]:
    """All but the k largest of each row set to 0.

    >>> strongest(torch.tensor([3.0, 1.0, 2.0]), 2).tolist()
    [3.0, 0.0, 2.0]
    """
    top = strengths.topk(k, dim=-1)
    return torch.zeros_like(strengths).scatter(-1, top.indices, top.values)


def use_sae(model: nn.Module, sae: SAE, layer: int | None = None) -> nn.Module:
    """A copy of a ByteModel with `sae` (from `qll.load_sae`) as frozen codebook after `layer`.

    It computes what the model did until its gain is trained: `save_model` it, and give the folder
    to `qll lm train --checkpoint`. Raises ShapeError for another width,
    UsageError for an autoencoder that is not a plain top-k one.
    """
    spec = sae.spec
    if spec.activation != "topk" or spec.normalize not in (None, "none") or sae.needs_input:
        raise UsageError(
            "not an autoencoder the concept layer can use",
            where=spec.hookpoint,
            expected="top-k, without normalisation or skip connection",
            found=f"{spec.activation}, normalisation {spec.normalize}",
            hint="train a top-k one on this model's stream, in a layout that load_sae reads",
        )
    if spec.d_in != model.config.d_model:
        raise ShapeError(
            "another width", where="use_sae", expected=model.config.d_model, found=spec.d_in
        )
    concept = replace(model.config.concept, kind="sae", codes=spec.d_sae, k=spec.k, layer=layer)
    changed = type(model)(replace(model.config, concept=concept)).to(model.embedding.weight)
    own = {n: t for n, t in model.state_dict().items() if not n.startswith("concept.")}
    vectors, rows = sae.stored.vectors, torch.arange(spec.d_sae)
    b_dec = vectors["b_dec"]
    # the encoder of an SAE that does not subtract b_dec sees x: move the difference into b_enc
    encoder = sae.stored.encoder.rows(rows).float()
    b_enc = vectors["b_enc"] if spec.subtract_b_dec else vectors["b_enc"] + encoder @ b_dec
    values = {
        "W_enc": encoder,
        "b_enc": b_enc,
        "W_dec": sae.stored.decoder.rows(rows),
        "b_dec": b_dec,
    }
    own |= {f"concept.{name}": value.float() for name, value in values.items()}
    changed.load_state_dict({**changed.state_dict(), **own})
    return changed.train(model.training)
