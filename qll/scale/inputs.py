"""What a job reads, by path: so that any process on any machine can open it for itself.

A job never receives weights or moments, only where they lie and which ones are meant. Each process
opens them once, checks that they are the ones meant, and then watches sizes and times of the files:
a checkpoint that changes under a run is noticed before and after every job.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from qll.calibrate import MomentStore
from qll.convert import disentangled
from qll.errors import SourceChangedError
from qll.load import Source, Stamps, open_source, require_unchanged, stamps_of
from qll.options import ConvertOptions


@dataclass(frozen=True)
class Inputs:
    """A checkpoint, its moments and the options of a run."""

    llama_dir: Path | None
    """Folder or file of the checkpoint; None: the model embedded in a package."""
    fingerprint: str
    """Of the checkpoint that is meant."""
    options: ConvertOptions
    moments: Path | None = None
    prior: Path | None = None
    gauges: Path | None = None
    """File with the bases of --disentangle."""


@dataclass(frozen=True)
class Opened:
    """Inputs after opening, and what their weight files looked like then."""

    source: Source
    moments: MomentStore | None
    stamps: Stamps = field(default_factory=dict)

    def require_unchanged(self) -> None:
        """Raise SourceChangedError when a weight file has another size or time than when opened."""
        require_unchanged(self.stamps)


@functools.lru_cache(maxsize=1)
def opened(inputs: Inputs) -> Opened:
    """The inputs as this process sees them; opened once.

    Raises MissingFileError and other CheckpointErrors for files that are not here or not whole,
    and SourceChangedError when they are not the ones that the run began with.
    """
    source = open_source(inputs.llama_dir)
    stamps = stamps_of(source.files)
    if source.fingerprint != inputs.fingerprint:
        raise _changed(source.path)
    prior = None if inputs.prior is None else MomentStore(inputs.prior)
    moments = None if inputs.moments is None else MomentStore(inputs.moments, prior=prior)
    if inputs.gauges is not None:
        source, moments = disentangled(source, moments, inputs.options, inputs.gauges)
    return Opened(source, moments, stamps)


def opened_here(inputs: Inputs, source: Source, moments: MomentStore | None) -> Opened:
    """What this process has open already, after proof that its files are still those of `inputs`.

    Raises SourceChangedError.
    """
    here = Opened(source, moments, stamps_of(source.files))
    if open_source(inputs.llama_dir).fingerprint != inputs.fingerprint:
        raise _changed(source.path)
    return here


def _changed(path: Path) -> SourceChangedError:
    return SourceChangedError(
        "the checkpoint is not the one that the run began with",
        where=path,
        hint="restore its files and run the same command again, which goes on where it was, or "
        "choose another --out",
    )
