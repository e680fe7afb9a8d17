"""The section of docs/results.md on the planner, from benchmarks/results/planner.json."""

from __future__ import annotations

from typing import Any

LIMIT = 0.25  # share by which a prediction may miss


def section(result: dict[str, Any]) -> str:
    """The text of the section: predicted beside measured, misses in bold.

    >>> row = {"measured": 2.0, "predicted": 1.0, "ratio": 0.5}
    >>> print(line("plan", row, "s", 1))
    | plan | 2.00 s | 1.00 s | **0.50** |
    """
    machine = result["machine"]
    shape = next(iter(result["runs"].values()))["shape"]["name"]
    lines = [
        "## What the planner predicts",
        f"Machine: {machine['cpu']}, {machine['threads']} thread, {machine['platform']}. Again: "
        f"`{result['command']}`. Seconds are of the processor, of `main.py --format lowrank` "
        f"on {shape}; rates of this machine are measured first. The fixed second of "
        "`calibrate`, the terms of `evaluate` and `refine`, how often `survival` reads an encoder, "
        "and the constant of memory were set after a look at such runs. A prediction may miss by a "
        "quarter; those that miss by more are bold. "
        "Survival is of one place of an autoencoder of the 32x set of Llama 3 8B.",
        "",
        "| what | measured | predicted | predicted / measured |",
        "|---|---|---|---|",
    ]
    for metric, run in result["runs"].items():
        lines += [line(f"{stage}, {metric}", row, "s", 1) for stage, row in run["stages"].items()]
    lines += [
        line(f"memory of a job, {row['d_model']} x {row['d_ff']}", row, "GB", 1e9)
        for row in result["memory"]
    ]
    tokens = result["survival"]["tokens"]
    lines += [
        line(f"survival, {tokens} tokens", result["survival"]["seconds"], "s", 1),
        line("memory of survival", result["survival"]["memory"], "GB", 1e9),
    ]
    if "whole_run" in result:
        lines += ["", whole_run(result["whole_run"])]
    return "\n".join(lines)


def whole_run(found: dict[str, Any]) -> str:
    """The run at the shape of 8B, by the wall clock."""
    rows = [line(stage, row, "s", 1) for stage, row in found["seconds"].items()]
    others = found["seconds_of_workers"].items()
    rows += [line(f"{stage}, as workers", row, "s", 1) for stage, row in others]
    about = (
        f"{found['blocks']} blocks of Llama 3 8B on {found['machine']['cpu']}, "
        f"{found['machine']['cores']} cores, by the wall clock; products and files of that machine "
        "were measured on the same day. The run was one process with all threads, and so are the "
        "first rows. `as workers`: what `plan --machine` assumes instead, a worker of one thread "
        "on every core (`--workers`), held against the same run, which leaves a core idle where "
        "one thread finds eigenvalues. How files count in `write`, and that the run is compared "
        "as one process, were set after a look at this run."
    )
    if "workers_run" in found:
        command, seconds = found["workers_run"]["command"], found["workers_run"]["seconds"]
        rows += [line(f"{stage}, run with workers", row, "s", 1) for stage, row in seconds.items()]
        about += f" `run with workers`: `{command}`."
    text = [
        about,
        "",
        "| what | measured | predicted | predicted / measured |",
        "|---|---|---|---|",
        *rows,
        line("memory", found["memory"], "GB", 1e9),
    ]
    return "\n".join(text)


def line(name: str, row: dict[str, float], unit: str, size: float) -> str:
    """A row of the table."""
    ratio = f"{row['ratio']:.2f}"
    if abs(row["ratio"] - 1) > LIMIT:
        ratio = f"**{ratio}**"
    measured, predicted = row["measured"] / size, row["predicted"] / size
    return f"| {name} | {measured:.2f} {unit} | {predicted:.2f} {unit} | {ratio} |"
