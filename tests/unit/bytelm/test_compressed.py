"""Compressed packed texts: the same windows as uncompressed ones, whatever is asked for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qll import cli
from qll.bytelm import compressed as module
from qll.bytelm.compressed import FOOTER, SHARD, CompressedText, compressed
from qll.bytelm.dataset import BatchLoader, MemoryEfficientByteDataset
from qll.bytelm.documents import Document
from qll.bytelm.packed import open_text, pack
from qll.errors import IntegrityError


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same documents packed plainly and in several shards, the last of them not full."""
    folder = tmp_path_factory.mktemp("packed")
    words = "".join(f"{n} squared is {n * n}, schön. " for n in range(4500)).encode()
    documents = [Document("one", words, language=1), Document("two", words[:1000])]
    plain = pack(documents, folder / "plain")
    assert len(plain.read_bytes()) > 2 * SHARD
    return plain, pack(documents, folder / "shards", compress=True)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=30), max_size=12), st.integers(1, 7), st.data())
def test_slices_are_those_of_the_text(tmp_path_factory, pieces, size, data):
    path, text = tmp_path_factory.mktemp("shards") / "text", b"".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARD", size)
        path.write_bytes(b"".join(compressed(pieces)))
        shards = CompressedText(path)
        assert len(shards) == len(text)
        if text:
            start = data.draw(st.integers(0, len(text) - 1))
            stop = data.draw(st.integers(start + 1, len(text)))
            assert bytes(shards.read(start, stop)) == text[start:stop]


def test_windows_batches_ranks_and_resumption_are_those_of_the_plain_file(pair):
    assert pair[1].stat().st_size < 0.5 * pair[0].stat().st_size
    plain, shards = (open_text(path) for path in pair)
    assert len(plain) == len(shards)
    assert type(plain) is not type(shards)
    starts = np.array([0, 1, SHARD - 3, SHARD, 2 * SHARD - 1, len(plain) - 9])
    assert np.array_equal(shards.ids(starts, 9), plain.ids(starts, 9))
    assert np.array_equal(shards.character_starts(starts), plain.character_starts(starts))

    def loader(path, batch, **share):
        return BatchLoader([MemoryEfficientByteDataset(path, 50, seed=3)], batch, **share)

    whole = loader(pair[0], 6)
    ranks = [loader(pair[1], 3, rank=rank, world=2) for rank in (0, 1)]
    for step in range(12):
        if step == 5:  # as after a kill
            resumed = [loader(pair[1], 3, rank=rank, world=2) for rank in (0, 1)]
            for new, old in zip(resumed, ranks, strict=True):
                new.restore(json.loads(json.dumps(old.state())))
            ranks = resumed
        expected, found = whole.next(), [rank.next() for rank in ranks]
        for number in (0, 1):
            rows = np.concatenate([batch[number].numpy() for batch in found])
            assert np.array_equal(rows, expected[number].numpy())


def test_a_window_opens_the_shards_it_lies_in_and_keeps_them(pair):
    text = open_text(pair[1])
    text.gather(np.array([5, 900, SHARD - 2]), 10)
    text.gather(np.array([7]), 10)
    opened = text.shard.cache_info()
    assert (opened.misses, opened.hits) == (2, 3)


def test_damaged_shards_are_refused(pair, tmp_path):
    good = pair[1].read_bytes()
    path = tmp_path / "damaged"
    for bad in (good[:-1], good[: len(good) // 2], good[:5] + good[-FOOTER.size :]):
        path.write_bytes(bad)
        with pytest.raises(IntegrityError, match="compressed text cannot be read"):
            open_text(path)
    path.write_bytes(good[:40] + bytes(40) + good[80:])
    with pytest.raises(IntegrityError, match="compressed text cannot be read"):
        open_text(path).gather(np.array([0]), 9)
    # a shard of more text than it says
    swollen = b"".join(compressed([bytes(10)]))
    swollen = swollen[: -FOOTER.size] + FOOTER.pack(9, *FOOTER.unpack(swollen[-FOOTER.size :])[1:])
    path.write_bytes(swollen)
    with pytest.raises(IntegrityError, match="10 bytes in shard 0 instead of 9"):
        open_text(path).gather(np.array([0]), 9)


def test_a_run_on_compressed_texts_is_the_run_on_plain_ones(tmp_path, capsys):
    (tmp_path / "text").write_text("".join(f"{n} is the root of {n * n}. " for n in range(900)))
    weights = []
    for out, extra in (("plain", []), ("shards", ["--compress"])):
        words = ["lm", "train", "--data", str(tmp_path / "text"), "--out", str(tmp_path / out)]
        words += ["--max_steps", "3", "--seq_length", "16", "--batch_size", "2", *extra, "--set"]
        assert cli.main([*words, "d_model=16", "n_layers=1", "n_heads=2", "d_ff=16"]) == 0
        weights.append((tmp_path / out / "last" / "model.safetensors").read_bytes())
        facts = json.loads((tmp_path / out / "training.json").read_text())["texts"][0]
        assert facts.get("stored_bytes", 0) < 0.7 * facts["packed_bytes"]
    assert weights[0] == weights[1]
    assert "stored_bytes" in facts
    assert cli.main([*words, "d_model=16", "--streaming"]) == 2
    assert "--compress: is for texts that are packed" in capsys.readouterr().err
