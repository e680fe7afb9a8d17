"""Who computes the jobs of a run: the executor of --workers or --dask, given what the run reads."""

from __future__ import annotations

from pathlib import Path

from qll.calibrate import MomentStore
from qll.convert import Executor
from qll.runfolder import Run
from qll.scale import Inputs, executor_of, job_bytes, opened_here, shape_of


def executor_for(state: Run, moments: MomentStore | None) -> Executor:
    """The executor of the run's settings. Raises MemoryShortError, and SourceChangedError when the
    checkpoint is no longer the one that the run began with."""
    inputs = inputs_of(state, moments)
    here = opened_here(inputs, state.source, moments)
    needed = job_bytes(shape_of(state.source.config), inputs.options.metric)
    return executor_of(state.config.scale, inputs, here, state.out.absolute(), needed)


def inputs_of(state: Run, moments: MomentStore | None) -> Inputs:
    """What the jobs of the run read, by path; workers have other current folders."""
    config, source = state.config, state.source
    return Inputs(
        llama_dir=None if config.llama_dir is None else config.llama_dir.absolute(),
        fingerprint=source.fingerprint,
        options=config.convert,
        moments=None if moments is None else moments.folder.absolute(),
        prior=None if moments is None or moments.prior is None else moments.prior.folder.absolute(),
        gauges=gauges_path(state).absolute() if config.convert.disentangle != "none" else None,
    )


def gauges_path(state: Run) -> Path:
    """Where the bases of --disentangle are kept."""
    return state.work / "gauges.safetensors"
