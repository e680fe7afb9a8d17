"""`qll bench`: a converted folder and its dense model against the limits of this machine."""

from __future__ import annotations

import platform
from typing import Any

import torch

from qll.config import BenchConfig
from qll.pipeline import choose_device
from qll.rungenerate import open_model


def bench_folder(config: BenchConfig) -> dict[str, Any]:
    """What `qll.evaluate.roofline.measure_rates` finds, and on what machine.

    Raises UsageError when prompt and continuation do not fit the models' context.
    """
    from qll.evaluate.roofline import measure_rates
    from qll.runtime import Runtime

    device = choose_device(config.device)
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    runtimes = {}
    if config.model is not None:
        model, _ = open_model(config.model, device, dtype)
        dtype = model.dtype
        runtimes["converted"] = Runtime.from_model(model, consume=True)
    model, _ = open_model(config.llama_dir, device, dtype)
    runtimes = {"dense": Runtime.from_model(model, consume=True), **runtimes}
    rates = measure_rates(
        runtimes,
        batch=config.batch,
        prompt_tokens=config.prompt_tokens,
        new_tokens=config.new_tokens,
        rounds=config.rounds,
    )
    setting = {
        "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "batch": config.batch,
        "prompt_tokens": config.prompt_tokens,
        "platform": platform.platform(),
        "torch": torch.__version__,
    }
    return {"setting": setting, **rates}


def bench_table(value: dict[str, Any]) -> str:
    """The table of `bench_folder`."""
    setting, limits = value["setting"], value["limits"]
    lines = [
        f"{setting['device']}, {setting['threads']} threads, {setting['dtype']}: reads "
        f"{limits['bandwidth'] / 1e9:.1f} GB/s, {limits['flops'] / 1e9:.0f} GFLOP/s (measured)",
        f"batch {setting['batch']}, prompt of {setting['prompt_tokens']} tokens",
        "",
        f"{'phase':8s} {'model':10s} {'MB/token':>9s} {'MFLOP/token':>12s} {'tokens/s':>9s} "
        f"{'limit':>9s} {'share':>6s} {'x dense':>8s}",
    ]
    for phase in ("decode", "prefill"):
        for name, row in value[phase]["rows"].items():
            faster = value[phase]["faster"][name]["median"]
            lines.append(
                f"{phase:8s} {name:10s} {row['bytes_per_token'] / 1e6:9.2f} "
                f"{row['flops_per_token'] / 1e6:12.1f} {row['tokens_per_second']:9.1f} "
                f"{row['limit_tokens_per_second']:9.1f} {row['share_of_limit']:6.0%} {faster:8.3f}"
            )
    return "\n".join(lines)
