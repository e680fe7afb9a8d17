"""What one model has at some places of a text, read once and used by every measure after it.

A forward pass costs more than anything an autoencoder does with its result, so the activations of
all windows are kept: in memory, or memory-mapped in files when a folder is given. `Encoded` is what
one autoencoder makes of them.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from qll import store
from qll.lens.codes import SparseCodes
from qll.lens.hooks import capture, width_at
from qll.lens.sae import SAE
from qll.lens.tokens import token_kinds
from qll.load.sae_file import SAESpec
from qll.load.sae_names import neighbour, site_of

BATCH_TOKENS = 4096  # encoded at a time


@dataclass(frozen=True)
class Readings:
    """The activations of a model on the windows of a text, at some places."""

    model: PreTrainedModel
    windows: Int[Tensor, "windows context"]
    special: tuple[int, ...]
    """Token ids that are not text."""
    values: dict[str, Float[Tensor, "windows context _"]] = field(repr=False)
    """By hookpoint, float32 on the CPU."""
    folder: Path | None = None
    """Where the values lie, if not in memory."""

    def at(self, hookpoint: str, number: int) -> Float[Tensor, "context _"]:
        """What one window has at a place, float32 on the model's device."""
        return self.values[hookpoint][number].to(self.model.device)

    def kinds(self, hookpoint: str, number: int) -> Int[Tensor, " context"]:
        """The kind of each token of a window at a place (see `qll.lens.tokens`)."""
        return token_kinds(self.windows[number], self.values[hookpoint][number], self.special)

    def states(self, number: int) -> Float[Tensor, "context d_model"]:
        """What the output matrix reads; needs the last block among the places."""
        last = f"layers.{self.model.config.num_hidden_layers - 1}"
        return self.model.base_model.norm(self.at(last, number).to(self.model.dtype))


@torch.no_grad()
def read(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows context"],
    hookpoints: Sequence[str],
    *,
    special: Collection[int] = (),
    folder: Path | None = None,
) -> Readings:
    """Run `model` over the windows, each by itself, and keep what it has at `hookpoints`.

    Blocks after the last of them are not run. folder: where to put files instead of using memory;
    the caller deletes it. Raises UsageError as `hooked` does, DiskFullError before reading.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> read(model, torch.tensor([[1, 2, 3]]), ["layers.0"]).at("layers.0", 0).shape
    torch.Size([3, 8])
    """
    names = list(dict.fromkeys(hookpoints))
    shapes = {name: (*windows.shape, width_at(model, name)) for name in names}
    values = empty(shapes, folder)
    for number, window in enumerate(
        tqdm(windows, f"reading {len(names)} places", unit="w", file=sys.stderr, disable=None)
    ):
        for name, value in capture(model, window[None], names).items():
            values[name][number] = value[0].float().cpu()
    return Readings(model, windows, tuple(special), values, folder)


def places_for(spec: SAESpec, n_layers: int) -> list[str]:
    """All places that the measures of an autoencoder want readings of, in a model of `n_layers`.

    Its own and those one block before and after, the stream its block reads, the last block.

    >>> places_for(SAESpec("layers.4", 2, 2, 2, "topk", k=1), 8)
    ['layers.3', 'layers.4', 'layers.5', 'layers.7']
    """
    found = [
        name
        for step in (-1, 0, 1)
        for place in (spec.hookpoint, spec.writes)
        if (name := neighbour(place, step)) and (site_of(name).block or 0) < n_layers
    ]
    if block := site_of(spec.writes).block:
        found.append(f"layers.{block - 1}")
    return list(dict.fromkeys([*found, f"layers.{n_layers - 1}"]))


@dataclass(frozen=True)
class Encoded:
    """The codes that one autoencoder gives a model's readings, and what they stand for."""

    readings: Readings
    sae: SAE

    @property
    def windows(self) -> range:
        """The numbers of the windows."""
        return range(len(self.readings.windows))

    @cached_property
    def codes(self) -> list[SparseCodes]:
        """The codes of every window, on the CPU.

        Many windows at a time, since a large autoencoder is read from its file for each batch.
        """
        values, found = self.readings.values[self.sae.spec.hookpoint], []
        for part in values.split(max(1, BATCH_TOKENS // values.shape[1])):
            codes = self.sae.encode(part.flatten(0, 1).to(self.readings.model.device)).to("cpu")
            places = torch.arange(len(codes)).split(values.shape[1])
            found += [codes[int(place[0]) : int(place[-1]) + 1] for place in places]
        return found

    def read(self, number: int) -> Float[Tensor, "context d_in"]:
        """What the autoencoder reads of a window."""
        return self.readings.at(self.sae.spec.hookpoint, number)

    def written(self, number: int) -> Float[Tensor, "context d_out"]:
        """What stands where the autoencoder writes."""
        return self.readings.at(self.sae.spec.writes, number)

    def decoded(self, number: int) -> Float[Tensor, "context d_out"]:
        """What the autoencoder would put there, on its device."""
        codes = self.codes[number].to(self.sae.device)
        return self.sae.decode(codes, self.read(number) if self.sae.needs_input else None)

    def kinds(self, number: int) -> Int[Tensor, " context"]:
        """The kind of each token of a window."""
        return self.readings.kinds(self.sae.spec.writes, number)

    def moved(self, step: int) -> Encoded | None:
        """The same autoencoder `step` blocks later; None where there is no such place.

        Raises KeyError when that place is not among the readings.
        """
        spec = self.sae.spec
        reads, writes = (neighbour(place, step) for place in (spec.hookpoint, spec.writes))
        layers = self.readings.model.config.num_hidden_layers
        if reads is None or writes is None or (site_of(writes).block or 0) >= layers:
            return None
        if step == 0:
            return self
        spec = replace(spec, hookpoint=reads, writes=writes)
        return Encoded(self.readings, replace(self.sae, stored=replace(self.sae.stored, spec=spec)))


def empty(shapes: Mapping[str, tuple[int, ...]], folder: Path | None) -> dict[str, Tensor]:
    """A float32 tensor of each shape: in memory, or memory-mapped in `folder`."""
    if folder is None:
        return {name: torch.empty(shape) for name, shape in shapes.items()}
    store.make_folder(folder)
    store.require_space(folder, 4 * sum(int(np.prod(shape)) for shape in shapes.values()))
    return {
        name: torch.from_numpy(np.memmap(folder / f"{name}.float32", np.float32, "w+", shape=shape))
        for name, shape in shapes.items()
    }
