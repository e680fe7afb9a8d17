"""What benchmarks/speed.py times: runs of a runtime, of transformers' generate, and their rates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qll.evaluate.paired import Times, best_ratio, ratio
from qll.model import insert_networks
from qll.runtime import Runtime
from qll.runtime.llama import Choice
from qll.tn.network import NetworkSpec

PROMPT, DECODED, PREFILL = 64, 16, 512
SEED = 0


def decode_runs(
    runtimes: dict[str, Runtime], batch: int, steps: int | None = None
) -> dict[str, Callable[[], None]]:
    """Per runtime a function that decodes `steps` tokens (None: DECODED) behind a prompt."""
    steps = DECODED if steps is None else steps
    runs = {}
    for name, runtime in runtimes.items():
        cache = runtime.cache(batch, PROMPT + steps)
        with torch.inference_mode():
            first = runtime(some_ids(batch, PROMPT), cache)[:, -1:].argmax(-1)

        def run(runtime=runtime, cache=cache, first=first) -> None:
            cache.filled, token = PROMPT, first
            with torch.inference_mode():
                for _ in range(steps):
                    token = runtime(token, cache)[:, -1:].argmax(-1)

        runs[name] = run
    return runs


def prefill_runs(runtimes: dict[str, Runtime], length: int | None = None) -> dict[str, Any]:
    """Per runtime a function that reads a prompt; length None: PREFILL tokens."""
    length = PREFILL if length is None else length
    runs = {}
    for name, runtime in runtimes.items():
        cache = runtime.cache(1, length)

        def run(runtime=runtime, cache=cache) -> None:
            cache.filled = 0
            with torch.inference_mode():
                runtime(some_ids(1, length), cache)

        runs[name] = run
    return runs


def check_run(runtime: Runtime, batch: int, count: int) -> Callable[[], None]:
    """One pass over `count` tokens behind a prompt."""
    cache = runtime.cache(batch, PROMPT + count)
    ids = some_ids(batch, PROMPT + count)
    with torch.inference_mode():
        runtime(ids[:, :PROMPT], cache)

    def run() -> None:
        cache.filled = PROMPT
        with torch.inference_mode():
            runtime(ids[:, PROMPT:], cache, keep=count)

    return run


def some_ids(batch: int, count: int) -> torch.Tensor:
    """A prompt; which ids are in it does not change how long a pass takes."""
    return (torch.arange(batch * count) % 250).reshape(batch, count)


def generated(model: LlamaForCausalLM, prompt: int, steps: int) -> float:
    """Seconds that transformers' generate takes for `steps` tokens after the first one."""
    ids, clock = some_ids(1, prompt), Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps + 1,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        streamer=clock,
    )
    return clock.stamps[-1] - clock.stamps[1]


class Clock:
    """A streamer that only notes when each token came."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """A token, or first of all the prompt."""
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        """Nothing."""


def block_model(keep: float | None, shrink: int) -> LlamaForCausalLM:
    """A model of one such block and a vocabulary of 256; `keep` None: dense."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=4096 // shrink,
        intermediate_size=14336 // shrink,
        num_hidden_layers=1,
        num_attention_heads=32 // shrink,
        num_key_value_heads=8 // shrink,
        max_position_embeddings=1024,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    if keep is not None:
        entries = {
            (name,): interpolative_spec(tuple(module.weight.shape), keep)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.startswith("model.layers")
        }
        insert_networks(model, entries)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".cores." in name:
                    parameter.normal_(0.0, 0.02)
    return model


def interpolative_spec(shape: tuple[int, int], keep: float) -> NetworkSpec:
    """The low-rank network of the largest rank, a multiple of 16, within `keep` of the numbers."""
    out, into = shape
    ranks = range(16, min(shape) + 1, 16)
    rank = max(r for r in ranks if r * (out + into - r) <= keep * out * into)
    return NetworkSpec("lowrank", shape, (rank,), gauge="interpolative")


def fixed(place: int) -> Choice:
    """A choice of forms that does not look at costs: 0 as stored, -1 rebuilt."""

    def choice(candidates: Any, costs: Any) -> Any:
        return [tuple(forms[place] for forms in candidates)], costs.tokens[-1]

    return choice


def forms(runtime: Runtime) -> dict[str, int]:
    """How many sites of the blocks decode through how many products; dense ones take one."""
    counts: dict[str, int] = {}
    for block in runtime.blocks:
        for site in block.sites.values():
            name = "one_product" if site.program(1).simple else "factored"
            counts[name] = counts.get(name, 0) + 1
            counts["two_programs"] = counts.get("two_programs", 0) + (len(site.programs) > 1)
    return counts


def summary(times: Times, name: str, count: int) -> dict[str, float]:
    """Rates and ratios of one row; `dense` is what it is compared with."""
    return {
        "tokens_per_second": count / min(times[name]),
        "median_tokens_per_second": count / statistics.median(times[name]),
        "faster": ratio(times, name, "dense"),
        "faster_best": best_ratio(times, name, "dense"),
    }


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
