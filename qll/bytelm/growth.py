"""A wider (and deeper) model that computes the same function: 256 -> 512 -> 768 channels.

The stream x becomes P x with P^T P = (d'/d) 1, so its mean square, and so every norm, stays what it
was. Whatever read x now reads (d/d') P^T, and whatever wrote y writes P y. New directions are read
by random weights but not yet written, new heads and hidden channels the other way round, so that
all of them learn (after Chen et al. 2016, Net2Net, with an isometry instead of copies). Heads keep
their width: there are more of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from qll.bytelm.config import ConceptConfig, MixerConfig, ModelConfig, StreamConfig, WeightConfig
from qll.bytelm.initial import STD
from qll.bytelm.model import ByteModel
from qll.errors import UsageError


def grow(
    model: ByteModel,
    d_model: int,
    n_layers: int | None = None,
    d_ff: int | None = None,
    seed: int = 0,
) -> ByteModel:
    """A model of `d_model` channels (and `n_layers` blocks) with the same logits, up to rounding.

    The output head is no longer tied to the embedding. Raises UsageError for a size that is
    smaller or no multiple of the head's width, and for a model with parts other than attention:
    they act on single channels, which the isometry mixes.

    >>> from qll.bytelm.config import ModelConfig
    >>> small = ByteModel(ModelConfig(d_model=32, n_layers=1, n_heads=2))
    >>> ids = torch.tensor([[1, 2, 3]]); large = grow(small, 48)
    >>> large(ids).allclose(small(ids), atol=1e-6), large.config.n_heads
    (True, 3)
    """
    before = model.config
    config = _grown_config(before, d_model, n_layers or before.n_layers, d_ff)
    generator = torch.Generator().manual_seed(seed)
    grown = ByteModel(config).to(model.embedding.weight).train(model.training)
    widen = _Widening(before.d_model, d_model, generator, model.embedding.weight)
    tensors = {
        "embedding.weight": model.embedding.weight @ widen.isometry.T,
        "head.weight": widen.reader(model.head.weight, model.norm.gain),
    }
    if model.positions is not None:
        tensors["positions.weight"] = model.positions.weight @ widen.isometry.T
    for layer, block in enumerate(grown.blocks):
        place = f"blocks.{layer}"
        if layer < before.n_layers:
            tensors |= _grown_block(model.blocks[layer], block, widen, place)
        else:  # a new block writes nothing yet
            for name in ("mixer.out.weight", "feed_forward.down.weight"):
                tensors[f"{place}.{name}"] = torch.zeros_like(block.get_parameter(name))
    grown.load_state_dict({**grown.state_dict(), **tensors})
    return grown


class _Widening:
    """The isometry from the old stream into the new one, and how weights follow it."""

    def __init__(self, old: int, new: int, generator: torch.Generator, like: Tensor) -> None:
        square = torch.randn(new, old, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(square)[0]
        self.isometry = (basis * (new / old) ** 0.5).to(like)
        self.back = (basis * (old / new) ** 0.5).to(like)
        self.outside = (torch.eye(new, dtype=torch.float64) - basis @ basis.T).to(like)
        self.generator = generator

    def noise(self, *shape: int) -> Tensor:
        """Small random weights."""
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64) * STD
        return drawn.to(self.isometry)

    def reader(
        self, weight: Float[Tensor, "*out old"], gain: Float[Tensor, " old"]
    ) -> Float[Tensor, "*out new"]:
        """What reads gain * norm(x) by `weight`, for a norm of gain 1 on the new stream."""
        blind = self.noise(*weight.shape[:-1], len(self.isometry)) @ self.outside
        return (weight * gain) @ self.back.T + blind

    def unread(self, *out: int) -> Tensor:
        """Readers that see nothing of what the old model could write."""
        return self.noise(*out, len(self.isometry)) @ self.outside


def _grown_block(old, new, widen: _Widening, place: str) -> dict[str, Tensor]:
    """The tensors of a block that existed before."""
    attention, feed_forward = old.mixer, old.feed_forward
    heads, width = attention.n_heads, attention.d_head
    extra = new.mixer.n_heads - heads
    qkv = attention.qkv.weight.view(3, heads, width, -1)
    qkv = torch.cat((widen.reader(qkv, old.mixer_norm.gain), widen.unread(3, extra, width)), dim=1)
    out = widen.isometry @ attention.out.weight
    out = torch.cat((out, widen.noise(len(out), extra * width)), dim=1)
    hidden = feed_forward.down.weight.shape[1]
    wider = new.feed_forward.down.weight.shape[1] - hidden
    gate_up = feed_forward.gate_up.weight.view(2, hidden, -1)
    gate_up = torch.cat(
        (
            widen.reader(gate_up, old.feed_forward_norm.gain),
            widen.noise(2, wider, len(widen.isometry)),
        ),
        dim=1,
    )
    down = torch.nn.functional.pad(widen.isometry @ feed_forward.down.weight, (0, wider))
    found = {
        "mixer.qkv.weight": qkv.flatten(0, 2),
        "mixer.out.weight": out,
        "feed_forward.gate_up.weight": gate_up.flatten(0, 1),
        "feed_forward.down.weight": down,
    }
    if attention.prefix is not None:
        keys = widen.noise(1, extra, *attention.prefix.shape[2:])
        more = torch.cat((keys, torch.zeros_like(keys)))  # values of new heads are 0
        found["mixer.prefix"] = torch.cat((attention.prefix, more), dim=1)
    return {f"{place}.{name}": tensor.detach() for name, tensor in found.items()}


def _grown_config(
    before: ModelConfig, d_model: int, n_layers: int, d_ff: int | None
) -> ModelConfig:
    plain = (
        before.mixer.pattern == ("attention",) * len(before.mixer.pattern)
        and before.mixer.conv == MixerConfig().conv
        and before.stream == StreamConfig()
        and before.concept == ConceptConfig()
        and before.weights == WeightConfig()
        and not before.memory.memory_tokens
        and before.head == "softmax"
    )
    if not plain:
        raise UsageError(
            "only a plain model of attention blocks can grow",
            where="grow",
            hint="grow a plain model; adapters and global tokens can be added to it afterwards, "
            "with --checkpoint",
        )
    if d_model % before.d_head or d_model < before.d_model or n_layers < before.n_layers:
        raise UsageError(
            "not a larger model with heads of the same width",
            where="grow",
            expected=f"a multiple of {before.d_head} from {before.d_model} on, "
            f"and at least {before.n_layers} blocks",
            found=(d_model, n_layers),
        )
    grown = replace(
        before,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=d_model // before.d_head,
        d_ff=d_ff,
        tie=False,
    )
    if grown.d_hidden < before.d_hidden:
        raise UsageError(
            "fewer hidden channels than before",
            where="d_ff",
            expected=f"at least {before.d_hidden}",
            found=grown.d_hidden,
        )
    return grown
