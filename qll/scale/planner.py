"""What a conversion of a model of some shape needs on some machine, before anything is booked.

Closed forms (stages.py) over rates (machines.py). A block is planned, a matrix fitted by one job;
jobs are spread over all workers, passes through the model run on one node. `benchmarks/planner.py`
holds predictions against measured runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qll.scale import stages
from qll.scale.machines import Machine
from qll.scale.memory import PROCESS_BYTES, job_bytes
from qll.scale.shapes import Shape
from qll.scale.stages import Settings
from qll.scale.work import Operation, flops, seconds

FLOAT32 = 4.0


@dataclass(frozen=True)
class Stage:
    """One stage of a run on a machine."""

    name: str
    flops: float
    seconds: float
    workers: int
    """Processes that work at once."""
    memory: float
    """Bytes of one of these processes at its peak."""


def predict(shape: Shape, machine: Machine, settings: Settings) -> dict[str, Any]:
    """Sizes of the model, stages, and what to book, as JSON.

    >>> from qll.scale.machines import machine_of
    >>> from qll.scale.shapes import SHAPES
    >>> found = predict(SHAPES["llama3-8b"], machine_of("cpu2"), Settings(keep=0.6))
    >>> found["model"]["params"], round(found["model"]["params_ratio"], 2)
    (8030261248, 0.65)
    """
    found = [*_stages(shape, machine, settings)]
    needed = disk_bytes(shape, settings)
    largest = max(-(-stage.workers // machine.nodes) * stage.memory for stage in found)
    kept = settings.keep * shape.n_layers * shape.block_params
    converted = kept + shape.params - shape.n_layers * shape.block_params
    return {
        "model": {
            "name": shape.name,
            "params": shape.params,
            "params_converted": round(converted),
            "params_ratio": converted / shape.params,
            "bytes": settings.itemsize * shape.params,
            "bytes_converted": round(settings.itemsize * converted),
        },
        "machine": {
            "name": machine.name,
            "nodes": machine.nodes,
            "workers": machine.workers,
            "memory_of_a_node": machine.memory,
        },
        "settings": asdict(settings),
        "stages": [asdict(stage) for stage in found],
        "seconds": sum(stage.seconds for stage in found),
        "node_seconds": machine.nodes * sum(stage.seconds for stage in found),
        "memory_of_a_worker": job_bytes(shape, settings.metric),
        "memory_of_a_node": largest,
        "disk": needed,
        "network": network_bytes(shape, settings) if machine.nodes > 1 else 0.0,
    }


def disk_bytes(shape: Shape, settings: Settings) -> float:
    """Free space that a run needs beside the checkpoint: moments, activations, cores and shards."""
    files = 2 * stages.converted_bytes(shape, settings) + stages.moment_bytes(shape, settings)
    refined = FLOAT32 * settings.keep * shape.n_layers * shape.block_params
    return files + stages.stream_bytes(shape, settings) + refined * bool(settings.passes)


def network_bytes(shape: Shape, settings: Settings) -> float:
    """What workers read and write over the network: weights and moments twice, cores once."""
    weights = settings.itemsize * shape.n_layers * shape.block_params
    moments = stages.moment_bytes(shape, settings)
    return 2 * (weights + moments) + settings.keep * weights


def _stages(shape: Shape, machine: Machine, settings: Settings) -> list[Stage]:
    job = float(job_bytes(shape, settings.metric))
    block = FLOAT32 * shape.block_params
    vocabulary = FLOAT32 * shape.d_vocab * shape.d_model
    calibration = PROCESS_BYTES + 2 * block + FLOAT32 * 2 * max(shape.d_ff**2, 1) + vocabulary
    training = PROCESS_BYTES + block * (1 + 4 * settings.keep)
    both = PROCESS_BYTES + FLOAT32 * shape.params * (1 + settings.keep)
    traffic = network_bytes(shape, settings) / 2
    matrices = list(shape.linears.values())
    planned = [op for out, into in matrices for op in stages.plan_matrix(out, into, settings)]
    fits = [stages.fit_matrix(out, into, settings) for out, into in matrices]
    found = [
        _passing("calibrate", stages.calibrate(shape, settings), machine, calibration),
        _jobs("plan", [planned], shape.n_layers, machine, traffic, job),
        _jobs("convert", fits, shape.n_layers, machine, traffic, job),
    ]
    if settings.passes:
        found.append(_passing("refine", stages.refine(shape, settings), machine, training))
    moved = stages.write(shape, settings)
    found.append(Stage("write", 0.0, moved / machine.disk, 1, PROCESS_BYTES + block))
    if settings.eval_tokens:
        work = stages.evaluate(shape, settings)
        found.append(_passing("evaluate", work, machine, both))
    return found


def _passing(name: str, work: list[Operation], machine: Machine, memory: float) -> Stage:
    """A stage of passes through the model, by one process of one node."""
    count = flops(work)
    if machine.gpu_flops:
        return Stage(name, count, count / machine.gpu_flops, 1, memory)
    return Stage(name, count, seconds(work, machine.rates) / machine.cores, 1, memory)


def _jobs(
    name: str,
    kinds: Sequence[list[Operation]],
    layers: int,
    machine: Machine,
    traffic: float,
    memory: float,
) -> Stage:
    """A stage of `layers` jobs of every kind, spread over all workers.

    No shorter than its longest job, nor than the network takes to carry what the jobs read.
    """
    each = [seconds(kind, machine.rates) for kind in kinds]
    workers = min(machine.workers, layers * len(kinds), _fitting(machine, memory))
    rounds = layers * sum(each) / workers
    if len(kinds) == 1:  # equal jobs: whole rounds
        rounds = -(-layers // workers) * each[0]
    carried = traffic / machine.network if machine.network else 0.0
    count = layers * sum(flops(kind) for kind in kinds)
    return Stage(name, count, max(rounds, *each, carried), workers, memory)


def _fitting(machine: Machine, memory: float) -> int:
    """Workers that the memory of all nodes has room for; one a node at least, which may be too
    many."""
    return machine.nodes * max(1, min(machine.cores, int(machine.memory // memory)))
