"""Curves of the report as small SVG panels, drawn by matplotlib and coloured by the page.

matplotlib draws with stand-in colours; `as_svg` replaces them by CSS variables, so one drawing
serves the light, the dark and the printed page, and drops what a page does not need (metadata,
ids, long decimals). A panel is about 10 kB. Text in a panel is ours alone: names that come from
files are written by the HTML template, which escapes them.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qll.report.units import Number

SVG = "{http://www.w3.org/2000/svg}"
WIDTH, HEIGHT = 262, 182  # CSS pixels; the page scales a panel by at most a third
ABOVE, BELOW = 24, 39  # CSS pixels over and under the axes, for their names
INK, SOFT, LINE = "#010101", "#020202", "#030303"
DENSE, CONVERTED, RANDOM = "#040404", "#050505", "#060606"
VARIABLES = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    DENSE: "var(--dense)",
    CONVERTED: "var(--converted)",
    RANDOM: "var(--random)",
}
FLOOR = 0.02  # smallest singular value drawn, in units of the root mean square
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qll",
    "text.parse_math": False,
    "font.size": 11,
    "axes.linewidth": 0.8,
    "path.simplify": False,
}


@dataclass(frozen=True)
class Curve:
    """One matrix type at one cut over depth: blocks and three values each (None = not measured)."""

    blocks: Sequence[int]
    dense: Sequence[Number | None]
    converted: Sequence[Number | None]
    random: Sequence[Number | None]


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one matrix over the root mean square of the dense ones, at `rank`."""

    block: int
    depth: Number
    rank: Sequence[int]
    dense: Sequence[Number]
    converted: Sequence[Number] | None


def entropy_panels(curves: Mapping[str, Curve]) -> dict[str, str]:
    """One SVG per key: entropy in nats over the block number.

    All panels of a call span the same number of nats and hang from their own random line, so a
    gap looks equally large wherever it is.

    >>> panel = entropy_panels({"q": Curve([0, 1], [5.0, 5.2], [4.9, None], [5.6, 5.6])})["q"]
    >>> "var(--dense)" in panel and "<metadata" not in panel
    True
    """
    tops = {key: max(_values(curve), default=1.0) for key, curve in curves.items()}
    depths = [tops[key] - min(_values(curve), default=0.0) for key, curve in curves.items()]
    span = max(depths, default=1.0) * 1.16 or 1.0
    return {key: _entropy_panel(curve, tops[key], span) for key, curve in curves.items()}


def spectrum_panels(
    groups: Mapping[str, Sequence[Spectrum]], random: Mapping[str, Sequence[Number]]
) -> dict[str, str]:
    """One SVG per key: the spectra of all its blocks, and that of a random matrix of its shape.

    `random[key]` holds values at the ranks of the key's first spectrum. Lines carry
    `data-line="dense-B"` and `data-line="converted-B"` for block B; the page shows the latter
    for the selected matrix only.

    >>> lines = [Spectrum(0, 0.0, [1, 2, 3], [2.0, 1.0, 0.5], [2.0, 1.0, 0.0])]
    >>> 'data-line="dense-0"' in spectrum_panels({"q": lines}, {"q": [1.5, 1.0, 0.6]})["q"]
    True
    """
    highest = [max(line.dense) for lines in groups.values() for line in lines if line.dense]
    top = 1.25 * max(highest, default=1.0)
    return {key: _spectrum_panel(lines, random.get(key, ()), top) for key, lines in groups.items()}


