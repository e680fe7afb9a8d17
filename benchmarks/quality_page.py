"""The section of docs/results.md on benchmarks/quality.py, from whatever cells are there."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any

from benchmarks.quality_cells import (
    ABLATION_BASE,
    ABLATION_KEEP,
    ABLATION_OURS,
    ABLATIONS,
    KEEPS,
    OURS,
    SEEDS,
    Cell,
    all_cells,
)

LABELS = {
    "ours_best": "**QLL, `--effort best`**",
    "ours_balanced": "**QLL, `--effort balanced`**",
    "ours_fast": "**QLL, `--effort fast`**",
    "ours_fast_panels": "**QLL, `--effort fast --singles panels`**",
    "ours_sparse": "QLL, `--format sparse` (pruned entries and a bit mask, no tensor network)",
    "svd": "truncated SVD",
    "asvd": "ASVD (alpha 0.5, searched ranks)",
    "svd_llm": "SVD-LLM (v1, whitening)",
    "swift_svd": "Swift-SVD (dynamic ranks)",
    "whitened_interpolative": "SVD-LLM in PIFA storage",
    "whitened_interpolative_shrunk": "SVD-LLM in PIFA storage, `--metric activation` of ours",
    "mpifa": "MPIFA (PIFA and its refit)",
    "kfac_lems": "K-FAC SVD with LEMS allocation",
    "modegpt": "MoDeGPT",
    "sparsegpt": "SparseGPT (pruned entries and a bit mask)",
    "mpo_plain": "MPO of 3 cores, no metric",
    "tensorly_tt": "tensorly tensor train, 3 cores",
    "tensorly_tucker": "tensorly Tucker, 4 modes",
    "tltorch_blocktt": "tensorly-torch BlockTT, 3 cores",
    "tltorch_tucker": "tensorly-torch Tucker, 6 modes",
    "fp16": "float16",
    "rtn_int8": "round to nearest, int8, group 32",
    "rtn_int4": "round to nearest, int4, group 32",
    "rtn_int3": "round to nearest, int3, group 32",
    "rtn_int2": "round to nearest, int2, group 32",
    "gptq_int4": "GPTQ (act-order, static groups), int4, group 32",
    "gptq_int3": "GPTQ (act-order, static groups), int3, group 32",
    "gptq_int2": "GPTQ (act-order, static groups), int2, group 32",
    "gguf_bf16": "GGUF BF16",
    "gguf_q8_0": "GGUF Q8_0",
    "gguf_q5_1": "GGUF Q5_1",
    "gguf_q5_0": "GGUF Q5_0",
    "gguf_q4_1": "GGUF Q4_1",
    "gguf_q4_0": "GGUF Q4_0",
    "gguf_mxfp4": "GGUF MXFP4",
    "ours_fast_int8": "**QLL, int8, `--effort fast`**",
    "ours_best_int4": "**QLL, int4, `--effort best`**",
    "ours_fast_int4": "**QLL, int4, `--effort fast`**",
    "ours_best_int3": "**QLL, int3, `--effort best`**",
    "ours_fast_int3": "**QLL, int3, `--effort fast`**",
    "ours_best_int2": "**QLL, int2, `--effort best`**",
    "ours_fast_4.5_bits": "**QLL, `--bits_per_weight 4.5`, `--effort fast`**",
    "ours_fast_3.5_bits": "**QLL, `--bits_per_weight 3.5`, `--effort fast`**",
    "ours_best_4.5_bits": "**QLL, `--bits_per_weight 4.5`, `--effort best`**",
    "ours_best_3.5_bits": "**QLL, `--bits_per_weight 3.5`, `--effort best`**",
    "ours_best_3_bits": "**QLL, `--bits_per_weight 3`, `--effort best`**",
}
NOT_RUN = "not run"
STAR = r"\*"  # at a cell with a note
# rows of the README
SUMMARY = (
    "ours_best",
    "ours_balanced",
    "ours_fast",
    "ours_fast_panels",
    "ours_sparse",
    "kfac_lems",
    "modegpt",
    "mpifa",
    "whitened_interpolative",
    "svd_llm",
    "svd",
    "sparsegpt",
)
PLOT = "quality.svg"
# issue's targets for QLL: perplexity over dense on WikiText-2
MUST = {0.8: 1.18, 0.6: 1.80}


def section(result: dict[str, Any]) -> str:
    """All tables of the quality benchmark."""
    rows, texts = result["rows"], list(result["eval"])
    done = sum(cell.name in rows for cell in all_cells())
    parts = [
        "## Quality at equal parameters and at equal bytes",
        introduction(result, done),
        f"![Perplexity over dense against size]({PLOT})",
        *notes(rows),
    ]
    for text in texts:
        parts += [f"### Equal parameters: {text}", keep_table(rows, text)]
    parts += ["### Minutes", minutes_table(rows)]
    parts += ["### Equal bytes", BYTES, bits_table(rows, texts)]
    parts += ["### What each part contributes", ablation_words(), ablation_table(rows, texts)]
    parts += ["### A format against the whitened SVD with interpolative storage"]
    parts += [headline_table(result.get("headline_candidates", []), rows)]
    return "\n\n".join(parts)


def summary(result: dict[str, Any]) -> str:
    """What the README shows: QLL and the peers at two sizes on every text."""
    rows, texts = result["rows"], list(result["eval"])
    columns = [(keep, text) for keep in MUST for text in texts]
    lines = []
    for method in SUMMARY:
        cells = [averaged(rows, method, keep, text).split(",")[0] for keep, text in columns]
        if set(cells) != {NOT_RUN}:
            lines.append([LABELS[method], *cells])
    head = ["method", *(f"keep {keep:g}, {text}" for keep, text in columns)]
    return (
        "Perplexity over the dense model's at equal stored parameters of the block linears, "
        f"after save and reload, {result['eval_tokens']:,} tokens of each text; calibrated on "
        "other halves of the first two, the third is unrelated. One or more seeds; ranges, "
        f"commands, more methods and notes of rows with a {STAR} are on the page below.\n\n"
        + table(head, lines)
        + headline_summary(result)
    )


def headline_summary(result: dict[str, Any]) -> str:
    """One sentence per text on the format that won, or nothing while there is none."""
    found = result.get("headline")
    if found is None or not found["won"]:
        return ""
    texts = [
        f"{text} {span(values['ours'])} instead of {span(values['whitened_interpolative'])}"
        for text, values in found["texts"].items()
    ]
    seeds = len(next(iter(found["texts"].values()))["ours"])
    return (
        f"\n\n`--format {found['format']} --effort fast` against activation-whitened SVD with "
        f"interpolative storage at equal parameters, keep {found['keep']:g}, perplexity over "
        f"{seeds} seeds: {', '.join(texts)}.{other_winners(result)}"
    )


def other_winners(result: dict[str, Any]) -> str:
    """The other formats that win on every text, with their perplexities on the first."""
    winners = []
    for found in result.get("headline_candidates", []):
        if found["won"] and found["format"] != result["headline"]["format"]:
            text, values = next(iter(found["texts"].items()))
            winners.append(f"`{found['format']}` ({text} {span(values['ours'])})")
    if not winners:
        return ""
    return (
        f" On every text that SVD loses to these too: {', '.join(winners)}."
        f"{control_words(result['headline_candidates'])}"
    )


def control_words(candidates: list[dict[str, Any]]) -> str:
    """Which formats are better than low rank in the same metric and budget, or nothing where that
    has not been run."""
    measured = [found for found in candidates if low_rank_of(found)]
    if not measured:
        return ""
    shown = ", ".join(
        f"{text} {span(values['low_rank'])}" for text, values in measured[0]["texts"].items()
    )
    seeds = len(low_rank_of(measured[0]))
    better = [f"`{found['format']}`" for found in measured if beats_low_rank(found)]
    return (
        f" One low-rank network per matrix in the same metric and budget (`--format lowrank`, "
        f"{seeds} of {len(SEEDS)} seeds) has {shown}: on the same seeds lower on every text "
        f"{'is' if len(better) == 1 else 'are'} {', '.join(better) or 'none'}."
    )


def low_rank_of(candidate: dict[str, Any]) -> list[float]:
    """Perplexities of the control on the first text."""
    return next(iter(candidate["texts"].values())).get("low_rank", [])


def beats_low_rank(candidate: dict[str, Any]) -> bool:
    """Whether the mean is lower than the control's on every text, on the seeds of the control."""
    return all(
        sum(text["ours"][: len(text["low_rank"])]) < sum(text["low_rank"])
        for text in candidate["texts"].values()
    )


