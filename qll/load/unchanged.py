"""Proof that the files of a checkpoint are those that were opened, while a long run reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from qll.errors import SourceChangedError

Stamps = Mapping[Path, tuple[int, int]]


def stamps_of(files: Iterable[Path]) -> Stamps:
    """Size and time of change (ns) of every file; (-1, -1) for one that is not there.

    >>> stamps_of([Path("no such file")])
    {PosixPath('no such file'): (-1, -1)}
    """
    found = {}
    for file in files:
        try:
            facts = file.stat()
            found[file] = (facts.st_size, facts.st_mtime_ns)
        except OSError:
            found[file] = (-1, -1)
    return found


def require_unchanged(stamps: Stamps) -> None:
    """Raise SourceChangedError, naming the file, unless all files are as `stamps_of` found them.

    >>> require_unchanged({})
    """
    for file, stamp in stamps.items():
        found = stamps_of([file])[file]
        if found != stamp:
            raise SourceChangedError(
                "the checkpoint changed while it was being converted",
                where=file,
                expected=f"{stamp[0]} bytes, as when the run began",
                found="no file" if found[0] < 0 else f"{found[0]} bytes, changed since",
                hint="put the original file back and run the same command again to resume, or "
                "choose another --out for the new one",
            )
