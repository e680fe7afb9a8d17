"""Windows and batches: each once, in an order that resumes, mixed by weight, shared by ranks."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qll.bytelm.dataset import BatchLoader, MemoryEfficientByteDataset
from qll.bytelm.packed import Document, pack
from qll.bytelm.permutation import mixed, permuted
from qll.errors import IntegrityError, TextError, UsageError


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Two packed texts: ASCII, and one of characters of two and three bytes."""
    folder = tmp_path_factory.mktemp("packed")
    ascii_text = Document("ascii", bytes(range(33, 127)) * 60)
    wide = Document("wide", ("äöüß€" * 500).encode())
    return [pack([ascii_text], folder / "ascii"), pack([wide, wide], folder / "wide")]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**62))
def test_an_order_is_a_permutation(count, key):
    found = permuted(np.arange(count), count, key)
    assert sorted(found.tolist()) == list(range(count))
    # and known at any place without the others
    assert permuted(np.array([count - 1]), count, key)[0] == found[-1]


def test_orders_of_other_keys_and_neighbours_are_unrelated():
    first, second = (permuted(np.arange(2000), 2000, mixed(0, epoch)) for epoch in (0, 1))
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.1
    assert abs(np.corrcoef(np.arange(2000), first)[0, 1]) < 0.1


def test_an_epoch_has_every_window_once_and_the_next_others(packed):
    for path in packed:
        windows = MemoryEfficientByteDataset(path, seq_length=50, seed=3)
        epochs = [windows.starts(np.arange(len(windows)) + e * len(windows)) for e in (0, 1)]
        for starts in epochs:
            gaps = np.diff(np.sort(starts))
            assert len(set(starts.tolist())) == len(windows)
            # a window moves by 3 bytes at most to begin with a character
            assert gaps.min() >= 50 - 3
            assert gaps.max() <= 50 + 3
            assert starts.max() + 51 <= len(windows.text)
        assert not set(epochs[0].tolist()) & set(epochs[1].tolist())


def test_windows_begin_with_a_character(packed):
    windows = MemoryEfficientByteDataset(packed[1], seq_length=16)
    rows = windows.gather(np.arange(3 * len(windows)))
    assert ((rows[:, 0] & 0xC0) != 0x80).all()
    for row in rows:
        bytes(row[row > 0]).decode("utf-8", errors="strict" if row[-1] < 128 else "ignore")


def test_targets_are_the_next_bytes_of_the_text(packed):
    loader = BatchLoader([MemoryEfficientByteDataset(packed[0], 32)], batch_size=5)
    inputs, targets = loader.next()
    text = packed[0].read_bytes()
    for row, after in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert bytes([*row, after[-1]]) in text
        assert row[1:] == after[:-1]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=2), st.integers(1, 7))
def test_mixtures_keep_their_weights(packed, weights, batch):
    datasets = [MemoryEfficientByteDataset(path, 40) for path in packed]
    loader = BatchLoader(datasets, batch, weights)
    for _ in range(40):
        loader.next()
        due = loader.drawn.sum() * np.array(weights) / sum(weights)
        assert np.abs(loader.drawn - due).max() <= 1.0001


def test_a_mixture_is_within_one_percent_of_its_weights(packed):
    datasets = [MemoryEfficientByteDataset(path, 40) for path in packed]
    loader = BatchLoader(datasets, 16, [0.7, 0.3])
    rows = np.concatenate([loader.next()[0].numpy() for _ in range(100)])
    share = (rows < 128).all(axis=1).mean()
    assert share == pytest.approx(0.7, abs=0.01)


def test_resume_continues_exactly(packed):
    def fresh():
        return BatchLoader([MemoryEfficientByteDataset(path, 24) for path in packed], 6, [0.4, 0.6])

    loader, other = fresh(), fresh()
    for _ in range(57):
        loader.next()
    other.restore(loader.state())
    for _ in range(60):
        for one, two in zip(loader.next(), other.next(), strict=True):
            assert one.equal(two)
    with pytest.raises(IntegrityError, match="of other texts"):
        other.restore({"drawn": [1]})


def test_ranks_share_every_batch(packed):
    def loader(batch, **share):
        datasets = [MemoryEfficientByteDataset(path, 24) for path in packed]
        return BatchLoader(datasets, batch, [0.5, 0.5], **share)

    whole, parts = loader(6), [loader(2, rank=rank, world=3) for rank in range(3)]
    for _ in range(50):
        rows = np.concatenate([part.next()[0].numpy() for part in parts])
        assert (rows == whole.next()[0].numpy()).all()


def test_bad_weights_and_short_texts_are_refused(packed, tmp_path):
    datasets = [MemoryEfficientByteDataset(path, 24) for path in packed]
    for weights in ([1.0], [1.0, -1.0], [0.0, 1.0], [float("nan"), 1.0]):
        with pytest.raises(UsageError, match="2 positive numbers"):
            BatchLoader(datasets, 2, weights)
    short = pack([Document("short", b"x" * 100)], tmp_path / "short")
    with pytest.raises(TextError, match="too short to train on"):
        MemoryEfficientByteDataset(short, seq_length=64)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Resident memory after reading all of 48 MB at random is that after reading 2 MB."""
    code = """
import sys, numpy as np, psutil
from pathlib import Path
from qll.bytelm.dataset import BatchLoader, MemoryEfficientByteDataset
loader = BatchLoader([MemoryEfficientByteDataset(Path(sys.argv[1]), 4095)], 8)
process, seen = psutil.Process(), []
for number in range(1500):
    loader.next()
    if number in (60, 1499):
        seen.append(process.memory_info().rss / 2**20)
print(seen[1] - seen[0])
"""
    path = tmp_path / "large"
    with open(path, "wb") as file:
        for _ in range(48):
            file.write(b"text " * 209715)
    command = [sys.executable, "-c", code, str(path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(found.stdout) < 16
