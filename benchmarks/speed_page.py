"""The section of docs/results.md on speed, from benchmarks/results/speed.json."""

from __future__ import annotations

from typing import Any

TARGETS = {
    "smollm2": {"keep_0.8": (1.10, 1.06), "keep_0.6": (1.32, 1.25)},
    "transformers": {"keep_0.8": (1.05, 1.04), "keep_0.6": (1.22, 1.20)},
}
HEAD = ["model", "decode, tokens/s", "x dense", "prefill, tokens/s", "x dense"]


def section(result: dict[str, Any]) -> str:
    """The text of the section; parts that were not measured yet are left out."""
    machine = result["machine"]
    parts = [
        "## Speed",
        f"Machine: {machine['cpu']}, {result['threads']} threads, torch "
        f"{result['versions']['torch']}, transformers {result['versions']['transformers']}. Again: "
        "`python benchmarks/speed.py --work runs/speed`. Models take turns in every round; rates "
        "are of the least time, ratios the median over rounds of the ratio within a round.",
    ]
    writers = {
        "smollm2": smollm2,
        "transformers": through_transformers,
        "batches": batches,
        "same_text": same_text,
        "speculation": speculation,
        "llama3_8b_block": llama_block,
    }
    parts += [write(result[name]) for name, write in writers.items() if name in result]
    return "\n\n".join(parts)


def smollm2(found: dict[str, Any]) -> str:
    """Decode and prefill in our runtime."""
    head = [*HEAD, "byte limit of decode", "share of bandwidth", "predicted loss, nats/token"]
    rows = []
    losses = found.get("predicted_loss", {})
    for name, row in found["rows"].items():
        cells = rate_cells("smollm2", name, row)
        cells += [f"{row['byte_limit']:.2f}", f"{row['share_of_bandwidth']:.0%}"]
        rows.append([*cells, f"{losses[name]:.3f}" if name in losses else ""])
    text = (
        f"SmolLM2-135M in float32, `qll generate`'s runtime, {found['prompt']} tokens before the "
        f"decoded ones, prefill of {found['prefill']}; targets in brackets. The byte limit is "
        "what the bytes read per token would allow. `_whole` is `--singles dense`: no matrix of "
        "low rank; `_head` has the embedding, which is the head too, converted as well. Calibrated "
        "on 4,096 tokens: these models are for speed, their quality is in the tables above."
    )
    return f"{text}\n\n{table(head, rows)}"


def through_transformers(found: dict[str, Any]) -> str:
    """The same through transformers' generate."""
    rows = [rate_cells("transformers", name, row) for name, row in found["rows"].items()]
    text = (
        "Through transformers' own `generate` (converted models after `qll.runtime.accelerate`); "
        "`dense_in_qll` is the dense model in our runtime, beside it in the same rounds."
    )
    return f"{text}\n\n{table(HEAD, rows)}"


def batches(found: dict[str, Any]) -> str:
    """Several texts at once."""
    names = [name for name in next(iter(found["rows"].values())) if name != "dense"]
    rows = [
        [batch, *(f"{row[name]['faster']:.2f}" for name in names)]
        for batch, row in found["rows"].items()
    ]
    return f"Decoding several texts at once, x dense:\n\n{table(['batch', *names], rows)}"


def same_text(found: dict[str, Any]) -> str:
    """Factored against rebuilt."""
    each = ", ".join(
        f"{row['equal']} of {row['prompts']} ({name})" for name, row in found["rows"].items()
    )
    return (
        f"Factors as stored and rebuilt matrices write the same {found['new_tokens']} greedy "
        f"tokens behind {each} prompts."
    )


def speculation(found: dict[str, Any]) -> str:
    """Converted models as drafts of the dense one."""
    head = ["draft", "texts", "proposals", "accepted", "draft step", "same text", "x alone"]
    rows = [
        [
            row["draft"],
            str(row["batch"]),
            str(row["length"]),
            f"{row['acceptance']:.0%}",
            f"{row['draft_cost']:.2f}",
            "yes" if row["same_text"] else "NO",
            f"{row['speed']:.2f}",
        ]
        for row in found["rows"]
    ]
    text = (
        "Speculative decoding, the dense model checked against itself alone; a draft step is in "
        "steps of the dense model. Below 1 it loses, which is why `--draft` is off by default."
    )
    return f"{text}\n\n{table(head, rows)}"


def llama_block(found: dict[str, Any]) -> str:
    """One block of the shape of Llama 3 8B."""
    head = [*HEAD, "GB/s read", "share of bandwidth"]
    rows = [
        [
            *rate_cells("block", name, row),
            f"{row['bytes_per_second'] / 1e9:.1f}",
            f"{row['share_of_bandwidth']:.0%}",
        ]
        for name, row in found["rows"].items()
    ]
    text = (
        f"One block of the shape of Llama 3 8B, {found['dtype']} weights, random numbers, kernel "
        f"`{found['kernel']}`; the machine reads {found['limits']['bandwidth'] / 1e9:.1f} GB/s. "
        "Targets: 1.5 x dense and 60 % of the bandwidth."
    )
    return f"{text}\n\n{table(head, rows)}"


def rate_cells(part: str, name: str, row: dict[str, Any]) -> list[str]:
    """Name, rates and ratios of a row, with the targets where there are any."""
    cells = [name]
    targets = TARGETS.get(part, {}).get(name.removesuffix("_whole"))
    for place, phase in enumerate(("decode", "prefill")):
        wanted = f" ({targets[place]:.2f})" if targets else ""
        cells += [f"{row[phase]['tokens_per_second']:.1f}", f"{row[phase]['faster']:.2f}{wanted}"]
    return cells


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
