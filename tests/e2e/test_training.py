"""The main job with training: what it adds, that it resumes, that bits follow it."""

from __future__ import annotations

import json

import pytest

from qll.cli import main
from tests.e2e.conftest import QUICK


def run(tiny_checkpoint, out, *words: str) -> dict:
    flags = ["--llama_dir", str(tiny_checkpoint), *QUICK, "--out", str(out), "--keep", "0.5"]
    flags += ["--refine_tokens", "4096", "--train_context", "64", *words]
    assert main(flags) == 0
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def best(tiny_checkpoint, tmp_path_factory):
    return run(
        tiny_checkpoint,
        tmp_path_factory.mktemp("best") / "out",
        *("--effort", "best", "--heal_tokens", "4096"),
    )


def test_best_refines_and_heals_and_says_so(best):
    training = best["compression"]["training"]
    assert [block["block"] for block in training["refine"]] == [0, 1]
    assert training["heal"]["tokens"] == 4096
    assert {"refine", "heal", "write"} <= {*best["cost"]["seconds"]}


def test_it_is_nearer_to_the_dense_model_than_the_closed_form(best, tiny_checkpoint, tmp_path):
    fast = run(tiny_checkpoint, tmp_path / "fast", "--effort", "fast")
    assert fast["compression"]["training"] == {}
    for name, text in fast["quality"]["texts"].items():
        assert best["quality"]["texts"][name]["kl"] < text["kl"]
    assert fast["compression"]["keep"] == best["compression"]["keep"]


def test_bits_are_packed_from_what_was_trained(best, tiny_checkpoint, tmp_path):
    packed = run(
        tiny_checkpoint,
        tmp_path / "out",
        *("--effort", "best", "--heal_tokens", "4096", "--bits", "8"),
    )
    assert packed["compression"]["bytes_ratio"] < 0.6 * best["compression"]["bytes_ratio"] + 0.4
    for name, text in best["quality"]["texts"].items():
        found = packed["quality"]["texts"][name]["converted"]["ppl"]
        assert found == pytest.approx(text["converted"]["ppl"], rel=0.01)
