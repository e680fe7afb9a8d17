"""Proof that the files of a checkpoint are those that were opened, while a long run reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qll.errors import IntegrityError

Stamps = Mapping[Path, tuple[int, int]]


def stamps_of(files: Sequence[Path]) -> Stamps:
    """Size and time of change (ns) of every file.

    >>> stamps_of([])
    {}
    """
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def require_unchanged(stamps: Stamps) -> None:
    """Raise IntegrityError, naming the file, unless all files are as `stamps_of` found them.

    >>> require_unchanged({})
    """
    for file, stamp in stamps.items():
        found = stamps_of([file])[file] if file.is_file() else None
        if found != stamp:
            raise IntegrityError(
                "the checkpoint changed while it was being converted",
                where=file,
                expected=f"{stamp[0]} bytes, as when the run began",
                found="no file" if found is None else f"{found[0]} bytes, changed since",
                hint="put the original file back and run the same command again to resume, or "
                "choose another --out for the new one",
            )
