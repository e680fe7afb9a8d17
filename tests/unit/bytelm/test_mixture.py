"""Weights of texts that follow what is left to learn of each."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qll import cli
from qll.bytelm.config import ModelConfig, StreamConfig
from qll.bytelm.dataset import BatchLoader, MemoryEfficientByteDataset
from qll.bytelm.mixture import EVERY, SMOOTHING, Mixture, moved, require_reference
from qll.bytelm.model import ByteModel
from qll.bytelm.packed import Document, pack
from qll.bytelm.saved import save_model
from qll.errors import IntegrityError, UsageError

SMALL = ModelConfig(d_model=16, n_layers=1, n_heads=2, context=16, d_ff=16)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Two texts: of lower case letters and of digits."""
    folder = tmp_path_factory.mktemp("packed")
    letters = Document("letters", b"the quick brown fox jumps over it " * 90)
    digits = Document("digits", "".join(map(str, range(900))).encode())
    return [pack([letters], folder / "letters"), pack([digits], folder / "digits")]


def loader_of(packed, batch=4, **share):
    datasets = [MemoryEfficientByteDataset(path, 16) for path in packed]
    return BatchLoader(datasets, batch, [0.5] * len(packed), **share)


class Sure(ByteModel):
    """A model that gives some bytes a logit of their own; all others are equally likely."""

    def __init__(self, favoured: bytes, logit: float, config: ModelConfig = SMALL) -> None:
        super().__init__(config)
        self.favoured, self.logit = list(favoured), logit

    def step(self, ids, state, notes=None):
        logits, state = super().step(ids, state, notes)
        constant = torch.zeros_like(logits)
        constant[..., self.favoured] = self.logit
        return constant, state


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3),
    st.lists(st.floats(0.0, 5.0), min_size=3, max_size=3),
)
def test_weights_stay_a_distribution_and_grow_with_the_excess(weights, excess):
    start, excess = np.array(weights) / sum(weights), np.array(excess)
    found = moved(start, excess)
    assert found.sum() == pytest.approx(1)
    assert found.min() >= SMOOTHING / 3 * 0.999
    grown = start * np.exp(excess)
    expected = (1 - SMOOTHING) * grown / grown.sum() + SMOOTHING / 3
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_what_the_reference_knows_and_the_model_does_not_is_drawn_more(packed):
    loader = loader_of(packed)
    reference = Sure(b"0123456789", 6.0)  # finds digits easy, and letters hard
    mixture = Mixture(loader, reference)
    model = Sure(b"", 0.0)
    excess = mixture.excess(model)
    known = np.log(10 * np.exp(6) + 246) - 6
    assert excess[1] == pytest.approx(np.log(256) - known, rel=1e-6)
    assert excess[0] == pytest.approx(0, abs=0.05)  # boundaries and spaces: no more than hard
    for number in range(1, 3 * EVERY + 1):
        loader.next()
        mixture.after_step(model, number)
    assert mixture.moves == 3
    last, average = mixture.weights()["last"], mixture.weights()["average"]
    assert 0.99 < last[1] < 1 > average[1] > 0.9
    before = loader.drawn.copy()
    for _ in range(50):
        loader.next()
    assert (loader.drawn - before)[1] > 190  # of 200
    # nothing is left to learn: the weights move towards equal ones only
    assert Mixture(loader, Sure(b"", 0.0)).excess(model) == pytest.approx([0, 0])


def test_weights_that_change_owe_no_text_what_it_had_by_others(packed):
    loader = loader_of(packed, batch=3)
    for weights in ([0.5, 0.5], [0.1, 0.9], [0.7, 0.3]):
        loader.weigh(weights)
        start = loader.drawn.copy()
        for count in range(1, 31):
            loader.next()
            gone = loader.drawn - start
            assert np.abs(gone - 3 * count * np.array(weights)).max() <= 2.0001


def test_a_loader_that_is_never_weighed_draws_as_it_did(packed):
    loader, other = loader_of(packed), loader_of(packed)
    other.weigh([0.5, 0.5])
    assert loader.state() == {"drawn": [0, 0]}
    for _ in range(20):
        assert torch.equal(loader.next()[0], other.next()[0])