def span(values: list[float]) -> str:
    """Lowest to highest, or the one there is.

    >>> span([2.0, 1.0]), span([1.0])
    ('1.00 to 2.00', '1.00')
    """
    low, high = perplexity(min(values)), perplexity(max(values))
    return low if low == high else f"{low} to {high}"


def introduction(result: dict[str, Any], done: int) -> str:
    """What was measured, on what, and how to measure a cell again."""
    machine, tokens = result["machine"], result["eval_tokens"]
    calib = " and ".join(f"`{name}`" for name in result["calib"])
    must = ", ".join(f"{ratio:.2f} at keep {keep}" for keep, ratio in MUST.items())
    return (
        f"{result['model']['name']} in float32 on {machine['cores']} cores of several machines "
        "(`cpu` in the newer rows). "
        f"Perplexity over the dense model's, first {tokens:,} tokens of each text, context "
        f"{result['context']:,}. Every method has the same {result['calib_tokens_per_text']:,} "
        f"tokens each of {calib}, the same budget of the block linears' parameters, and counts "
        f"every number it stores, indices included. A cell is the mean over seeds (choices of "
        f"calibration windows), lowest and highest in brackets; methods without calibration have "
        f"one. QLL's training, where a row has it, draws more windows of the same texts. "
        f"{done} of {len(all_cells())} cells are there. Targets of QLL on WikiText-2: at most "
        f"{must}. Any cell again: its `command` in `benchmarks/results/quality.json`, such as "
        "`python benchmarks/quality.py --only svd_llm/keep0.8/seed0 --again`. The peers are "
        "rebuilt from their formulas in `benchmarks/peers`; the searches of ASVD, LEMS and "
        "Swift-SVD measure on fewer tokens than published, as their files say. With uniform ranks "
        "Swift-SVD is SVD-LLM."
    )


