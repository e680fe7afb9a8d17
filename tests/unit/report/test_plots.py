"""SVG panels: coloured by CSS variables, no ids, curves where the numbers are."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from qll.report.plots import Curve, Spectrum, entropy_panels, spectrum_panels

SVG = "{http://www.w3.org/2000/svg}"


def stroked(svg: str, variable: str) -> list[list[tuple[float, float]]]:
    """The points of every path drawn in a CSS variable."""
    lines = []
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        if f"stroke: var({variable})" in path.get("style", ""):
            numbers = [float(text) for text in re.findall(r"-?\d+(?:\.\d+)?", path.get("d", ""))]
            if numbers:
                lines.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return lines


def test_entropy_curves_keep_their_order_and_gaps_their_size():
    curves = {
        "q": Curve([0, 1, 2], [5.0, 5.2, 5.1], [4.8, 5.0, 4.9], [5.6, 5.6, 5.6]),
        "k": Curve([0, 1, 2], [4.4, 4.5, 4.6], [4.3, 4.4, 4.5], [5.0, 5.0, 5.0]),
    }
    drawn = entropy_panels(curves)
    heights = {
        key: {name: stroked(svg, f"--{name}")[0][0][1] for name in ("random", "dense", "converted")}
        for key, svg in drawn.items()
    }
    for key in curves:  # larger values are higher up: smaller y
        assert heights[key]["random"] < heights[key]["dense"] < heights[key]["converted"]
    gap = {key: heights[key]["dense"] - heights[key]["random"] for key in curves}
    assert abs(gap["q"] - gap["k"]) < 0.2, "0.6 nats are as high in both panels"
    assert abs(heights["q"]["random"] - heights["k"]["random"]) < 0.2


def test_a_model_of_one_block_is_still_visible():
    svg = entropy_panels({"q": Curve([0], [5.0], [4.8], [5.6])})["q"]
    (line,) = stroked(svg, "--dense")
    assert line[1][0] - line[0][0] > 20


def test_missing_values_leave_a_gap_and_nothing_measured_draws_nothing():
    svg = entropy_panels({"q": Curve([0, 1], [5.0, 5.1], [None, None], [5.6, 5.6])})["q"]
    assert stroked(svg, "--dense")
    assert not stroked(svg, "--converted")


def test_spectra_carry_their_block_and_end_at_the_rank_that_was_kept():
    lines = [
        Spectrum(3, 0.0, [1, 10, 20], [2.0, 1.0, 0.5], [2.0, 1.0, 0.0]),
        Spectrum(7, 1.0, [1, 10, 20], [2.5, 1.0, 0.4], None),
    ]
    root = ElementTree.fromstring(spectrum_panels({"q": lines}, {"q": [1.6, 1.0, 0.5]})["q"])
    groups = {g.get("data-line"): g for g in root.iter(f"{SVG}g") if g.get("data-line")}
    assert set(groups) == {"dense-3", "dense-7", "converted-3"}
    ends = {
        name: re.findall(r"-?[\d.]+", group.find(f"{SVG}path").get("d"))[-2]
        for name, group in groups.items()
    }
    assert float(ends["converted-3"]) < float(ends["dense-3"]) - 50


def test_panels_hold_no_ids_no_metadata_no_stand_in_colours():
    spectra = {"q": [Spectrum(0, 0.5, [1, 2], [2.0, 1.0], [2.0, 1.0])]}
    curves = {"q": Curve([0, 1], [5.0, 5.1], [4.9, 5.0], [5.6, 5.6])}
    panels = [*entropy_panels(curves).values(), *spectrum_panels(spectra, {}).values()]
    for svg in panels:
        for unwanted in (" id=", "<metadata", "<defs", "url(#", "#0", "http://matplotlib"):
            assert unwanted not in svg, unwanted
        assert len(svg) < 12_000


def test_panels_are_the_same_every_time():
    curves = {"q": Curve([0, 1], [5.0, 5.1], [4.9, 5.0], [5.6, 5.6])}
    assert entropy_panels(curves) == entropy_panels(curves)
