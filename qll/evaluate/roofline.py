"""How near a runtime comes to what the machine can do: bytes, FLOPs and measured limits.

A pass that reads b bytes and does f FLOPs takes at least max(b / bandwidth, f / peak) seconds
(Williams et al., "Roofline", 2009). Both limits are measured here with torch's own kernels, next to
the rates that they bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from qll.evaluate.paired import best_ratio, race, ratio
from qll.runtime import Runtime, best_of, decoder
from qll.runtime.costs import device_costs
from qll.runtime.work import work_of

READ_BYTES = 256 << 20
SQUARE = 1536
REPEATS = 7


@torch.inference_mode()
def machine_limits(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """{"bandwidth": bytes read per second, "flops": FLOPs per second}, the best of a few kernels.

    Reads: a sum, and matrices times one vector; FLOPs: a product of square matrices in `dtype`.
    """
    device = torch.device(device)
    rows = READ_BYTES // (4096 * 4)
    wide = torch.ones(rows, 4096, device=device)
    half = torch.ones(2 * rows, 4096, device=device, dtype=torch.float16)
    reads = [
        lambda: wide.sum(),
        lambda: torch.mv(wide, wide[0]),
        lambda: torch.mv(half, half[0]),
    ]
    bandwidth = READ_BYTES / min(best_of(reads, REPEATS, device))
    square = torch.ones(SQUARE, SQUARE, device=device, dtype=dtype)
    seconds = min(best_of([lambda: square @ square], REPEATS, device))
    # a busy moment must not make the limit lower than what was seen before
    known = device_costs(device, dtype)
    return {
        "bandwidth": max(bandwidth, known.bandwidth(dtype.itemsize)),
        "flops": max(2 * SQUARE**3 / seconds, known.flops()),
    }


def measure_rates(
    runtimes: Mapping[str, Runtime],
    *,
    batch: int = 1,
    prompt_tokens: int = 512,
    new_tokens: int = 16,
    rounds: int = 5,
) -> dict[str, Any]:
    """Decode and prefill rates of runtimes that take turns, with the work and limits behind them.

    Per phase and name: seconds (least, median) of a pass, tokens_per_second, bytes and flops per
    token, limit (tokens per second) and share of it; "faster": how many times faster each is than
    the first, as the median within rounds and by least times.
    """
    first = next(iter(runtimes.values()))
    limits = machine_limits(first.device, first.dtype)
    passes = {
        "decode": (_decode_runs(runtimes, batch, prompt_tokens, new_tokens), 1, new_tokens),
        "prefill": (_prefill_runs(runtimes, batch, prompt_tokens), prompt_tokens, 1),
    }
    found: dict[str, Any] = {"limits": limits}
    for phase, (runs, tokens, steps) in passes.items():
        times = race(runs, rounds, first.device)
        context = prompt_tokens + (new_tokens // 2 if phase == "decode" else 0)
        rows = {}
        for name, runtime in runtimes.items():
            work = work_of(runtime, batch, tokens, context)
            count = batch * tokens
            rate = count * steps / min(times[name])
            limit = count / work.seconds(limits["bandwidth"], limits["flops"])
            rows[name] = {
                "seconds": [second / steps for second in times[name]],
                "tokens_per_second": rate,
                "bytes_per_token": work.bytes / count,
                "flops_per_token": work.flops / count,
                "limit_tokens_per_second": limit,
                "share_of_limit": rate / limit,
            }
        base = next(iter(runtimes))
        faster = {
            name: {"median": ratio(times, name, base), "best": best_ratio(times, name, base)}
            for name in runtimes
        }
        found[phase] = {"rows": rows, "faster": faster}
    return found


def some_ids(runtime: Runtime, batch: int, count: int) -> Int[Tensor, "batch count"]:
    """A prompt; which ids are in it does not change how long a pass takes."""
    vocab = runtime.head.outs[0]
    return (torch.arange(batch * count, device=runtime.device) % vocab).reshape(batch, count)


def _decode_runs(
    runtimes: Mapping[str, Runtime], batch: int, prompt: int, steps: int
) -> dict[str, Any]:
    runs = {}
    for name, runtime in runtimes.items():
        cache = runtime.cache(batch, prompt + steps)
        ids = some_ids(runtime, batch, prompt)
        with torch.inference_mode():
            first = runtime(ids, cache)[:, -1:].argmax(-1)
        step = decoder(runtime, cache)

        def run(cache=cache, step=step, first=first) -> None:
            cache.filled, token = prompt, first
            with torch.inference_mode():
                for _ in range(steps):
                    token = step(token)[:, -1:].argmax(-1)

        runs[name] = run
    return runs


def _prefill_runs(runtimes: Mapping[str, Runtime], batch: int, prompt: int) -> dict[str, Any]:
    runs = {}
    for name, runtime in runtimes.items():
        cache, ids = runtime.cache(batch, prompt), some_ids(runtime, batch, prompt)

        def run(runtime=runtime, cache=cache, ids=ids) -> None:
            cache.filled = 0
            with torch.inference_mode():
                runtime(ids, cache)

        runs[name] = run
    return runs
