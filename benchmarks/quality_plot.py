"""docs/quality.svg: perplexity over dense against parameters kept, and against bits a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.quality_cells import KEEPS, all_cells
from benchmarks.quality_page import LABELS, mean_of, seeds_of, unique

# above this the model is broken, and how broken does not matter
TOP = 100.0
OURS_COLOUR = "#c1121f"
COLOURS = ("#1d3557", "#457b9d", "#2a9d8f", "#8a5a44", "#6a4c93", "#e09f3e", "#7f7f7f")
MARKERS = "osv^D<>P"


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the figure: one column a text, equal parameters above, equal bytes below."""
    # the same figure from the same numbers: no date, no random identifiers
    with pyplot.rc_context({"svg.hashsalt": "quality", "font.size": 9}):
        texts = list(result["eval"])
        figure, axes = pyplot.subplots(
            2, len(texts), figsize=(4.4 * len(texts), 9), sharey="row", squeeze=False
        )
        for column, text in enumerate(texts):
            lines = {**keep_lines(result["rows"], text)}
            panel(axes[0][column], lines, f"{text}", "parameters kept")
            panel(axes[1][column], bit_lines(result["rows"], text), "", "bits per block weight")
        for row in axes:
            row[0].set_ylabel("perplexity / dense")
            handles = {}
            for axis in row:
                handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
            row[-1].legend(
                handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1.02, 1)
            )
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(figure)


def keep_lines(rows: dict[str, Any], text: str) -> dict[str, list[tuple[float, float]]]:
    """(keep, ratio) of every method of the first tables."""
    methods = unique(cell.method for cell in all_cells() if cell.table == "keep")
    return {method: points(rows, method, KEEPS, text, "keep") for method in methods}


def bit_lines(rows: dict[str, Any], text: str) -> dict[str, list[tuple[float, float]]]:
    """(bits, ratio) of every quantised method; one family is one line."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for method, keep in unique(
        (cell.method, cell.keep) for cell in all_cells() if cell.table == "bits"
    ):
        lines.setdefault(family(method, keep), []).extend(
            points(rows, method, (keep,), text, "bits_per_weight")
        )
    return {name: sorted(line) for name, line in lines.items()}


def family(method: str, keep: float = 1.0) -> str:
    """The line a quantised method is a point of.

    >>> family("rtn_int4"), family("gguf_q4_0"), family("fp16")
    ('round to nearest', 'GGUF', 'float16')
    >>> family("ours_best_int4"), family("ours_best_3.5_bits")
    ('ours: one width, best', 'ours: a width each, best')
    """
    if method.startswith("ours"):
        effort = method.split("_")[1]
        width = "a width each" if method.endswith("bits") else "one width"
        return f"ours: {width if keep == 1.0 else 'fewer numbers'}, {effort}"
    names = {"rtn": "round to nearest", "gguf": "GGUF", "gptq": "GPTQ", "fp16": "float16"}
    return names.get(method.split("_")[0], method)


def points(
    rows: dict[str, Any], method: str, keeps: tuple[float, ...], text: str, key: str
) -> list[tuple[float, float]]:
    """(size, mean ratio over seeds) where the model is not broken."""
    found = []
    for keep in keeps:
        ratios = [row["texts"][text]["ratio"] for row in seeds_of(rows, method, keep)]
        if ratios and sum(ratios) / len(ratios) <= TOP:
            found.append((mean_of(rows, method, keep, key), sum(ratios) / len(ratios)))
    return sorted(found)


def panel(axis: Axes, lines: dict[str, list[tuple[float, float]]], title: str, size: str) -> None:
    """The lines of one panel; ours red and thick."""
    axis.set_yscale("log")
    axis.set_title(title)
    axis.set_xlabel(size)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.grid(True, which="both", alpha=0.2)
    for place, (name, line) in enumerate(lines.items()):
        if not line:
            continue
        ours = name.startswith("ours")
        axis.plot(
            *zip(*line, strict=True),
            label=LABELS.get(name, name).replace("*", "").replace("`", ""),
            color=OURS_COLOUR if ours else COLOURS[place % len(COLOURS)],
            linewidth=2.2 if ours else 1.0,
            marker=MARKERS[place % len(MARKERS)],
            markersize=4,
        )