BYTES = """Bits per weight of the block linears, from the packed bytes with their scales. The dense
model is read from a GGUF file whose block linears are Q4_1 (5 bits): Q4_1 gives these weights back
exactly, so its row says nothing, and no row above 5 bits is a saving on that file. The gguf package
reads k- and i-quants but cannot write them, and 576 is no multiple of their 256."""


def notes(rows: dict[str, Any]) -> list[str]:
    """One paragraph on the rows that have a note."""
    lines = [f"- `{name}`: {row['note']}" for name, row in rows.items() if "note" in row]
    return [f"Notes of rows with a {STAR}:\n\n" + "\n".join(lines)] if lines else []


def keep_table(rows: dict[str, Any], text: str) -> str:
    """Methods against keep on one text, in the order of the cells."""
    methods = unique(cell.method for cell in all_cells() if cell.table == "keep")
    head = ["method", *(f"keep {keep:g}" for keep in sorted(KEEPS, reverse=True))]
    lines = [
        [LABELS.get(method, method), *(averaged(rows, method, keep, text) for keep in KEEPS)]
        for method in methods
    ]
    return table(head, lines)


def minutes_table(rows: dict[str, Any]) -> str:
    """How long every product row of the table at equal parameters took, stage by stage."""
    names = [cell.name for cell in all_cells() if cell.table == "keep" and cell.flags is not None]
    timed = {name: rows[name] for name in names if "cpu" in rows.get(name, {})}
    stages = unique(stage for row in timed.values() for stage in row["product_stages"])
    stages = [stage for stage in stages if stage != "calibrate"]
    lines = [
        [
            f"`{name}`",
            row["cpu"],
            f"{row['threads']}",
            *(f"{row['product_stages'].get(stage, 0) / 60:.1f}" for stage in stages),
            f"{row['product_seconds'] / 60:.1f}",
            f"{row['wall_seconds'] / 60:.1f}",
        ]
        for name, row in timed.items()
    ]
    words = (
        "Of main.py by its own stages, from the moments to the saved folder. The whole cell also "
        "scores three texts, and calibrates where it is the first of its seed. Rows measured "
        "before their processor was noted are left out."
    )
    head = ["cell", "processor", "threads", *stages, "main.py", "whole cell"]
    return f"{words}\n\n{table(head, lines)}"


def bits_table(rows: dict[str, Any], texts: list[str]) -> str:
    """Methods by bits per block weight, most first; those not run last."""
    cells = unique((cell.method, cell.keep) for cell in all_cells() if cell.table == "bits")
    sized = [
        (mean_of(rows, method, keep, "bits_per_weight"), method, keep) for method, keep in cells
    ]
    sized.sort(key=lambda item: -(item[0] or 0))
    lines = []
    for bits, method, keep in sized:
        label = LABELS.get(method, method) + ("" if keep == 1 else f", keep {keep:g}")
        shown = NOT_RUN if bits is None else f"{bits:.2f}"
        lines.append([label, shown, *(averaged(rows, method, keep, text) for text in texts)])
    return table(["method", "bits per block weight", *texts], lines)


