"""Machines that a prediction can be made for.

cpu2: two cores of a cloud machine (AMD EPYC), rates measured by `benchmarks/planner.py`.
h100, 8xh100: one eighth of, and the whole of, a DGX H100. GPU: NVIDIA H100 Tensor Core GPU data
sheet (SXM: 67 TFLOP/s in float32, 80 GB); host: NVIDIA DGX H100 data sheet (two Xeon
8480C of 56 cores, 2 TB, eight NVMe disks). Of the GPU's float32 peak half is counted on in forward
and backward passes. Factorisations run on the CPU there too: a core of the host is taken as one of
cpu2 times the ratio of the clocked peaks (32 float64 FLOP per cycle at 2.0 GHz base over 16 at 2.6
GHz).
cluster:N: N machines like cpu2 with 16 GB each, on 10 Gbit/s to one shared file system.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qll.errors import UsageError
from qll.scale.work import Rates

GB = 1e9
PASS_SHARE = 0.5  # of a GPU's float32 peak
HOST_RATIO = (32 * 2.0) / (16 * 2.6)


@dataclass(frozen=True)
class Machine:
    """One machine or several of a kind; a worker is one process with one thread."""

    name: str
    nodes: int
    cores: int
    """Of one node: as many workers."""
    rates: Rates
    """Operations a second of one core, by kind and size."""
    memory: float
    """Bytes of one node."""
    disk: float
    """Bytes a second that one node reads or writes."""
    network: float = 0.0
    """Bytes a second of one node; 0 on a single machine."""
    gpu_flops: float = 0.0
    """FLOP/s of all GPUs of a node in passes through the model; 0 without."""

    @property
    def workers(self) -> int:
        """Processes that factorise at once."""
        return self.nodes * self.cores


# measured with one thread: operations a second by size
CPU_CORE: Rates = {
    "product": {256: 4.3e10, 512: 4e10, 1024: 4.3e10, 2048: 4.6e10},
    "cholesky": {256: 1.5e10, 512: 1.7e10, 1024: 2.1e10, 2048: 2.8e10},
    "eigenvalues": {256: 8.8e09, 512: 1.1e10, 1024: 1.3e10, 2048: 2e10},
    "eigenvectors": {256: 2.3e10, 512: 3e10, 1024: 4e10, 2048: 3.3e10},
    "pivots": {256: 1.2e10, 512: 2.3e10, 1024: 3.2e10, 2048: 2.9e10},
    "forward": {256: 9.7e10, 512: 9.5e10, 1024: 8.9e10, 2048: 9.3e10},
    "coarse": {256: 2e11, 512: 2.2e11, 1024: 2.2e11, 2048: 2.1e11},
    "vector": {8192: 1.2e10},
    "calls": {1: 1.7e3},
    "fixed": {1: 1.0},
    "bytes": {1: 2.6e10},
}


def _cpu(nodes: int = 1, **changes) -> Machine:
    return Machine("cpu2", nodes, 2, CPU_CORE, **{"memory": 24 * GB, "disk": 0.5 * GB} | changes)


def machine_of(name: str) -> Machine:
    """The machine called `name`, or cluster:N. Raises UsageError.

    >>> machine_of("cluster:64").workers
    128
    """
    host = {
        kind: {size: value * HOST_RATIO for size, value in known.items()}
        for kind, known in CPU_CORE.items()
    }
    dgx = Machine("8xh100", 1, 112, host, 2000 * GB, 20 * GB, 0.0, 8 * 67e12 * PASS_SHARE)
    known = {
        "cpu2": _cpu(),
        "8xh100": dgx,
        "h100": replace(
            dgx,
            name="h100",
            cores=14,
            memory=250 * GB,
            disk=2.5 * GB,
            gpu_flops=dgx.gpu_flops / 8,
        ),
    }
    if name in known:
        return known[name]
    kind, colon, number = name.partition(":")
    if kind == "cluster" and colon and number.isdecimal() and int(number) > 0:
        return replace(_cpu(int(number), memory=16 * GB, network=1.25 * GB), name=name)
    raise UsageError(
        "no such machine", where="--machine", expected=f"{', '.join(known)}, cluster:N", found=name
    )