def test_ranks_that_move_alike_share_every_batch_and_resume(packed):
    def mixed(batch, **share):
        loader = loader_of(packed, batch, **share)
        return loader, Mixture(loader, Sure(b"0123456789", 1.0))

    model = Sure(b"", 0.0)
    whole, parts = mixed(4), [mixed(2, rank=rank, world=2) for rank in (0, 1)]
    for number in range(1, 2 * EVERY + 5):
        if number == EVERY + 3:  # as after a kill
            kept = [json.loads(json.dumps((a.state(), b.state()))) for a, b in parts]
            parts = [mixed(2, rank=rank, world=2) for rank in (0, 1)]
            for (loader, mixture), (place, state) in zip(parts, kept, strict=True):
                loader.restore(place)
                mixture.restore(state)
        rows = torch.cat([loader.next()[0] for loader, _ in parts])
        assert torch.equal(rows, whole[0].next()[0])
        for _, mixture in (whole, *parts):
            mixture.after_step(model, number)
    assert parts[0][1].weights() == whole[1].weights()
    with pytest.raises(IntegrityError, match="weights of other texts"):
        whole[1].restore({"sum": [1.0], "moves": 1})


def test_references_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="--reference: weighs texts against each other"):
        require_reference(SMALL, texts=1)
    english = ModelConfig(stream=StreamConfig(phase="rotation", languages=("en",)))
    with pytest.raises(UsageError, match="knows other languages"):
        require_reference(english, texts=2, languages=("de",))
    require_reference(english, texts=2, languages=("en",))
    require_reference(SMALL, texts=2, languages=("de",))


def test_a_reference_without_languages_reads_bytes_alone(tmp_path):
    text = Document("en", b"the quick brown fox jumps over it " * 90, language=1)
    paths = [pack([text], tmp_path / name) for name in "ab"]
    mixture = Mixture(loader_of(paths), ByteModel(SMALL))
    stream = StreamConfig(phase="rotation", languages=("en",))
    model = ByteModel(ModelConfig(d_model=16, n_layers=1, n_heads=2, context=16, stream=stream))
    assert (mixture.excess(model) >= 0).all()
    assert Mixture(loader_of(paths), model).excess(model) == pytest.approx([0, 0])


def test_a_run_with_a_reference_writes_its_weights_and_resumes(tmp_path, monkeypatch, capsys):
    for name, text in (("a", "the quick brown fox. "), ("b", "0123456789 9876543210. ")):
        (tmp_path / name).write_text(text * 60)
    torch.manual_seed(0)
    save_model(tmp_path / "reference", ByteModel(SMALL))
    monkeypatch.setattr("qll.bytelm.mixture.EVERY", 2)

    def words(out):
        data = [str(tmp_path / name) for name in "ab"]
        found = ["lm", "train", "--data", *data, "--out", str(tmp_path / out), "--max_steps", "6"]
        found += ["--seq_length", "16", "--batch_size", "2", "--log_every", "2", "--save_every"]
        found += ["3", "--reference", str(tmp_path / "reference"), "--set", "d_model=16"]
        return [*found, "n_layers=1", "n_heads=2", "d_ff=16"]

    assert cli.main(words("whole")) == 0
    result = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert sum(result["weights"]["average"]) == pytest.approx(1)
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    shown = [json.loads(line)["weights"] for line in lines if '"train"' in line]
    assert len(shown) == 3
    assert shown[-1] == result["weights"]["last"] != shown[0]

    step = BatchLoader.next
    calls = iter(range(100))
    monkeypatch.setattr(BatchLoader, "next", lambda self: step(self) if next(calls) < 5 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(words("killed"))
    monkeypatch.setattr(BatchLoader, "next", step)
    assert cli.main(words("killed")) == 0
    again = json.loads((tmp_path / "killed" / "training.json").read_text())
    assert again["weights"] == result["weights"]
    last = [tmp_path / out / "last" / "model.safetensors" for out in ("whole", "killed")]
    assert last[0].read_bytes() == last[1].read_bytes()
    capsys.readouterr()
    single = words("single")
    single.remove(str(tmp_path / "b"))
    assert cli.main(single) == 2
    assert "--reference: weighs texts against each other" in capsys.readouterr().err
    assert not (tmp_path / "single" / "run.json").exists()  # nobody's folder yet
    assert cli.main([*words("no"), "--streaming"]) == 2
    assert "--reference: is for texts that are packed" in capsys.readouterr().err