def _entropy_panel(curve: Curve, top: Number, span: Number) -> str:
    with rc_context(STYLE):
        figure, axes = new_axes(left=0.14)
        blocks = list(curve.blocks)
        for values, colour, style, line_width in (
            (curve.random, RANDOM, (0, (4, 3)), 1.3),
            (curve.dense, DENSE, "-", 1.8),
            (curve.converted, CONVERTED, "-", 1.8),
        ):
            heights = [math.nan if value is None else value for value in values]
            places = blocks
            if len(blocks) == 1:  # one block is drawn as a short bar: a line needs two points
                places, heights = [blocks[0] - 0.2, blocks[0] + 0.2], heights * 2
            axes.plot(places, heights, color=colour, ls=style, lw=line_width)
        axes.set_ylim(top + 0.07 * span - 1.07 * span, top + 0.07 * span)
        axes.set_xlim(min(blocks) - 0.5, max(blocks) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        label(axes, "nats", "block")
        return as_svg(figure, axes)


def _spectrum_panel(lines: Sequence[Spectrum], random: Sequence[Number], top: Number) -> str:
    with rc_context(STYLE):
        figure, axes = new_axes(left=0.14)
        axes.set_yscale("log")
        for line in lines:
            shade = f"#0700{round(100 * line.depth):02x}"
            axes.plot(
                line.rank, _floored(line.dense), color=shade, lw=0.9, gid=f"dense-{line.block}"
            )
        for line in lines:
            if line.converted is not None:
                heights = _floored(line.converted)
                gid = f"converted-{line.block}"
                axes.plot(line.rank, heights, color=CONVERTED, lw=2.0, gid=gid)
        if lines and random:
            ranks = list(lines[0].rank)
            axes.plot(ranks, _floored(random), color=RANDOM, ls=(0, (4, 3)), lw=1.4)
        axes.set_ylim(FLOOR, top)
        last = max((line.rank[-1] for line in lines), default=1)
        axes.set_xlim(1 - 0.01 * last, last)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_yticks([tick for tick in (0.1, 1, 10, 100) if tick < top])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        label(axes, "\u03c3 / rms", "rank")
        return as_svg(figure, axes)


def new_axes(left: float, size: tuple[int, int] = (WIDTH, HEIGHT)) -> tuple[Figure, Axes]:
    """A figure of `size` CSS pixels with one pair of axes in the style of the report."""
    figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72)
    figure.patch.set_visible(False)
    bottom, top = BELOW / size[1], 1 - ABOVE / size[1]
    axes = figure.add_axes((left, bottom, 0.985 - left, top - bottom))
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(length=0, labelcolor=SOFT, pad=5)
    axes.grid(axis="y", color=LINE, lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def label(axes: Axes, vertical: str, horizontal: str) -> None:
    """Names of the two axes: above the vertical one, behind the horizontal one."""
    height = 72 * axes.figure.get_size_inches()[1] * axes.get_position().height
    above, below = 1 + 0.5 * ABOVE / height, -0.77 * BELOW / height
    axes.text(-0.165, above, vertical, transform=axes.transAxes, color=SOFT, va="center")
    axes.text(1, below, horizontal, transform=axes.transAxes, color=SOFT, ha="right", va="center")


def _values(curve: Curve) -> list[Number]:
    every = (*curve.dense, *curve.converted, *curve.random)
    return [value for value in every if value is not None]


def _floored(values: Sequence[Number]) -> list[Number]:
    return [value if value >= FLOOR else math.nan for value in values]


def as_svg(figure: Figure, axes: Axes) -> str:
    """The figure as an <svg> element for HTML, with the axes' place in data attributes."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    ElementTree.register_namespace("", SVG[1:-1])
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in {f"{SVG}metadata", f"{SVG}defs", f"{SVG}use"}:
                parent.remove(child)
    for element in root.iter():
        name = element.attrib.pop("id", "")
        for unused in ("clip-path", "transform"):  # all transforms of our texts are rotations by 0
            element.attrib.pop(unused, None)
        if name.startswith(("dense-", "converted-")):
            element.set("data-line", name)
        if "d" in element.attrib:
            element.set("d", _short(element.attrib["d"]))
        if "style" in element.attrib:
            element.set("style", _coloured(element.attrib["style"]))
    box, limits = axes.get_position(), axes.get_xlim()
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    root.attrib = {
        "viewBox": f"0 0 {width} {height}",
        "data-left": f"{box.x0:.4f}",
        "data-right": f"{box.x1:.4f}",
        "data-from": f"{limits[0]:.4f}",
        "data-to": f"{limits[1]:.4f}",
        "aria-hidden": "true",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _short(path: str) -> str:
    return re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.1f}", " ".join(path.split()))


def _coloured(style: str) -> str:
    for stand_in, variable in VARIABLES.items():
        style = style.replace(stand_in, variable)
    style = re.sub(
        r"#0700([0-9a-f]{2})",
        lambda match: f"color-mix(in oklab, var(--last) {int(match[1], 16)}%, var(--first))",
        style,
    )
    return re.sub(r"font(-family)?: [^;]+(;|$)", "", style)
