"""From texts to batches in one call: packed or streamed, with what is held out.

>>> import tempfile; folder = Path(tempfile.mkdtemp())
>>> _ = (folder / "text").write_bytes(b"some text. " * 200)
>>> loader, held_out = build_loaders([{"path": folder / "text"}], 16, 4, folder / "packed")
>>> inputs, targets = loader.next()
>>> inputs.shape, len(held_out.documents())
(torch.Size([4, 16]), 1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qll import store
from qll.bytelm.compressed import is_compressed
from qll.bytelm.corpus import Part, held_out_documents, named_parts
from qll.bytelm.dataset import BatchLoader, MemoryEfficientByteDataset
from qll.bytelm.packed import PackedText, open_text, pack
from qll.bytelm.streaming import ScalableStreamingDataset, StreamLoader, parts_of
from qll.errors import TextError

HELD_OUT_BYTES = 64 << 20  # more than anybody waits for
HELD_OUT_NAME, TEXTS_NAME = "held_out.bytes", "texts.json"


def build_loaders(
    texts: str | Sequence[Mapping[str, Any]] | Sequence[Part],
    seq_length: int,
    batch_size: int,
    folder: Path,
    *,
    streaming: bool = False,
    max_samples: int | None = None,
    buffer_size: int = 10_000,
    compress: bool = False,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> tuple[BatchLoader | StreamLoader, PackedText]:
    """Batches to train on, and the packed documents that are held out.

    `texts` is the name of a data set or mix ("single", "multi", "large"), or a list of dicts as
    ScalableStreamingDataset takes, or of parts. Texts are packed once into `folder` unless
    `streaming`, compressed where `compress` says so; of each, `max_samples` windows' worth at most
    are trained on. Raises TextError for texts that are missing, too short or cannot be reached.
    """
    parts = _parts(texts, streaming)
    limit = None if max_samples is None else max_samples * seq_length
    packed = pack_parts(parts, folder, limit, streaming, compress)
    held_out = PackedText(folder / HELD_OUT_NAME)
    if streaming:
        stream = ScalableStreamingDataset(
            parts,
            seq_length,
            buffer_size=buffer_size,
            seed=seed,
            rank=rank,
            world=world,
            max_per_text=max_samples,
        )
        return StreamLoader(stream, batch_size, device), held_out
    datasets = [
        MemoryEfficientByteDataset(path, seq_length, seed * 1_000_003 + number)
        for number, path in enumerate(packed)
    ]
    weights = [part.weight for part in parts]
    return BatchLoader(datasets, batch_size, weights, rank, world, device), held_out


def pack_parts(
    parts: Sequence[Part],
    folder: Path,
    limit: int | None,
    streaming: bool,
    compress: bool = False,
) -> list[Path]:
    """Pack what is trained on (unless streaming) and what is held out; returns the former's files.

    `compress` keeps what is trained on in compressed shards (qll/bytelm/compressed.py).
    A folder that was completed before is only used.
    """
    paths = [] if streaming else [folder / f"{i}.bytes" for i in range(len(parts))]
    if (folder / TEXTS_NAME).is_file():
        return paths
    store.make_folder(folder)
    for part, path in zip(parts, paths, strict=False):
        pack(part.training(), path, limit, compress)
    pack(held_out_documents(parts, HELD_OUT_BYTES), folder / HELD_OUT_NAME)
    if (folder / HELD_OUT_NAME).stat().st_size <= 2:
        raise TextError(
            "nothing is held out for validation", where=", ".join(p.name for p in parts)
        )
    sizes = [{"packed_bytes": len(open_text(path)), **_stored(path)} for path in paths]
    sizes = sizes or [{"packed_bytes": None}] * len(parts)
    facts = [{**part.facts, **size} for part, size in zip(parts, sizes, strict=True)]
    held_out = {"bytes": (folder / HELD_OUT_NAME).stat().st_size}
    store.write_json(folder / TEXTS_NAME, {"texts": facts, "held_out": held_out})
    return paths


def _stored(path: Path) -> dict[str, int]:
    """Bytes on disk, where they are fewer than those of the text."""
    return {"stored_bytes": path.stat().st_size} if is_compressed(path) else {}


def _parts(texts: str | Sequence[Any], streaming: bool) -> list[Part]:
    if isinstance(texts, str):
        return named_parts(texts, streaming=streaming)
    return [part for item in texts for part in parts_of(item)]
