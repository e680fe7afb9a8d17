"""Curves of a feature page: the CDF of survival, densities before and after, survival over keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10, nan
from typing import Any

from matplotlib import rc_context

from qll.report.plots import (
    CONVERTED,
    DENSE,
    LINE,
    RANDOM,
    SOFT,
    STYLE,
    as_svg,
    label,
    new_axes,
)
from qll.report.units import Number

SIZE = (380, 220)
LEFT = 0.14
MOST_POINTS = 3000
# the controls in the order they are drawn, with their colour and dash
CONTROLS = {
    "shuffled": (SOFT, (0, (1, 2.5))),
    "matched_noise": (RANDOM, (0, (4, 3))),
    "floor": (DENSE, "-"),
}


def survival_curve(
    quantiles: Sequence[Number], controls: Mapping[str, Sequence[Number]], cuts: Sequence[Number]
) -> str:
    """Share of measured features with r of at most x: the conversion, and each control.

    quantiles: r at equally spaced shares from 0 to 1. cuts: r at which classes change.

    >>> "var(--converted)" in survival_curve([0.2, 0.9, 1.0], {"floor": [0.9, 1.0, 1.0]}, [0.5])
    True
    """
    with rc_context(STYLE):
        figure, axes = new_axes(LEFT, SIZE)
        for cut in cuts:
            axes.axvline(cut, color=LINE, lw=1.2)
        for name, (colour, dash) in CONTROLS.items():
            _cdf(axes, controls.get(name, ()), color=colour, ls=dash, lw=1.5)
        _cdf(axes, quantiles, color=CONVERTED, lw=2.4)
        axes.set_xlim(-0.1, 1.01)
        axes.set_ylim(0, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 0.9, 1], ["0", ".25", ".5", ".75", ".9", "1"])
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        label(axes, "features", "r at most")
        return as_svg(figure, axes)


def density_scatter(
    before: Sequence[Number], after: Sequence[Number], classes: Sequence[Number], tokens: int
) -> str:
    """Share of tokens on which each feature fires, dense against converted, both logarithmic.

    Kept features in one colour, blurred in another, lost and silenced ones in the third; features
    that fire no more lie on the floor, half a token.

    >>> "stroke-linecap: round" in density_scatter([0.1], [0.2], [0], 100)
    True
    """
    floor = 0.5 / max(1, tokens)
    step = max(1, len(before) // MOST_POINTS)
    points = [
        (log10(max(x, floor)), log10(max(y, floor)), int(kind))
        for x, y, kind in list(zip(before, after, classes, strict=True))[::step]
    ]
    with rc_context(STYLE):
        figure, axes = new_axes(LEFT, SIZE)
        low = log10(floor)
        axes.plot([low, 0], [low, 0], color=LINE, lw=1.2)
        for kinds, colour in (((0,), DENSE), ((1,), RANDOM), ((2, 3), CONVERTED)):
            x = [value for a, _, kind in points if kind in kinds for value in (a, a, nan)]
            y = [value for _, b, kind in points if kind in kinds for value in (b, b, nan)]
            # dots as lines without length: one path, whatever their number
            axes.plot(x, y, color=colour, lw=3, solid_capstyle="round", alpha=0.6)
        axes.set_xlim(low - 0.1, 0)
        axes.set_ylim(low - 0.1, 0)
        for axis in (axes.xaxis, axes.yaxis):
            ticks = [tick for tick in range(-7, 0) if tick > low]
            axis.set_ticks(ticks, [_power(tick) for tick in ticks])
        label(axes, "converted", "dense: share of tokens")
        return as_svg(figure, axes)


def keep_curve(over_keep: Mapping[str, Sequence[Number]], now: Number | None) -> str:
    """Share of (feature, matrix) pairs, and of features at all matrices, kept at each keep.

    now: the share kept with the weights as they were converted, as a level line.

    >>> curve = {"keep": [0.5, 1.0], "kept_share": [0.4, 1.0], "every": [0.1, 1.0]}
    >>> keep_curve(curve, 0.3).startswith("<svg")
    True
    """
    with rc_context(STYLE):
        figure, axes = new_axes(LEFT, SIZE)
        axes.plot(over_keep["keep"], over_keep["every"], color=RANDOM, ls=(0, (4, 3)), lw=1.8)
        axes.plot(over_keep["keep"], over_keep["kept_share"], color=DENSE, lw=2.2)
        if now is not None:
            axes.axhline(now, color=CONVERTED, lw=1.5, ls=(0, (4, 3)))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        label(axes, "kept", "numbers kept of every matrix")
        return as_svg(figure, axes)


def _cdf(axes: Any, quantiles: Sequence[Number], **style: Any) -> None:
    if len(quantiles) > 1:
        shares = [number / (len(quantiles) - 1) for number in range(len(quantiles))]
        axes.plot([max(-0.1, value) for value in quantiles], shares, **style)


def _power(tick: int) -> str:
    return f"{100 * 10.0**tick:g} %" if tick >= -4 else f"1e{tick}"
