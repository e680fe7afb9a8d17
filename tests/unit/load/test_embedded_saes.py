"""The autoencoders that come with the package: readable, of the embedded model, and documented."""

from __future__ import annotations

import json

import pytest
import torch

from qll.load.sae import EMBEDDED_FOLDER, find_saes, open_sae


def test_the_word_embedded_names_them():
    assert {found.hookpoint for found in find_saes("embedded").values()} == {
        "layers.9",
        "layers.20",
    }


@pytest.mark.parametrize("place", ["layers.9", "layers.20"])
def test_they_fit_the_embedded_model(place):
    stored = open_sae("embedded", place)
    assert (stored.spec.d_in, stored.spec.d_sae, stored.spec.k) == (576, 8 * 576, 32)
    directions = stored.decoder.block(0, 64).float()
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(64), atol=5e-3, rtol=0)


def test_how_they_were_made_stands_beside_them():
    made = json.loads((EMBEDDED_FOLDER / "training.json").read_text())
    lines = (EMBEDDED_FOLDER / "metrics.jsonl").read_text().splitlines()
    curve = [json.loads(line) for line in lines]
    assert all(len(text["sha256"]) == 64 for text in made["texts"])
    for place, found in made["hookpoints"].items():
        assert found["ce_score"] >= 0.92
        assert found["dead_share"] <= 0.02
        falls = [line["fvu"] for line in curve if line["hookpoint"] == place]
        assert falls[-1] < falls[0]
