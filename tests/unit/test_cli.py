"""The command line: help, spellings, config files."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from qll import cli
from qll.config import MainConfig, main_config_from_json, to_json
from qll.errors import InterruptedRun, UsageError


def parsed(monkeypatch, *words):
    """The settings a command line gives, without running it."""
    seen = []
    verb = cli.VERBS["run"]
    monkeypatch.setitem(cli.VERBS, "run", cli.Verb(verb.config, seen.append, verb.help))
    assert cli.main(list(words)) == 0
    return seen[0]


def test_help_names_every_verb_and_flag(capsys):
    started = time.monotonic()
    assert cli.main(["--help"]) == 0
    assert time.monotonic() - started < 5
    text = capsys.readouterr().out
    for word in (*cli.VERBS, "--llama_dir", "--keep", "--format", "--calib_text", "--device"):
        assert word in text


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_has_help(verb, capsys):
    assert cli.main([*verb.split(), "--help"]) == 0
    assert "--" in capsys.readouterr().out


def test_dash_and_underscore_are_the_same(monkeypatch):
    one = parsed(monkeypatch, "--calib-tokens", "99", "--keep_embeddings=0.5")
    assert one == parsed(monkeypatch, "--calib_tokens", "99", "--keep-embeddings", "0.5")
    assert one.texts.calib_tokens == 99
    assert one.convert.keep_embeddings == 0.5


def test_config_file_first_then_flags(monkeypatch, tmp_path):
    path = tmp_path / "run.json"
    settings = to_json(MainConfig(seed=7, out=Path("x")))
    path.write_text(json.dumps({"settings": settings | {"fingerprint": "f"}}))
    config = parsed(monkeypatch, "--config", str(path), "--keep", "0.6")
    assert (config.seed, config.out, config.convert.keep) == (7, Path("x"), 0.6)


def test_unknown_settings_are_named(tmp_path):
    with pytest.raises(UsageError, match="bogus"):
        main_config_from_json({"bogus": 1}, tmp_path)
    with pytest.raises(UsageError, match="keeep"):
        main_config_from_json({"convert": {"keeep": 0.5}}, tmp_path)


def test_a_mistyped_flag_is_answered_with_a_suggestion(capsys):
    assert cli.main(["--kep", "0.5"]) == 2
    assert "--keep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(UsageError("u"), 2), (InterruptedRun("i"), 4), (KeyboardInterrupt(), 4)]
)
def test_exit_codes(error, code, monkeypatch, capsys):
    def fail(config):
        raise error

    monkeypatch.setitem(cli.VERBS, "run", cli.Verb(MainConfig, fail, ""))
    assert cli.main([]) == code
    assert capsys.readouterr().err.startswith("qll: ")
