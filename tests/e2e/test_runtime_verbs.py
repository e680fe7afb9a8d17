"""`generate` through our runtime and `bench`, from the command line."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaForCausalLM

from qll.cli import main
from tests.unit.model.conftest import write_folder


@pytest.fixture(scope="module")
def converted(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint with every matrix at half its rank."""
    model = LlamaForCausalLM.from_pretrained(tiny_checkpoint)
    folder = tmp_path_factory.mktemp("runtime") / "model"
    return write_folder(folder, model, rank_of=lambda full: full // 2)


def said(capsys, *words):
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out, printed.err


def test_both_runtimes_write_the_same(tiny_checkpoint, converted, capsys):
    for model in (tiny_checkpoint, converted):
        words = ["generate", "--model", model, "--prompt", "The for", "--max_new_tokens", "24"]
        ours, _ = said(capsys, *words)
        theirs, _ = said(capsys, *words, "--runtime", "transformers")
        assert ours == theirs
        assert ours.strip()
        drawn, _ = said(capsys, *words, "--temperature", "0.9", "--seed", "4")
        assert drawn != ours


def test_a_draft_changes_nothing_but_speed(tiny_checkpoint, converted, capsys):
    words = ["generate", "--model", tiny_checkpoint, "--prompt", "a list", "--max_new_tokens", "24"]
    plain, _ = said(capsys, *words)
    drafted, noted = said(capsys, *words, "--draft", converted)
    assert drafted == plain
    assert "proposals accepted" in noted


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (("--draft", "nowhere"), 3, "nowhere"),
        (("--draft", "nowhere", "--runtime", "transformers"), 2, "--draft"),
        (("--draft", "nowhere", "--sae_dir", "x", "--steer", "0:1:1"), 2, "--draft"),
        (("--runtime", "other"), 2, "other"),
        (("--max_new_tokens", "9999"), 2, "do not fit"),
    ],
)
def test_wrong_flags(tiny_checkpoint, flags, code, sentence, capsys):
    assert main(["generate", "--model", str(tiny_checkpoint), "--prompt", "a", *flags]) == code
    assert sentence in capsys.readouterr().err


def test_bench_prints_rates_and_limits(tiny_checkpoint, converted, capsys):
    words = ["bench", "--model", converted, "--llama_dir", tiny_checkpoint, "--prompt_tokens", "32"]
    words += ["--new_tokens", "4", "--rounds", "2", "--batch", "2"]
    table, _ = said(capsys, *words)
    assert table.count("converted") == 2
    value = json.loads(said(capsys, *words, "--json")[0])
    assert value["setting"]["batch"] == 2
    assert value["limits"]["bandwidth"] > 1e8
    for phase in ("decode", "prefill"):
        rows = value[phase]["rows"]
        for row in rows.values():
            assert row["tokens_per_second"] > 0
            assert 0 < row["share_of_limit"] < 1.2
        assert value[phase]["faster"]["dense"]["median"] == 1.0


def test_bench_refuses_what_does_not_fit(tiny_checkpoint, capsys):
    flags = ["bench", "--llama_dir", str(tiny_checkpoint), "--prompt_tokens", "500"]
    assert main(flags) == 2
    assert "context" in capsys.readouterr().err
