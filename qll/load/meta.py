"""Meta's own folders: consolidated.00.pth .. beside params.json, cut for model parallelism.

Fairscale cuts column-parallel matrices (wq wk wv w1 w3 output) along their rows and row-parallel
ones (wo w2) along their columns; norms are in every shard. The embedding table is cut along its
columns in Llama 2 and along its rows in Llama 3: its shape tells. The config is qll.load.params.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qll.errors import HeaderError, MissingFileError, MissingTensorError, ShapeError
from qll.load.checkpoint import Checkpoint, TensorSpec, drop_tied_head, same_rows
from qll.load.files import inside, read_object, shown
from qll.load.names import by_hf_name, hf_name_of_meta, is_skipped
from qll.load.params import meta_config
from qll.load.pth import PthFile

if TYPE_CHECKING:
    from transformers import LlamaConfig

logger = logging.getLogger("qll.load")
SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
CUT_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
CUT_COLUMNS = ("wo", "w2")
EMBEDDING, FIRST_QUERY = "tok_embeddings.weight", "layers.0.attention.wq.weight"


@dataclass(frozen=True)
class MetaTensor:
    """One tensor put together from its shards; see checkpoint.Stored.

    cut: the dimension along which the shards are joined, None when all hold the same.
    """

    shards: tuple[PthFile, ...]
    name: str
    cut: int | None

    @property
    def spec(self) -> TensorSpec:
        """Shape of the whole tensor, and the dtype of its parts."""
        part = self.shards[0].specs[self.name]
        shape = list(part.shape)
        if self.cut is not None:
            shape[self.cut] *= len(self.shards)
        return TensorSpec(tuple(shape), part.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start..stop-1, copied out of the mapped shards that hold them."""
        if self.cut is None:
            return self._read_replicated(start, stop)
        spec = self.spec
        result = torch.empty((stop - start, *spec.shape[1:]), dtype=spec.dtype)
        size = self.shards[0].specs[self.name].shape[self.cut]
        for place, shard in enumerate(self.shards):
            begin, end = place * size, (place + 1) * size
            if self.cut == 1:
                result[:, begin:end] = shard.rows(self.name, start, stop)
            elif (low := max(start, begin)) < (high := min(stop, end)):
                part = shard.rows(self.name, low - begin, high - begin)
                result[low - start : high - start] = part
        return result

    def _read_replicated(self, start: int, stop: int) -> Tensor:
        first, *others = (shard.rows(self.name, start, stop) for shard in self.shards)
        if not all(torch.equal(first, other) for other in others):
            raise HeaderError(
                "shards hold different copies of a tensor",
                where=f"{self.shards[0].path.parent}: {shown(self.name)}",
                hint="the shards are of different models: download them again",
            )
        return first.clone()


def open_meta(
    folder: Path, config: LlamaConfig | None = None, path: Path | None = None
) -> Checkpoint:
    """The checkpoint of a Meta folder.

    config: that of the Hugging Face folder around it, else it comes from params.json. path: the
    folder the user named, if not `folder`. Raises MissingFileError, ConfigError, or what the
    shards make of themselves.
    """
    params = {} if config else read_object(folder / "params.json")
    shards = tuple(PthFile(file) for file in _shard_files(folder))
    names = _common_names(shards)
    _require_possible_shapes(shards[0], names)
    width = config.hidden_size if config else params.get("dim")
    found = {name: MetaTensor(shards, name, _cut(name, shards, width)) for name in names}
    tensors = by_hf_name(found, hf_name_of_meta)
    if config is None:
        shapes = {name: tensor.spec.shape for name, tensor in tensors.items()}
        config = meta_config(params, folder / "params.json", shapes, tied=_is_tied(tensors))
    _require_all_shards(found, config, folder)
    if config.tie_word_embeddings:
        drop_tied_head(tensors, folder)
    return Checkpoint(
        path=path or folder,
        name=(path or folder).name,
        format="meta",
        row_order="interleaved",
        config=config,
        files=tuple(shard.path for shard in shards),
        tensors=tensors,
    )


def _shard_files(folder: Path) -> list[Path]:
    """consolidated.00.pth, .01.pth, ... without a hole."""
    names = sorted(file.name for file in folder.iterdir() if SHARD.fullmatch(file.name))
    if not names:
        raise MissingFileError(
            "no weights in a Meta folder", where=folder, expected="consolidated.00.pth"
        )
    wanted = [f"consolidated.{place:02d}.pth" for place in range(len(names))]
    for place, (name, found) in enumerate(zip(wanted, names, strict=True)):
        if name != found:
            raise _missing_shard(folder, place, f"{len(names)} other shards")
    return [inside(folder, name) for name in wanted]


def _common_names(shards: tuple[PthFile, ...]) -> list[str]:
    """Names that are not skipped: the same, with the same specs, in every shard."""
    first = {name: spec for name, spec in shards[0].specs.items() if not is_skipped(name)}
    for shard in shards[1:]:
        specs = {name: spec for name, spec in shard.specs.items() if not is_skipped(name)}
        if specs != first:
            different = sorted(
                name for name in {*first, *specs} if first.get(name) != specs.get(name)
            )
            raise MissingTensorError(
                "shards disagree about their tensors",
                where=shard.path,
                found=f"{len(different)} differ, for instance {shown(different[0])}",
                hint="the shards are of different models: download them again",
            )
    return list(first)


def _require_possible_shapes(shard: PthFile, names: list[str]) -> None:
    """Raise ShapeError unless norms are vectors and all else matrices, so that parts can join."""
    for name in filter(_is_known, names):
        shape, rank = shard.specs[name].shape, 1 if name.endswith("norm.weight") else 2
        if len(shape) != rank or 0 in shape:
            raise ShapeError(
                "tensor has an impossible shape",
                where=f"{shard.path}: {shown(name)}",
                expected=f"{rank} sizes above 0",
                found=shape,
            )


def _is_known(name: str) -> bool:
    return hf_name_of_meta(name) != name


def _cut(name: str, shards: tuple[PthFile, ...], width: object) -> int | None:
    """The dimension along which `name` is cut."""
    if not _is_known(name):
        return None
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind in CUT_COLUMNS:
        return 1
    if kind in CUT_ROWS:
        return 0
    if name == EMBEDDING:
        return 0 if shards[0].specs[name].shape[1] == width else 1
    return None


def _is_tied(tensors: Mapping[str, MetaTensor]) -> bool:
    """params.json does not say: tied without a head, or when the head is the table (Llama 3.2)."""
    head = tensors.get("lm_head.weight")
    table = tensors.get("model.embed_tokens.weight")
    if head is None:
        logger.warning("no output.weight in the Meta folder: taking the embeddings as tied")
        return True
    return table is not None and same_rows(head, table)


def _require_all_shards(found: Mapping[str, MetaTensor], config: LlamaConfig, folder: Path) -> None:
    """Raise MissingFileError when the shards that are there are a fraction of the query rows."""
    if (query := found.get(FIRST_QUERY)) is None:
        return
    rows, count = query.spec.shape[0] // len(query.shards), len(query.shards)
    wanted = config.num_attention_heads * config.head_dim
    if rows * count < wanted and wanted % rows == 0:
        raise _missing_shard(folder, count, f"{count} of {wanted // rows} shards")


def _missing_shard(folder: Path, place: int, found: str) -> MissingFileError:
    return MissingFileError(
        "a shard is missing",
        where=folder,
        expected=f"consolidated.{place:02d}.pth",
        found=found,
        hint="download all consolidated.*.pth files",
    )
