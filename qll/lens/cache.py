"""Codes of a text on disk: what is needed again and again, in a seventh of the activations' bytes.

    <folder>/windows.safetensors                  token ids [windows, context], kind of each token
    <folder>/<hookpoint>/00000.safetensors ...    values, indices of the tokens of some windows
    <folder>/qll_manifest.json                    last: without it the cache is not finished

A shard is written when it is full, so memory holds one shard per hookpoint. Values are bfloat16 by
default and indices int32: 6 bytes per feature that fires.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from qll import store
from qll.errors import MissingTensorError, UsageError
from qll.lens.attach import attach
from qll.lens.codes import SparseCodes, concatenate
from qll.lens.hooks import capture
from qll.lens.sae import SAE
from qll.lens.tokens import token_kinds
from qll.load.sae_names import hookpoint_of

WINDOWS = "windows.safetensors"
SHARD_TOKENS = 32768


@dataclass(frozen=True)
class CodeCache:
    """A finished cache; raises IntegrityError for a folder without a manifest."""

    folder: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The manifest."""
        return store.read_manifest(self.folder)

    @property
    def hookpoints(self) -> list[str]:
        """The places it holds codes of."""
        return list(self.facts["hookpoints"])

    @cached_property
    def windows(self) -> Int[Tensor, "windows context"]:
        """The token ids."""
        return load_file(self.folder / WINDOWS)["ids"].long()

    def kinds(self, hookpoint: str) -> Int[Tensor, "windows context"]:
        """What kind each token is at a place (see `qll.lens.tokens`)."""
        return load_file(self.folder / WINDOWS)[self._known(hookpoint)].long()

    def codes(self, hookpoint: str) -> Iterator[tuple[int, SparseCodes]]:
        """(number of the window, its codes) for every window, in order; one shard in memory."""
        name, context = self._known(hookpoint), self.windows.shape[1]
        for path in sorted((self.folder / name).glob("*.safetensors")):
            shard = load_file(path)
            extra = [shard[key].float() if key in shard else None for key in ("scale", "shift")]
            codes = SparseCodes(shard["values"].float(), shard["indices"].long(), *extra)
            first = int(path.stem)
            for number in range(len(codes) // context):
                yield first + number, codes[number * context : (number + 1) * context]

    def _known(self, hookpoint: str) -> str:
        name = hookpoint_of(hookpoint)
        if name not in self.hookpoints:
            raise MissingTensorError(
                "the cache holds no codes of this place",
                where=self.folder,
                expected=name,
                found=", ".join(self.hookpoints),
            )
        return name


@torch.no_grad()
def write_cache(
    model: PreTrainedModel,
    saes: Mapping[str, SAE],
    windows: Int[Tensor, "windows context"],
    folder: str | Path,
    *,
    special: Collection[int] = (),
    dtype: torch.dtype = torch.bfloat16,
    shard_tokens: int = SHARD_TOKENS,
) -> CodeCache:
    """Run `model` over the windows once and keep the codes of all `saes` in `folder`.

    Replaces an unfinished cache there; a finished one is an error unless it is deleted first.
    Raises UsageError for that, and what `attach` raises.
    """
    folder = Path(folder)
    if (folder / store.MANIFEST_NAME).is_file():
        raise UsageError("there is a finished cache already", where=folder, hint="delete it first")
    store.make_folder(folder)
    names = [hookpoint_of(name) for name in saes]
    for name in names:
        store.remove(folder / name)
    waiting: dict[str, list[SparseCodes]] = {name: [] for name in names}
    kinds: dict[str, list[Tensor]] = {name: [] for name in names}
    per_shard = max(1, shard_tokens // windows.shape[1])
    numbered = tqdm(windows, "cache codes", unit="window", file=sys.stderr, disable=None)
    for number, window in enumerate(numbered):
        with attach(model, saes) as seen:
            values = capture(model, window[None], names)
        for name in names:
            kinds[name].append(token_kinds(window, values[name][0], special))
            waiting[name].append(seen.codes[name].to("cpu"))
            if len(waiting[name]) == per_shard or number == len(windows) - 1:
                first = number + 1 - len(waiting[name])
                _write_shard(folder / name / f"{first:05d}.safetensors", waiting[name], dtype)
                waiting[name] = []
    ids = {"ids": windows.to(torch.int32)}
    ids |= {name: torch.stack(parts).to(torch.uint8) for name, parts in kinds.items()}
    store.write_tensors(folder / WINDOWS, ids)
    store.write_manifest(folder, {"hookpoints": names, "windows": list(windows.shape)})
    return CodeCache(folder)


def _write_shard(path: Path, parts: list[SparseCodes], dtype: torch.dtype) -> None:
    codes = concatenate(parts)
    tensors = {"values": codes.values.to(dtype), "indices": codes.indices.to(torch.int32)}
    for name, extra in (("scale", codes.scale), ("shift", codes.shift)):
        if extra is not None:
            tensors[name] = extra
    store.write_tensors(path, tensors)
