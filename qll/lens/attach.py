"""Autoencoders in a running model: watch, replace, switch features off, steer.

    observe         nothing changes: logits are the same to the last bit
    replace         x -> decode(f)                            f the codes after edits
    replace_error   x -> x + decode(f) - decode(encode(x))    lossless but for the edits

An edit is the difference of two decodings, so the autoencoder's own error cancels and an edit has
its whole effect. Steering adds c to a feature's activation: c times its direction on every token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from qll.errors import ShapeError, UsageError
from qll.lens.codes import SparseCodes
from qll.lens.hooks import Handler, hooked, width_at
from qll.lens.sae import SAE
from qll.load.sae_names import hookpoint_of

MODES = ("observe", "replace", "replace_error")


@dataclass
class Attached:
    """What the attached autoencoders saw in the latest forward pass."""

    codes: dict[str, SparseCodes] = field(default_factory=dict)
    """By hookpoint: the codes of all tokens [batch * seq], before any edit."""


@dataclass(frozen=True)
class _Edit:
    """What is done to the codes of one autoencoder."""

    sae: SAE
    mode: str
    ablate: tuple[int, ...]
    steer: Mapping[int, float]
    positions: Tensor | None

    def edited(self, codes: SparseCodes) -> SparseCodes:
        """The codes after ablation and steering."""
        codes = codes.without(self.ablate) if self.ablate else codes
        for feature, amount in self.steer.items():
            codes = codes.plus(feature, amount)
        return codes

    def applied(self, value: Tensor, codes: SparseCodes, read: Tensor | None) -> Tensor | None:
        """The value that takes the place of `value`; None leaves it."""
        if self.mode == "observe":
            return None
        flat = value.reshape(-1, value.shape[-1])
        after = self.edited(codes)
        if self.mode == "replace":
            new = self.sae.decode(after, read)
        else:
            new = flat.to(self.sae.device, torch.float32) + self.sae.difference(codes, after)
        new = new.to(value.device, value.dtype)
        if self.positions is not None:
            chosen = self.positions.to(value.device).reshape(-1, 1)
            new = torch.where(chosen, new, flat)
        return new.reshape(value.shape)


@contextlib.contextmanager
def attach(
    model: PreTrainedModel,
    saes: Mapping[str, SAE],
    *,
    mode: str | None = None,
    ablate: Mapping[str, Sequence[int]] | None = None,
    steer: Mapping[str, Mapping[int, float]] | None = None,
    positions: Bool[Tensor, "batch seq"] | None = None,
) -> Iterator[Attached]:
    """Attach `saes` by hookpoint; gives an `Attached` whose codes follow every forward pass.

    mode: see above; without one `observe`, or `replace_error` when there are edits. ablate and
    steer: by hookpoint, the features to switch off, and what to add to a feature's activation.
    positions: change these tokens only. Gradients do not flow through an autoencoder. Raises
    UsageError for places, features or modes that do not exist, ShapeError for an autoencoder of
    another width than the model.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from qll.load.sae_file import LatentMatrix, SAESpec, StoredSAE
    >>> config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model, eye = LlamaForCausalLM(config).eval(), LatentMatrix(torch.eye(8))
    >>> zeros = {"b_enc": torch.zeros(8), "b_dec": torch.zeros(8)}
    >>> sae = SAE(StoredSAE(SAESpec("layers.0", 8, 8, 8, "topk", k=2), eye, eye, zeros))
    >>> with attach(model, {"layers.0": sae}, steer={"layers.0": {3: 8.0}}) as seen:
    ...     _ = model(torch.tensor([[1, 2, 3]]))
    >>> seen.codes["layers.0"].values.shape
    torch.Size([3, 2])
    """
    by_place = {hookpoint_of(name): sae for name, sae in saes.items()}
    off = _by_place(ablate, by_place, "ablate")
    added = _by_place(steer, by_place, "steer")
    mode = mode or ("replace_error" if off or added else "observe")
    _check(model, by_place, mode, off, added)
    attached, handlers = Attached(), []
    for name, sae in by_place.items():
        edit = _Edit(sae, mode, tuple(off.get(name, ())), added.get(name, {}), positions)
        handlers += _handlers(name, edit, attached)
    with hooked(model, handlers):
        yield attached


def _handlers(name: str, edit: _Edit, attached: Attached) -> list[tuple[str, Handler]]:
    """One handler for an autoencoder; two, where it reads and where it writes, for a transcoder."""
    spec, read = edit.sae.spec, []

    def reading(value: Tensor) -> None:
        flat = value.detach().reshape(-1, value.shape[-1])
        attached.codes[name] = edit.sae.encode(flat)
        read[:] = [flat] if edit.sae.needs_input else [None]

    def writing(value: Tensor) -> Tensor | None:
        if not spec.transcodes:
            reading(value)
        with torch.no_grad():
            return edit.applied(value, attached.codes[name], read[0])

    reads = [(spec.hookpoint, reading)] if spec.transcodes else []
    return [*reads, (name, writing)]


def _by_place(given: Mapping | None, saes: Mapping[str, SAE], what: str) -> dict:
    found = {hookpoint_of(name): value for name, value in (given or {}).items()}
    if missing := [name for name in found if name not in saes]:
        raise UsageError(
            "no autoencoder is attached there",
            where=f"{what} {missing[0]}",
            expected=", ".join(saes) or "an autoencoder",
        )
    return {name: value for name, value in found.items() if len(value)}


def _check(
    model: PreTrainedModel, saes: Mapping[str, SAE], mode: str, ablate: dict, steer: dict
) -> None:
    if mode not in MODES:
        raise UsageError("no such mode", where="attach", expected=", ".join(MODES), found=mode)
    if mode == "observe" and (ablate or steer):
        raise UsageError(
            "observing changes nothing",
            where="attach",
            hint="use replace_error (the error term stays) or replace",
        )
    for name, sae in saes.items():
        spec = sae.spec
        if spec.transcodes and name != spec.writes:
            raise UsageError(
                "a transcoder is attached where it writes",
                where=name,
                expected=spec.writes,
            )
        reads = spec.hookpoint if spec.transcodes else name
        for place, width in ((reads, spec.d_in), (name, spec.d_out)):
            if (found := width_at(model, place)) != width:
                raise ShapeError(
                    "the autoencoder has another width than the model",
                    where=place,
                    expected=found,
                    found=width,
                    hint="it belongs to another model",
                )
        sae.require_features([*ablate.get(name, ()), *steer.get(name, {})])
