"""The sections on autoencoders are written from what the benchmarks measure, here at tiny sizes."""

from __future__ import annotations

import argparse
import json

from benchmarks import features, results_page, sae, sae_page


def test_every_row_that_is_measured_is_on_the_page(tmp_path):
    arguments = argparse.Namespace(threads=1, peers=None, text=None, quick=True)
    names = ("training/qll", "training/sparsify", "coding/qll", "coding/sae_lens")
    rows = {name: sae.row(name, sae.QUICK, tmp_path, arguments) for name in names}
    result = {"machine": sae.machine(), "threads": 1, "sizes": sae.QUICK, "rows": rows, "text": "t"}
    text = sae_page.section(result)
    ours = rows["training/qll"]
    assert f"| **QLL** | {ours['tokens_per_second']:,.1f} | 1.00 |" in text
    assert f"| {ours['fvu']:.4f} | {ours['tokens']:,} |" in text
    assert f"| **QLL** | {rows['coding/qll']['tokens_per_second']:,.1f} | 1.00 |" in text
    for name in ("training/sparsify", "coding/sae_lens"):
        label = sae_page.LABELS[name.split("/")[1]]
        # a peer that is not installed is on the page all the same
        assert f"| {label} | {rows[name].get('skipped', '')}" in text


def test_the_embedded_autoencoders_are_shown_with_their_curve():
    made = json.loads((sae_page.EMBEDDED / "training.json").read_text())
    text = sae_page.embedded()
    assert text in results_page.PAGE.read_text()
    for place, found in made["hookpoints"].items():
        assert f"| `{place}` | {found['kinds']['ordinary']['fvu']:.3f} (" in text
        assert f"{found['fvu']:.3f}" in results_page.README.read_text()
    assert f"| {made['tokens']:,} |" in text  # where the curve ends


def test_a_row_of_the_features_benchmark_is_on_the_page():
    survival = {
        "kept_share": {"unweighted": 0.75},
        "measured": 900,
        "certainty": {"kept_share_interval": [0.7, 0.8]},
    }
    layer = {
        "hookpoint": "layers.9",
        "survival": survival,
        "causal": {"kept_share": None},
        "controls": {"floor": {"kept_share": {"unweighted": 0.999}}},
    }
    report = {
        "provenance": {"settings": {"convert": {"labels": "sampled"}}},
        "compression": {"keep": 0.8, "params_ratio": 0.84},
        "quality": {"texts": {"wiki": {"dense": {"ppl": 10.0}, "converted": {"ppl": 15.0}}}},
        "sae": {"layers": {"9": layer}},
    }
    rows = {f"weight{w:g}": features.row_of(report, w) for w in (1.0, 0.0)}
    text = sae_page.features(
        {
            "machine": sae.machine(),
            "command": "python -m benchmarks.features",
            "calib": {"name": "a.txt"},
            "eval": {"name": "b.txt"},
            "calib_tokens": 16384,
            "eval_tokens": 8192,
            "rows": {f"keep0.8_{name}": row for name, row in rows.items()},
        }
    )
    *lines, _, missing = text.splitlines()
    assert missing.startswith("Not run: keep0.6_weight0,")
    assert "keep0.8_weight4" in missing
    assert "keep0.8_weight1" not in missing
    assert lines[-1].endswith("keep 0.8, weight 1: kept +0.0, perplexity x 1.000.")
    assert lines[-4:-2] == [
        f"| 0.8 | {weight} | 1.500 | 75.0 % (70.0 to 80.0) |  |" for weight in (0, 1)
    ]
    assert "99.9 % at `layers.9`" in text
