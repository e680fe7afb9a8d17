"""Which executor a run gets: this process, several processes, or workers of a scheduler."""

from __future__ import annotations

from pathlib import Path

import psutil

from qll.convert import Executor
from qll.errors import MemoryShortError
from qll.options import ScaleOptions
from qll.scale.cluster import Cluster
from qll.scale.here import Here
from qll.scale.inputs import Inputs, Opened
from qll.scale.processes import Processes


def executor_of(
    options: ScaleOptions, inputs: Inputs, here: Opened, folder: Path, needed: int
) -> Executor:
    """The executor of --workers or --dask.

    folder: where jobs write. needed: bytes of memory that a job takes. Raises MemoryShortError when
    this machine has less than its workers would need.
    """
    if options.dask is not None:
        return Cluster(inputs, options.dask, folder, options.job_threads, needed)
    if not options.workers:
        return Here(here, inputs.options)
    require_memory(options.workers, needed)
    return Processes(inputs, options.workers, options.job_threads)


def require_memory(workers: int, needed: int) -> None:
    """Raise MemoryShortError unless `workers` times `needed` bytes are free on this machine.

    >>> require_memory(1, 1)
    """
    free = psutil.virtual_memory().available
    if workers * needed > free:
        fitting = free // needed
        raise MemoryShortError(
            "not enough memory on this machine",
            where=f"--workers {workers}",
            expected=f"{workers} x {needed / 1e9:.2f} GB",
            found=f"{free / 1e9:.2f} GB free",
            hint=f"take --workers {fitting}" if fitting else "use a machine with more memory",
        )
