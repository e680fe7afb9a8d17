"""What a product costs on the device at hand: measured once, remembered, then a closed form.

For a few token counts T the time of x [T, into] times W [out, into] is fitted as

    seconds = start + per_entry * out * into

with weights that no cache holds, as in a model at work; likewise what moving a number costs when
pieces are joined (`join`) or put in order (`gather`). Times are minima over repetitions that take
turns, so a busy machine makes them larger but not unfair. The numbers choose between equal ways to
compute, nothing else depends on them. They live in the user's cache folder, per device, dtype,
torch version and number of threads.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qll import store
from qll.runtime.kernels import CODED, KERNELS, available, coded_kernels

TOKENS = (1, 2, 4, 8, 16, 64, 256, 512)
# rows and columns: what starting a product costs, and two sizes that tell the slope
SMALL, TALL, WIDE = (32, 64), (2048, 768), (1024, 1536)
# Weights that are read one after another: more than the last cache of most machines.
COLD_BYTES = 96 << 20
REPEATS = 5
VERSION = 3


@dataclass(frozen=True)
class Line:
    """seconds = start + slope * size."""

    start: float
    slope: float

    def at(self, size: int) -> float:
        """Seconds at `size`."""
        return self.start + self.slope * size


@dataclass(frozen=True)
class DeviceCosts:
    """Measured costs by token count; counts between two measured ones lie on a line.

    >>> costs = DeviceCosts((1, 4), {"plain": (Line(1.0, 2.0), Line(4.0, 2.0))},
    ...                     (Line(0.0, 0.0), Line(0.0, 1.0)), ())
    >>> costs.product(1, 3, 5), costs.product(2, 3, 5), costs.product(8, 3, 5)
    (31.0, 32.0, 68.0)
    """

    tokens: tuple[int, ...]
    products: dict[str, tuple[Line, ...]]
    """Per kernel and token count, over the entries of the matrix."""
    joins: tuple[Line, ...]
    """Over the numbers per token that are joined."""
    gathers: tuple[Line, ...]
    """Over the numbers per token that are joined and put in order."""
    codes: dict[str, tuple[Line, ...]] = field(default_factory=dict)
    """Per kernel for packed matrices, over their entries."""

    @property
    def kernel(self) -> str:
        """The kernel that reads weights fastest for one token."""
        return min(self.products, key=lambda name: self.products[name][0].at(TALL[0] * TALL[1]))

    def kernel_for(self, out: int, into: int) -> str:
        """The kernel that multiplies one token with a matrix of this shape fastest."""
        return min(self.products, key=lambda name: self.products[name][0].at(out * into))

    def product(self, tokens: int, out: int, into: int) -> float:
        """Seconds of [tokens, into] times [into, out] by `kernel_for` this shape."""
        return self._at(self.products[self.kernel_for(out, into)], tokens, out * into)

    def coded(self, kernel: str, tokens: int, out: int, into: int) -> float:
        """Seconds of the same by a kernel for packed matrices."""
        return self._at(self.codes[kernel], tokens, out * into)

    def join(self, tokens: int, numbers: int) -> float:
        """Seconds to put pieces of `numbers` values a token side by side."""
        return self._at(self.joins, tokens, numbers)

    def gather(self, tokens: int, numbers: int) -> float:
        """Seconds to put pieces side by side and their `numbers` values a token in order."""
        return self._at(self.gathers, tokens, numbers)

    def bandwidth(self, itemsize: int) -> float:
        """Bytes of weights per second that the product with one token reads."""
        return itemsize / self.products[self.kernel][0].slope

    def flops(self) -> float:
        """FLOPs per second of the product with the most tokens."""
        return 2 * self.tokens[-1] / self.products[self.kernel][-1].slope

    def _at(self, lines: tuple[Line, ...], tokens: int, size: int) -> float:
        place = bisect.bisect_left(self.tokens, tokens)
        if place == len(lines):
            return lines[-1].at(size) * tokens / self.tokens[-1]
        if place == 0 or self.tokens[place] == tokens:
            return lines[place].at(size)
        low, high = self.tokens[place - 1], self.tokens[place]
        share = (tokens - low) / (high - low)
        return (1 - share) * lines[place - 1].at(size) + share * lines[place].at(size)


def device_costs(device: str | torch.device, dtype: torch.dtype) -> DeviceCosts:
    """The costs of `device` in `dtype`: from the user's cache, or measured now (seconds)."""
    path = cache_folder() / f"costs-{_key(torch.device(device), dtype)}.json"
    if path.is_file():
        try:
            return _from_json(json.loads(path.read_text()))
        except (KeyError, TypeError, ValueError):
            pass  # of another version, or damaged: measured again
    found = measure(torch.device(device), dtype)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        store.write_json(path, asdict(found))
    except OSError:
        pass  # a cache that cannot be written is only slower
    return found


def cache_folder() -> Path:
    """Where measured costs are remembered: QLL_CACHE, or the system's folder for caches."""
    if named := os.environ.get("QLL_CACHE"):
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qll"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "qll"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qll"


@torch.inference_mode()
def measure(
    device: torch.device, dtype: torch.dtype, cold_bytes: int = COLD_BYTES, repeats: int = REPEATS
) -> DeviceCosts:
    """The costs, measured now; about three seconds on two CPU cores."""
    names = (*available(dtype, device), *coded_kernels(dtype, device))
    shapes = (SMALL, TALL, WIDE)
    held = {
        (name, shape): _copies(name, shape, dtype, device, cold_bytes)
        for name in names
        for shape in shapes
    }
    rows = [_product_lines(held, names, T, dtype, device, repeats) for T in TOKENS]
    found = {name: tuple(row[name] for row in rows) for name in names}
    products, codes = ({n: found[n] for n in kind if n in found} for kind in (KERNELS, CODED))
    moves = [_move_lines(T, dtype, device, repeats) for T in TOKENS]
    joins, gathers = zip(*moves, strict=True)
    return DeviceCosts(TOKENS, products, joins, gathers, codes)


