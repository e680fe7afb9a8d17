"""Which documents are left out for their quality, and by which rule."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qll import cli
from qll.bytelm.corpus import local_parts, named_parts
from qll.bytelm.quality import RULES, Counted, quality
from qll.bytelm.registry import HUB, HubText
from qll.errors import TextError

PROSE = (
    "The river was low that summer and the fields were dry.\n"
    "Nobody in the village remembered who had built the bridge.\n"
    "In the evening they sat together and spoke about the weather.\n"
)
# each breaks the rule it stands under, and no other where only one is named
BROKEN = {
    "words of 3 to 10 letters": "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "few symbols": PROSE + "# " * 20,
    "words with letters": PROSE + " ".join(str(number) for number in range(100, 140)),
    "no list": "\n".join(f"- {line}" for line in PROSE.splitlines()),
    "finished lines": "\n".join(f"{line}…" for line in PROSE.splitlines()),
    "new lines": PROSE + "so it was\nit was so\n" + "so it was\nit was so\n" * 3,
    "new text": PROSE + PROSE.splitlines()[1],
    "no commonest pair of words": "buy it. " * 20,
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_obeyed_by_prose_and_can_be_broken(rule):
    assert RULES[rule](Counted(PROSE))
    assert not RULES[rule](Counted(BROKEN[rule]))
    assert quality(BROKEN[rule]) < quality(PROSE) == 1


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80))
def test_every_text_has_a_quality(text):
    assert 0 <= quality(text) <= 1
    assert quality(text) == quality(text)
    if not text.split():
        assert quality(text) == 0


@pytest.fixture
def texts(tmp_path):
    """Nine documents of prose and eleven of something else, held out ones of both kinds."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(20):
        text = PROSE if number % 2 else "## 12 34 $$ == " * 20
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


def test_bad_documents_are_not_trained_on_and_held_out_ones_stay(texts):
    (every,), (good,) = local_parts([texts]), local_parts([texts], min_quality=0.9)
    names = [document.name for document in good.training()]
    assert names == [f"{n:02d}.txt" for n in range(1, 20, 2) if n not in (9, 19)]
    assert list(good.held_out()) == list(every.held_out())
    assert good.facts["documents_left_out"] == 18 - len(names)
    assert good.facts["trained_bytes"] == len(PROSE) * len(names) == good.weight
    assert "documents_left_out" not in every.facts
    with pytest.raises(TextError, match=r"no document is of this quality.*--min_quality"):
        local_parts([texts / "00.txt"], min_quality=1.0)


def test_documents_of_data_sets_are_judged_when_they_are_read(monkeypatch):
    rows = [PROSE, "## 12 34 $$ == " * 20, PROSE.upper()]
    monkeypatch.setattr(HubText, "rows", lambda self, split, streaming: iter(rows))
    monkeypatch.setitem(HUB, "own", HubText("somebody/own", validation="validation"))
    (part,) = named_parts("own", min_quality=0.9)
    assert [document.source.decode() for document in part.training()] == [rows[0], rows[2]]
    assert len(list(part.held_out())) == 3


def test_the_verb_takes_a_quality(texts, tmp_path, capsys):
    words = ["lm", "train", "--data", str(texts), "--out", str(tmp_path / "run"), "--max_steps"]
    words += ["1", "--seq_length", "16", "--batch_size", "2", "--set", "d_model=16", "n_layers=1"]
    words += ["n_heads=2", "d_ff=16", "--min_quality", "0.9"]
    assert cli.main(words) == 0
    facts = json.loads((tmp_path / "run" / "training.json").read_text())["texts"][0]
    assert facts["documents_left_out"] == 10
    assert cli.main([*words[:-1], "1.5"]) == 2
    assert "--min_quality: out of range (expected 0 to 1, found 1.5)" in capsys.readouterr().err
