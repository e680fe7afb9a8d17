"""The section of docs/results.md on the runs at the shape of Llama 3 8B."""

from __future__ import annotations

from typing import Any

MEMORY_LIMIT = 8e9


def section(result: dict[str, Any]) -> str:
    """The long run: a low rank everywhere, few calibration tokens, many blocks."""
    return run("## A conversion at the shape of Llama 3 8B", result)


def memory(result: dict[str, Any]) -> str:
    """The run for its memory: many calibration tokens, few blocks."""
    return run(f"### Memory at {result['settings']['calib_tokens']:,} calibration tokens", result)


def kfac(result: dict[str, Any]) -> str:
    """The run in the K-FAC metric: gradients of the loss through every block, block by block."""
    return run("### The K-FAC metric, every format offered", result)


def run(title: str, result: dict[str, Any]) -> str:
    """What was run, seconds per stage, memory, bytes.

    >>> row = {"stages": {"plan": 60.0, "convert": 90.0}}
    >>> minutes(row["stages"])
    'plan 1.0, convert 1.5 minutes'
    """
    machine, settings = result["machine"], result["settings"]
    note = f" ({result['note']})" if result["note"] else ""
    error, verify = result["metric_error"], result["verify"]
    peak = f"{result['peak_rss_bytes'] / 1e9:.2f} GB of its own memory"
    return "\n\n".join(
        [
            title,
            f"Machine: {machine['cpu']}, {machine['cores']} cores, torch {result['torch']}. Again: "
            f"`{result['command']} --work DIR`.",
            f"{result['blocks']} of {result['blocks_of_the_original']} blocks{note}: random "
            f"matrices with realistic spectra in bfloat16. `--format {settings['format']} --metric "
            f"{settings['metric']} --keep {settings['keep']}`, {settings['calib_tokens']:,} "
            f"calibration tokens in windows of {settings['context']}.",
            f"{result['wall_seconds'] / 60:.0f} minutes ({minutes(result['stages'])}); {peak} at "
            f"its highest (limit {MEMORY_LIMIT / 1e9:.0f} GB; {result['peak_rss_counts']}). "
            f"{result['bytes_in'] / 1e9:.2f} GB in, {result['bytes_out'] / 1e9:.2f} GB out. "
            f"`qll verify` of the output: passed in {verify['seconds']:.0f} s. Metric error of the "
            f"matrices: mean {error['mean']:.3f}, at most {error['max']:.3f} of their norm.",
        ]
    )


def minutes(stages: dict[str, float]) -> str:
    """Minutes of every stage, in words."""
    return ", ".join(f"{name} {value / 60:.1f}" for name, value in stages.items()) + " minutes"
