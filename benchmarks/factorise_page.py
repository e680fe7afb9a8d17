"""The section of docs/results.md on benchmarks/factorise.py."""

from __future__ import annotations

from typing import Any

LABELS = {
    "ours": "**QLL, `truncated_svd`**",
    "torch_svd": "`torch.linalg.svd(full_matrices=False)`",
    "tensorly_truncated": "tensorly `truncated_svd`",
    "tensorly_symeig": "tensorly `symeig_svd`",
    "tensorly_randomized": "tensorly `randomized_svd`",
    "torchtt": "torchTT, two cores",
    "ours_activation": "**QLL in the activation metric**",
    "svd_llm": "SVD-LLM's procedure (Cholesky, SVD, inverse), same metric",
}


def section(result: dict[str, Any]) -> str:
    """One table per rank."""
    rows, columns = result["shape"]
    machine = result["machine"]
    lines = [
        "## Factorisation of one matrix",
        f"A {rows} x {columns} matrix of the stand-in for Llama 3 8B (`benchmarks/make_llama.py`) "
        f"on {result['threads']} threads of {machine['cpu']}; seconds of the factorisation alone. "
        "Excess is the relative distance of the error from the optimal truncation error of the "
        f"same rank and metric; equal error means at most {result['tolerance']:g}. "
        "Again: `python benchmarks/factorise.py`.",
    ]
    for rank, found in result["ranks"].items():
        lines += ["", f"Rank {rank}:", "", *table(found)]
    return "\n".join(lines)


def table(rows: dict[str, Any]) -> list[str]:
    """Seconds, times of ours, excess."""
    lines = ["| method | seconds | times ours | excess | equal error |", "|---|---|---|---|---|"]
    for name, row in ((name, rows[name]) for name in LABELS if name in rows):
        if "seconds" not in row:
            stopped = row.get("stopped_after_seconds")
            why = f"more than {stopped}" if stopped else "failed"
            lines.append(f"| {LABELS[name]} | {why} | | | |")
            continue
        own = rows["ours_activation" if name in ("ours_activation", "svd_llm") else "ours"]
        times = f"{row['seconds'] / own['seconds']:.1f}" if "seconds" in own else ""
        equal = "yes" if row["equal_error"] else "no"
        lines.append(
            f"| {LABELS[name]} | {row['seconds']:.1f} | {times} | {row['excess']:.1e} | {equal} |"
        )
    return lines
