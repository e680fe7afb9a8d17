"""The section of docs/results.md on benchmarks/bytelm.py, from whatever cells are there."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.bytelm_cells import (
    BEST,
    FLAGS,
    GENERATION,
    GENERATION_LENGTHS,
    LAW_MINUTES,
    PARTS,
    PLAIN,
    SCALING,
    SCALING_MINUTES,
    SEEDS,
    Cell,
    all_cells,
    scaling_cell,
)
from benchmarks.bytelm_summary import MARGIN

NOT_RUN = "not run"
LABELS = {PLAIN: "plain twin", BEST: "best combination"}
# what the issue asks of the long runs, in bits per byte
MUST = {PLAIN: 1.50, BEST: 1.45}
LONG_MEASURES = {
    "bits_per_byte": "bits per byte",
    "transfer_bits_per_byte": "on WikiText-2",
    "parameters": "parameters",
    "bytes": "bytes of training",
    "seconds": "seconds of training",
}


def section(result: dict[str, Any]) -> str:
    """All tables of the byte model."""
    rows = result["rows"]
    parts = [
        "## The byte model",
        introduction(result),
        "### The long runs, beside compressors",
        long_table(rows),
        long_words(rows),
        "### Each part on and off",
        ablation_words(result),
        ablation_table(result),
        "### Speed of training",
        speed_words(rows),
        "### Writing: recurrent state against a cache of keys and values",
        GENERATION_WORDS,
        generation_table(rows),
        "### Where a larger model would land",
        scaling_table(rows),
        scaling_words(result.get("scaling")),
    ]
    return "\n\n".join(part for part in parts if part)


def summary(result: dict[str, Any]) -> str:
    """What the README shows: the long runs beside the compressors."""
    rows = result["rows"]
    plain, best = (rows[Cell("train", "long", label).name] for label in (PLAIN, BEST))
    compressed = rows["baselines/compressors/seed0"]["bits_per_byte"]
    others = ", ".join(f"{name} {bits:.2f}" for name, bits in compressed.items())
    parts = [result["ablation"].get(part, {"bits_per_byte": {}}) for part in PARTS]
    whole = sum(len(part["bits_per_byte"]) == len(SEEDS) for part in parts)
    return (
        f"The byte-level model after {result['budget']['long_minutes']:g} minutes' worth of bytes "
        f"({plain['parameters'] / 1e6:.1f} M parameters, seed 0), bits per byte of held-out "
        f"documents: {plain['bits_per_byte']:.3f} for the plain transformer, "
        f"{best['bits_per_byte']:.3f} with complex interference memories in every second block "
        f"and short convolutions; {others}. On WikiText-2, which neither had seen, "
        f"{plain['transfer_bits_per_byte']:.2f} and {best['transfer_bits_per_byte']:.2f}. Alone, "
        f"{whole} of {len(PARTS)} parts have been measured over {len(SEEDS)} seeds."
    )


def introduction(result: dict[str, Any]) -> str:
    """What was measured, on what."""
    machine, texts, budget = result["machine"], result["texts"], result["budget"]
    done = sum(cell.name in result["rows"] for cell in all_cells())
    held, trained = texts["held_out"], texts["training"]
    return (
        f"{done} of {len(all_cells())} cells have been run. Machine: {machine['cpu']}, "
        f"{machine['cores']} cores. Corpus: the markdown files of Debian's package `anarchism`; "
        f"{trained['documents']} documents ({trained['bytes']:,} bytes, sha256 "
        f"`{trained['sha256'][:12]}`) to train on, {held['documents']} ({held['bytes']:,} bytes, "
        f"`{held['sha256'][:12]}`) held out: the first and every tenth after it in name order. "
        f"Budgets are bytes, at {budget['bytes_per_second']:,.0f} bytes a second: "
        f"{budget['minutes']:g} minutes are {budget['bytes']:,} bytes, "
        f"{budget['long_minutes']:g} minutes {budget['long_bytes']:,}. Scored are the last "
        "weights, never the best ones by validation, with document boundaries and a window of 256 "
        "bytes that moves by 128. Everything is classical mathematics; every part has as many "
        "parameters as the plain transformer beside it (feed-forward layers are narrowed). Again: "
        "`python benchmarks/bytelm.py --only CELL --again`."
    )


def long_table(rows: dict[str, Any]) -> str:
    """The long runs and the compressors, in bits per byte of all held-out documents."""
    lines = []
    for label in (PLAIN, BEST):
        row = rows.get(Cell("train", "long", label).name, {})
        found = row | {"seconds": round(row["seconds"])} if "seconds" in row else row
        numbers = [_number(found.get(measure)) for measure in LONG_MEASURES]
        lines.append([f"{LABELS[label]} (wanted: at most {MUST[label]:.2f})", *numbers])
    compressed = rows.get("baselines/compressors/seed0", {}).get("bits_per_byte", {})
    for name, bits in compressed.items():
        lines.append([name, f"{bits:.4f}", *[""] * (len(LONG_MEASURES) - 1)])
    return _table(["model", *LONG_MEASURES.values()], lines)


def long_words(rows: dict[str, Any]) -> str:
    """Recall, repetition, phases and ranks of the long runs, one sentence each."""
    sentences = []
    for label in (PLAIN, BEST):
        row = rows.get(Cell("train", "long", label).name)
        if row is None:
            continue
        needle = ", ".join(f"{share:.2f} at {far}" for far, share in row["needle_recall"].items())
        facts = ", ".join(f"{share:.2f} of {n}" for n, share in row["multi_fact_recall"].items())
        phase, rank = row["phases"][-1], row["state_ranks"]
        used = statistics.mean(item["effective_rank"] / item["full_rank"] for item in rank)
        written = row["generation"]
        sentences.append(
            f"The {LABELS[label]} finds a fact (chance 0.125) with a share of {needle} bytes' "
            f"distance, and among several facts {facts}. Its states use {used:.0%} of their rank. "
            f"Phases of its last block have R = {phase['coherence']:.3f} (random "
            f"{phase['random']:.3f}), and what its blocks write interferes with visibility "
            f"{row['visibility']:+.2f}. Of what it writes, {written['rep8']:.1%} of the 8-grams "
            f"of bytes repeat and {written['distinct2']:.1%} of word pairs are distinct."
        )
    return "\n\n".join(sentences)


def ablation_words(result: dict[str, Any]) -> str:
    """How a part is judged."""
    return (
        f"Short runs on seeds {', '.join(map(str, SEEDS))}, paired by seed, each part against the "
        f"plain twin at the same bytes. A part is credited when it wins by more than {MARGIN:g} "
        "bits per byte beyond the noise of the seeds (the one-sided 95 % interval of the mean "
        "difference by Student's t), harmful when it loses by as much, neutral otherwise. The "
        "real twin of a part has the same wiring with real numbers, or scaling in place of "
        "rotation, or free in place of orthogonal gates; a part that beats the plain twin and not "
        "its own twin owes nothing to what is quantum-inspired in it. Losses other than "
        "cross-entropy come with the default curriculum, after 70 % of the run."
    )


def ablation_table(result: dict[str, Any]) -> str:
    """One line per part: bits, gain over the plain twin, gain over its own twin."""
    plain = [
        result["rows"][name]["bits_per_byte"]
        for seed in SEEDS
        if (name := Cell("train", "ablation", PLAIN, seed).name) in result["rows"]
    ]
    shown = f"{statistics.mean(plain):.4f}" if plain else NOT_RUN
    lines = [[LABELS[PLAIN], f"{shown}, {len(plain)} of {len(SEEDS)} seeds", "", "", ""]]
    for part in ("nanoGPT-style loop", "AdamW", *PARTS, *FLAGS, BEST):
        entry = result["ablation"].get(part)
        name = LABELS.get(part, part)
        if entry is None:
            lines.append([name, NOT_RUN, "", "", ""])
            continue
        bits = list(entry["bits_per_byte"].values())
        seeds = "" if len(bits) == len(SEEDS) else f", {len(bits)} of {len(SEEDS)} seeds"
        twin = entry.get("against_twin")
        lines.append(
            [
                name,
                f"{statistics.mean(bits):.4f}{seeds}",
                _gain(entry),
                entry["verdict"],
                f"{_gain(twin)}, {twin['verdict']}" if twin else "",
            ]
        )
    head = ["part", "bits per byte", "gain over the plain twin", "verdict", "over its real twin"]
    return _table(head, lines)


def speed_words(rows: dict[str, Any]) -> str:
    """Throughput of training against the loop."""
    row = rows.get("speed/throughput/seed0")
    if row is None:
        return f"{NOT_RUN.capitalize()}."
    rounds = row["rounds"]
    ours = statistics.median(entry["ours"] for entry in rounds)
    loop = statistics.median(entry["loop"] for entry in rounds)
    load = max(entry["load_average"] for entry in rounds)
    return (
        f"{ours:,.0f} bytes a second against {loop:,.0f} of a straightforward nanoGPT-style loop "
        f"(`benchmarks/peers/byte_loop.py`) of the same size and batch: {row['ratio']:.2f} times "
        f"(wanted: at least 1.3), the median of {len(rounds)} rounds by turns; the load average "
        f"was at most {load:.1f}."
    )


GENERATION_WORDS = """Bytes of state, and processor milliseconds per byte on one thread, after so
many bytes were read. A matrix state has one size whatever was read; a cache grows with it, and a
windowed one up to its window."""


def generation_table(rows: dict[str, Any]) -> str:
    """State and time per byte at each length."""
    lines = []
    for label in GENERATION:
        row = rows.get(Cell("generation", "generation", label).name)
        cells = [NOT_RUN] * len(GENERATION_LENGTHS)
        if row is not None:
            found = [row["lengths"][str(length)] for length in GENERATION_LENGTHS]
            cells = [
                f"{entry['state_bytes'] / 1e6:.2f} MB, {entry['milliseconds_per_byte']:.2f} ms"
                for entry in found
            ]
        lines.append([label, *cells])
    return _table(["form", *(f"{length:,} bytes" for length in GENERATION_LENGTHS)], lines)


def scaling_table(rows: dict[str, Any]) -> str:
    """Bits per byte of plain transformers by size and by bytes of training."""
    lines = []
    for width, blocks, _ in SCALING:
        cells = [scaling_cell(width, blocks, minutes) for minutes in SCALING_MINUTES]
        found = [rows.get(cell.name, {}) for cell in cells]
        size = next((f"{row['parameters']:,}" for row in found if row), NOT_RUN)
        bits = [_number(row.get("bits_per_byte")) for row in found]
        lines.append([f"{width} channels, {blocks} blocks", size, *bits])
    head = ["plain transformer", "parameters", *(f"{n} minutes" for n in SCALING_MINUTES)]
    return _table(head, lines)


def scaling_words(scaling: dict[str, Any] | None) -> str:
    """The fitted law and what it says of the founding documents' preset."""
    if scaling is None:
        return f"{NOT_RUN.capitalize()}."
    law, preset = scaling["law"], scaling["preset"]
    low, high = preset["predicted_range"]
    return (
        f"A law fitted to {scaling['runs']} small runs of {LAW_MINUTES:g} minutes or more, bits "
        f"per byte = {law['floor']:.2f} + {law['a']:.3f} (N / 10^6)^-{law['alpha']:.2f} + "
        f"{law['b']:.3f} (D / 10^6)^-{law['beta']:.2f} (N parameters, D bytes; root mean square "
        "error of the logarithm "
        f"{law['rms_log_error']:.3f}). The founding documents' preset, `{preset['command']}`, has "
        f"{preset['parameters'] / 1e6:.1f} million parameters and reads {preset['bytes'] / 1e6:.0f}"
        f" MB in 20 passes, worth {preset['effective_bytes'] / 1e6:.0f} MB of fresh text "
        "(Muennighoff et al. 2023). **It has not been run.** On text like this corpus the law "
        f"predicts {preset['predicted_bits_per_byte']:.2f} bits per byte ({low:.2f} to {high:.2f} "
        "with one run left out); WikiText-2 is another text, and the documents report 1.776 "
        f"there. Estimated memory: {preset['memory_bytes'] / 1e9:.1f} GB; estimated time on a GPU "
        f"of 165 TFLOP/s of which 35 % are reached: {preset['gpu_seconds'] / 60:.0f} minutes."
        + check_words(scaling.get("check"))
    )


def check_words(check: dict[str, Any] | None) -> str:
    """What the law says of a longer run that it was not fitted to."""
    if check is None:
        return ""
    return (
        f"\n\nHow far to trust it: for the plain twin's long run ({check['parameters'] / 1e6:.1f} "
        f"million parameters, {check['bytes'] / 1e6:.1f} MB), which it was not fitted to, the law "
        f"says {check['predicted']:.3f} bits per byte; measured were {check['bits_per_byte']:.3f}. "
        f"Fitted to runs shorter than {LAW_MINUTES:g} minutes too "
        f"({check['runs_with_shorter_ones']} in all), which are still on the way down from the "
        f"start, it would say {check['predicted_with_shorter_ones']:.3f}."
    )


def _gain(entry: dict[str, Any]) -> str:
    if entry["gain"] is None:
        return ""
    noise = "" if entry["noise"] is None else f" ± {entry['noise']:.4f}"
    return f"{entry['gain']:+.4f}{noise}"


def _number(value: float | int | None) -> str:
    if value is None:
        return NOT_RUN
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _table(head: list[str], lines: Iterable[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
