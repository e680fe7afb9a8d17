"""One checkpoint seen as named tensors: what every file format is turned into.

A format supplies a config, its files and one `Stored` per tensor (where it lies, how to read some
of its rows). Everything common to all formats happens here, once: HF names, HF row order of q and
k, the check of every shape against the config before anything is read, the check for NaN and
infinity after it, and the fingerprint.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from qll.errors import ConfigError, MissingTensorError, NonFiniteError, ShapeError, UsageError
from qll.load.files import digest_file, readable, shown
from qll.load.names import expected_specs, file_rows

if TYPE_CHECKING:
    from transformers import LlamaConfig

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor as `read` returns it.

    >>> TensorSpec((4, 8), torch.bfloat16).nbytes
    64
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


@runtime_checkable
class Stored(Protocol):
    """A tensor in a file: its spec, and a way to read rows start..stop-1 in file order."""

    @property
    def spec(self) -> TensorSpec:
        """Shape, and the dtype that `read` returns; cheap."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """A fresh CPU tensor with rows start..stop-1 of the first dimension, in file order."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A `Source` made of `Stored` tensors; see qll.load.source for what the fields mean."""

    path: Path
    name: str
    format: str
    row_order: str
    config: LlamaConfig
    files: tuple[Path, ...]
    tensors: Mapping[str, Stored]

    def __post_init__(self) -> None:
        _require_expected(self.tensors, self.config, self.path)

    @property
    def bytes_on_disk(self) -> int:
        """Sum of the sizes of the weight files."""
        return sum(file.stat().st_size for file in self.files)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of config, specs, file names, sizes and sampled bytes (not every byte)."""
        specs = {name: (spec.shape, str(spec.dtype)) for name, spec in self.specs().items()}
        facts = json.dumps([self.format, self.config.to_dict(), specs], default=str, sort_keys=True)
        digest = hashlib.sha256(facts.encode())
        for file in self.files:
            digest_file(digest, file)
        return digest.hexdigest()

    def specs(self) -> dict[str, TensorSpec]:
        """Spec of every tensor by HF name, in model order."""
        return {name: self.tensors[name].spec for name in expected_specs(self.config)}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor `name`, or only its rows `rows`, on the CPU in HF row order.

        Raises MissingTensorError for an unknown name, NonFiniteError for NaN or infinity.
        """
        stored = self.tensors.get(name)
        if stored is None:
            raise MissingTensorError("no such tensor", where=self.path, found=shown(name))
        start, stop = _bounds(rows, stored.spec.shape[0])
        order = file_rows(name, self.config) if self.row_order == "interleaved" else None
        with readable(self.path):
            if order is None or stop == start:
                tensor = stored.read(start, stop)
            else:
                wanted = order[start:stop]
                first = int(wanted.min())
                tensor = stored.read(first, int(wanted.max()) + 1)[wanted - first]
        _require_finite(tensor, name, self.path)
        return tensor


def drop_tied_head(tensors: MutableMapping[str, Stored], where: Path) -> None:
    """Leave out a stored lm_head of a tied model, after proof (on sampled rows) that it is a copy.

    transformers ignores it too; a head that differs means that the config is wrong.
    """
    head = tensors.pop("lm_head.weight", None)
    table = tensors.get("model.embed_tokens.weight")
    if head is not None and table is not None and not same_rows(head, table):
        raise ConfigError(
            "config says tied embeddings, but the file holds an lm_head of its own",
            where=where,
            expected="lm_head.weight equal to model.embed_tokens.weight",
            hint="set tie_word_embeddings to false in config.json",
        )


def same_rows(first: Stored, second: Stored, samples: int = 64) -> bool:
    """Whether two stored matrices have equal shape, dtype and evenly spaced rows."""
    if first.spec != second.spec or len(first.spec.shape) != 2:
        return False
    rows = first.spec.shape[0]
    step = max(1, math.ceil(rows / samples))
    return all(
        torch.equal(first.read(row, row + 1), second.read(row, row + 1))
        for row in range(0, rows, step)
    )


def _bounds(rows: slice | None, count: int) -> tuple[int, int]:
    start, stop, step = (rows or slice(None)).indices(count)
    if step != 1:
        raise UsageError(
            "rows are read with step 1 only", expected="slice(start, stop)", found=rows
        )
    return start, max(start, stop)


def _require_expected(tensors: Mapping[str, Stored], config: LlamaConfig, where: Path) -> None:
    """Raise unless the names and shapes are exactly those the architecture needs."""
    expected = expected_specs(config)
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    if missing:
        raise MissingTensorError(
            f"{len(missing)} tensors are missing",
            where=where,
            expected=", ".join(missing[:3]),
            hint="the file is incomplete, or its config is that of another model",
        )
    if unexpected:
        raise MissingTensorError(
            f"{len(unexpected)} tensors are not part of a Llama with this config",
            where=where,
            found=", ".join(map(shown, unexpected[:3])),
            hint="the file holds another architecture, which would be computed wrongly",
        )
    for name, shape in expected.items():
        spec = tensors[name].spec
        if spec.shape != shape:
            raise ShapeError(
                "tensor and config disagree about its shape",
                where=f"{where}: {name}",
                expected=shape,
                found=spec.shape,
                hint="the weights belong to another config",
            )
        if spec.dtype not in DTYPES:
            raise ShapeError(
                "weights of a dtype that is not read",
                where=f"{where}: {name}",
                expected="float64, float32, float16 or bfloat16",
                found=spec.dtype,
                hint="use the unquantised checkpoint, or a GGUF file",
            )


def _require_finite(tensor: Tensor, name: str, where: Path) -> None:
    """Raise NonFiniteError if any entry is NaN or infinite; one pass, no temporary copy."""
    if tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NonFiniteError(
            "weights hold NaN or infinity",
            where=f"{where}: {name}",
            found=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} entries read",
            hint="download or convert the checkpoint again",
        )