def ablation_words() -> str:
    """What the rows of the ablation table are."""
    return (
        f"`main.py --keep {ABLATION_KEEP:g} {' '.join(ABLATION_BASE)}` "
        "(closed forms, no training), "
        "each row with one thing changed: the effort, which adds training, or one flag."
    )


def ablation_table(rows: dict[str, Any], texts: list[str]) -> str:
    """One row for what is added or taken away."""
    changes = {method: OURS[method] for method in ABLATION_OURS} | ABLATIONS
    lines = [
        [
            f"`{shlex.join(changed_flags(flags))}`" if changed_flags(flags) else "nothing",
            *(averaged(rows, method, ABLATION_KEEP, text) for text in texts),
        ]
        for method, flags in changes.items()
    ]
    return table(["changed", *texts], lines)


def changed_flags(flags: tuple[str, ...]) -> list[str]:
    """The words of `flags` that the base of the ablation does not have.

    >>> changed_flags(("--effort", "fast", "--singles", "panels"))
    ['--singles', 'panels']
    """
    base = set(zip(ABLATION_BASE[::2], ABLATION_BASE[1::2], strict=True))
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [word for pair in pairs if pair not in base for word in pair]


def headline_table(candidates: list[dict[str, Any]], rows: dict[str, Any]) -> str:
    """Perplexity per seed of every candidate format beside the baseline's."""
    if not candidates:
        return f"{NOT_RUN.capitalize()}: three seeds of a format and of both baselines are needed."
    head = ["format", "keep", "kept", "text", "QLL", "whitened SVD, interpolative", "lower"]
    head.append("low rank, same metric and budget")
    lines = []
    for candidate in candidates:
        method = f"headline_{candidate['format']}"
        has_note = any("note" in row for row in seeds_of(rows, method, candidate["keep"]))
        for text, found in candidate["texts"].items():
            ours, theirs = found["ours"], found["whitened_interpolative"]
            lines.append(
                [
                    candidate["format"] + STAR * has_note,
                    f"{candidate['keep']:g}",
                    f"{candidate['params_ratio']:.4f}",
                    text,
                    " / ".join(map(perplexity, ours)),
                    " / ".join(map(perplexity, theirs)),
                    "yes" if sum(ours) < sum(theirs) else "no",
                    " / ".join(map(perplexity, found.get("low_rank", []))) or NOT_RUN,
                ]
            )
    words = (
        "Perplexity on each seed. The baseline is, per seed and text, the better of the published "
        "whitening and of the one with our shrinkage; `headline` in the result file is the last "
        "format that is lower on every text, or else the nearest. The last column is the control: "
        f"`--format lowrank` with everything else the same.{control_words(candidates)}"
    )
    return f"{words}\n\n{table(head, lines)}"


def seeds_of(rows: dict[str, Any], method: str, keep: float) -> list[dict[str, Any]]:
    """The rows of a method at a size."""
    names = (Cell(method, keep, seed, "").name for seed in SEEDS)
    return [rows[name] for name in names if name in rows]


def mean_of(rows: dict[str, Any], method: str, keep: float, key: str) -> float | None:
    """Mean over the seeds that are there."""
    values = [row[key] for row in seeds_of(rows, method, keep)]
    return sum(values) / len(values) if values else None


def averaged(rows: dict[str, Any], method: str, keep: float, text: str) -> str:
    """`1.21 (1.19 to 1.23)`, or with the number of seeds when some are missing."""
    ratios = [row["texts"][text]["ratio"] for row in seeds_of(rows, method, keep)]
    wanted = sum((cell.method, cell.keep) == (method, keep) for cell in all_cells())
    if not ratios:
        return NOT_RUN
    shown = ratio(sum(ratios) / len(ratios))
    if len(ratios) > 1:
        shown += f" ({ratio(min(ratios))} to {ratio(max(ratios))})"
    shown += STAR * any("note" in row for row in seeds_of(rows, method, keep))
    return shown if len(ratios) == wanted else f"{shown}, {len(ratios)} of {wanted} seeds"


def ratio(value: float) -> str:
    """Three decimals, or a power of ten where the model is broken.

    >>> ratio(1.2345), ratio(2.3e6)
    ('1.234', '2.3e+06')
    """
    return f"{value:.3f}" if value < 1000 else f"{value:.1e}"


def perplexity(value: float) -> str:
    """Two decimals, or a power of ten."""
    return f"{value:.2f}" if value < 1e5 else f"{value:.1e}"


def unique(items: Iterable[Any]) -> list[Any]:
    """Each item once, in the order of its first appearance."""
    return list(dict.fromkeys(items))


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
