"""How fast this machine is, measured: rates of every kind of operation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import scipy.linalg
import torch
from threadpoolctl import threadpool_limits
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from qll.model.blocks import run_block
from qll.model.dense import sdpa_config
from qll.scale.work import COUNTS, Rates
from qll.tn.symmetric import eigenvalues_descending, eigh_descending
from qll.train.precision import choose_precision

SIZES = (256, 512, 1024, 2048)
STREAM_BYTES = 1 << 27
WIDE = 8192  # side of a matrix that no cache holds

Timed = Callable[[Callable[[], object]], float]  # seconds of an action


def measure(sizes: Sequence[int] = SIZES, repeats: int = 3, threads: int = 1) -> Rates:
    """Operations a second by kind and size, of a process with so many threads; medians.

    One thread is measured in processor time, which is the same when others use the machine
    meanwhile; several by the wall clock, since some operations keep only one of them busy.

    >>> found = measure(sizes=(64,), repeats=1)
    >>> from qll.scale.work import OTHERS
    >>> sorted(found) == sorted([*COUNTS, *OTHERS])
    True
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    timed = partial(_time, repeats, time.process_time if threads == 1 else time.perf_counter)
    try:
        with threadpool_limits(threads):
            found = {
                kind: {n: _rate(kind, n, timed) for n in sizes}
                for kind in COUNTS
                if kind != "vector"
            }
            return found | {
                "vector": {WIDE: _vector(timed)},
                "bytes": {1: _stream(timed)},
                "calls": {1: _calls(timed)},
                "fixed": {1: 1.0},
            }
    finally:
        torch.set_num_threads(before)


def _rate(kind: str, size: int, timed: Timed) -> float:
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    squares = matrix @ matrix.T / size + torch.eye(size, dtype=torch.float64)
    narrow, identity = matrix.float(), torch.eye(size, dtype=torch.float64)
    tall = narrow[:, : size // 2].contiguous().numpy()
    coarse = narrow.to(choose_precision("auto", narrow.device))

    def cholesky() -> None:
        torch.linalg.solve_triangular(torch.linalg.cholesky(squares), identity, upper=False)

    actions: dict[str, Callable[[], object]] = {
        "product": lambda: matrix @ squares,
        "cholesky": cholesky,
        "eigenvalues": lambda: eigenvalues_descending(squares),
        "eigenvectors": lambda: eigh_descending(squares.clone()),
        "pivots": lambda: scipy.linalg.qr(tall.T, mode="r", pivoting=True),
        "forward": lambda: narrow @ narrow,
        "coarse": lambda: coarse @ coarse,
    }
    return COUNTS[kind](size) / timed(actions[kind])


def _vector(timed: Timed) -> float:
    matrix, vector = torch.zeros(WIDE, WIDE), torch.zeros(WIDE)
    return COUNTS["vector"](WIDE) / timed(lambda: matrix @ vector)


def _calls(timed: Timed) -> float:
    """Blocks a second when there is next to nothing to compute in one."""
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2)
    block, hidden = LlamaDecoderLayer(sdpa_config(config), 0).eval(), torch.zeros(1, 1, 16)
    with torch.no_grad():
        return 1 / timed(lambda: run_block(block, hidden))


def _stream(timed: Timed) -> float:
    """Bytes read and written a second by a copy."""
    numbers = torch.zeros(STREAM_BYTES // 8, dtype=torch.float64)
    target = torch.empty_like(numbers)
    return 2 * STREAM_BYTES / timed(lambda: target.copy_(numbers))


def _time(repeats: int, clock: Callable[[], float], action: Callable[[], object]) -> float:
    action()
    return statistics.median(_once(action, clock) for _ in range(repeats))


def _once(action: Callable[[], object], clock: Callable[[], float]) -> float:
    rounds, start = 0, clock()
    while (spent := clock() - start) < 0.05:
        action()
        rounds += 1
    return spent / rounds