def _copies(
    name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, cold_bytes: int
) -> list[torch.nn.Module]:
    count = 1 if shape == SMALL else max(2, cold_bytes // (shape[0] * shape[1] * dtype.itemsize))
    draw = torch.Generator().manual_seed(0)
    if name in CODED:
        codes = torch.randint(-8, 8, shape, generator=draw, dtype=torch.int8)
        group = shape[1] if name == "int8" else 32
        scales = torch.ones(shape[0], shape[1] // group)
        return [CODED[name](codes.clone(), scales, group).to(device) for _ in range(count)]
    matrix = torch.randn(shape, generator=draw).to(device, dtype) / shape[1] ** 0.5
    return [KERNELS[name](matrix.clone()) for _ in range(count)]


def _product_lines(
    held: dict[tuple[str, tuple[int, int]], list[torch.nn.Module]],
    names: Sequence[str],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> dict[str, Line]:
    """The line of every kernel; kernels take turns too, since neighbours come and go."""
    turns = dict.fromkeys(held, 0)

    def run(key: tuple[str, tuple[int, int]]) -> Callable[[], Any]:
        x = torch.ones(tokens, key[1][1], dtype=dtype, device=device)

        def once() -> None:
            turns[key] += 1
            kernels = held[key]
            kernels[turns[key] % len(kernels)](x)

        return once

    repeats = max(2, repeats if tokens >= 64 else 4 * repeats)
    times = dict(zip(held, best_of([run(key) for key in held], repeats, device), strict=True))
    lines = {}
    for name in names:
        small, tall, wide = (times[name, shape] for shape in (SMALL, TALL, WIDE))
        entries = SMALL[0] * SMALL[1]
        size = TALL[0] * TALL[1]  # WIDE has as many
        slope = max((0.5 * (tall + wide) - small) / (size - entries), 1e-15)
        lines[name] = Line(max(small - slope * entries, 0.0), slope)
    return lines


def _move_lines(
    tokens: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> tuple[Line, Line]:
    few, many = 64, 2048
    numbers = {n: torch.ones(tokens, n, dtype=dtype, device=device) for n in (few, many)}
    orders = {n: torch.arange(n, device=device).flip(0) for n in (few, many)}

    def arrange(n: int, order: Tensor | None) -> Callable[[], Tensor]:
        return lambda: arranged([numbers[n][:, : n // 2], numbers[n][:, n // 2 :]], order)

    runs = [
        arrange(n, orders[n] if moved else None) for moved in (False, True) for n in (few, many)
    ]
    times = best_of(runs, 4 * repeats, device)
    lines = []
    for low, high in (times[:2], times[2:]):
        slope = max((high - low) / (many - few), 1e-15)
        lines.append(Line(max(low - slope * few, 0.0), slope))
    return lines[0], lines[1]


def arranged(
    pieces: list[Float[Tensor, "tokens _"]], order: Int[Tensor, " total"] | None = None
) -> Float[Tensor, "tokens total"]:
    """The pieces side by side, then their columns in `order`.

    On a CPU columns are moved as rows of the transpose, which are copied whole: ten times faster.

    >>> arranged([torch.ones(1, 1), torch.zeros(1, 1)], torch.tensor([1, 0])).tolist()
    [[0.0, 1.0]]
    """
    if order is None:
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    if pieces[0].shape[0] == 1 or pieces[0].device.type != "cpu":
        return torch.cat(pieces, 1).index_select(1, order)
    return torch.cat([piece.t() for piece in pieces], 0).index_select(0, order).t()


def best_of(
    runs: list[Callable[[], Any]], repeats: int, device: str | torch.device = "cpu"
) -> list[float]:
    """The least seconds of every run, taking turns, after one round that warms up.

    >>> all(seconds >= 0 for seconds in best_of([lambda: 1, lambda: 2], 3))
    True
    """
    device, best = torch.device(device), [float("inf")] * len(runs)
    for turn in range(repeats + 1):
        for place, run in enumerate(runs):
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            if turn:
                best[place] = min(best[place], time.perf_counter() - start)
    return best


def synchronise(device: torch.device) -> None:
    """Wait until all work given to `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _key(device: torch.device, dtype: torch.dtype) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    facts = (VERSION, device.type, name, str(dtype), torch.__version__, torch.get_num_threads())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.processor()} {platform.machine()}"
    return next((line for line in lines if line.startswith("model name")), platform.machine())


def _from_json(value: dict[str, Any]) -> DeviceCosts:
    def lines(items: list[dict[str, float]]) -> tuple[Line, ...]:
        return tuple(Line(float(item["start"]), float(item["slope"])) for item in items)

    found = DeviceCosts(
        tuple(int(count) for count in value["tokens"]),
        {name: lines(items) for name, items in value["products"].items()},
        lines(value["joins"]),
        lines(value["gathers"]),
        {name: lines(items) for name, items in value["codes"].items()},
    )
    each = (*found.products.values(), *found.codes.values(), found.joins, found.gathers)
    if not found.products or any(len(item) != len(found.tokens) for item in each):
        raise ValueError("not a table of costs")
    return found
