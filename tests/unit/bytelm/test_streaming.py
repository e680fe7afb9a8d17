"""Streams: windows of several texts in proportion, once per epoch, resumed and shared exactly."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qll.bytelm import registry
from qll.bytelm.checkpoint import read_checkpoint, write_checkpoint
from qll.bytelm.corpus import named_parts
from qll.bytelm.loaders import build_loaders
from qll.bytelm.registry import HubText, articles, mix_of
from qll.bytelm.streaming import ScalableStreamingDataset, StreamLoader
from qll.errors import IntegrityError, TextError, UsageError


@pytest.fixture
def configs(tmp_path):
    """A folder of many short texts and one file of characters of three bytes."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(30):
        text = "".join(f"<{20 * number + item:03d}>" for item in range(20))
        (folder / f"{number:02d}").write_text(text)
    (tmp_path / "wide").write_text("€" * 2000)
    return [{"path": folder, "weight": 0.75}, {"path": tmp_path / "wide", "weight": 0.25}]


def drawn(dataset, count):
    return [dataset.next().tobytes() for _ in range(count)]


def test_sources_come_in_proportion_and_windows_begin_with_characters(configs):
    dataset = ScalableStreamingDataset(configs, 32, buffer_size=1)
    windows = drawn(dataset, 400)
    wide = [window for window in windows if "€".encode() in window]
    assert len(wide) == pytest.approx(100, abs=2)
    assert all(window[0] & 0xC0 != 0x80 for window in windows)


def test_an_epoch_has_every_window_once(configs):
    dataset = ScalableStreamingDataset(configs[:1], 40, buffer_size=7)
    text = 27 * 101  # 27 documents of 100 bytes are trained on, each with its boundary
    count = Counter(drawn(dataset, text // 40 - 7))
    # every number is in the texts once, so a window tells its place
    assert max(count.values()) == 1


def test_resume_continues_exactly(configs):
    one = ScalableStreamingDataset(configs, 24, buffer_size=50, seed=5)
    before = drawn(one, 333)
    two = ScalableStreamingDataset(configs, 24, buffer_size=50, seed=99)
    two.restore(one.state())
    assert drawn(one, 200) == drawn(two, 200)
    assert before == drawn(ScalableStreamingDataset(configs, 24, buffer_size=50, seed=5), 333)
    with pytest.raises(IntegrityError, match="of other texts"):
        ScalableStreamingDataset(configs[:1], 24).restore(one.state())


def test_a_text_begins_again_after_so_many_of_its_windows(configs):
    def some() -> ScalableStreamingDataset:
        return ScalableStreamingDataset(configs[:1], 24, buffer_size=1, max_per_text=5)

    one = some()
    windows = [one._mine().tobytes() for _ in range(12)]
    assert windows[:5] == windows[5:10]
    assert windows[10:] == windows[:2]
    assert len(set(windows)) == 5
    two = some()
    two.restore(one.state())
    assert two._mine().tobytes() == windows[2]


def test_a_reset_stream_gives_the_same_again(configs):
    stream = ScalableStreamingDataset(configs, 24, buffer_size=20, seed=3)
    first = drawn(stream, 60)
    stream.reset()
    assert drawn(stream, 60) == first


def test_a_large_buffer_is_read_back_from_a_checkpoint(configs, tmp_path):
    """The header of a safetensors file has a limit that a buffer in it would pass."""
    one = ScalableStreamingDataset(configs, 24, buffer_size=3000)
    one.next()
    state = one.state()
    rows = state.pop("buffer")
    write_checkpoint(tmp_path / "state", {"data": {"buffer": rows}}, state)
    assert int.from_bytes((tmp_path / "state").read_bytes()[:8], "little") < 10_000
    groups, facts = read_checkpoint(tmp_path / "state")
    two = ScalableStreamingDataset(configs, 24, buffer_size=3000, seed=9)
    two.restore({**facts, **groups["data"]})
    assert drawn(two, 50) == drawn(one, 50)


def test_ranks_share_the_windows(configs):
    def windows(**share):
        return drawn(ScalableStreamingDataset(configs, 24, buffer_size=1, **share), 90)

    whole = ScalableStreamingDataset(configs, 24, buffer_size=1)
    all_of_them = [whole._mine().tobytes() for _ in range(180)]
    ranks = [
        ScalableStreamingDataset(configs, 24, buffer_size=1, rank=rank, world=2) for rank in (0, 1)
    ]
    shared = [[rank._mine().tobytes() for _ in range(90)] for rank in ranks]
    assert shared == [all_of_them[0::2], all_of_them[1::2]]
    assert windows(rank=0, world=2) != windows(rank=1, world=2)


def test_the_buffer_shuffles_and_keeps_to_its_memory(configs):
    ordered = drawn(ScalableStreamingDataset(configs[:1], 40, buffer_size=1), 30)
    shuffled = drawn(ScalableStreamingDataset(configs[:1], 40, buffer_size=30, seed=1), 30)
    assert ordered != shuffled
    small = ScalableStreamingDataset(configs, 24, buffer_size=10**6, memory_limit_gb=0.001)
    assert small.buffer.nbytes <= 0.001 * 2**30


def test_loaders_of_both_kinds_hold_the_same_documents_out(configs, tmp_path):
    held = []
    for streaming in (False, True):
        folder = tmp_path / f"data{streaming}"
        loader, held_out = build_loaders(configs, 24, 4, folder, streaming=streaming)
        inputs, targets = loader.next()
        assert inputs.shape == targets.shape == (4, 24)
        assert inputs[:, 1:].equal(targets[:, :-1])
        held.append([bytes(document) for document in held_out.documents()])
    assert held[0] == held[1]
    assert len(held[0]) == 4  # documents 9, 19 and 29, and the end of the other text
    assert isinstance(loader, StreamLoader)


def test_data_sets_of_the_hub_say_what_works_without_them(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    for name in ("wikitext2", "multi", "large"):
        with pytest.raises(TextError, match=r"`datasets` is not installed.*--data FILE_OR_FOLDER"):
            build_loaders(name, 16, 2, tmp_path / name)
        assert not (tmp_path / name / "texts.json").exists()
    with pytest.raises(UsageError, match=r"no such data set.*wikitext2"):
        named_parts("wikitext3")


def test_names_weights_and_splits_of_the_registry():
    assert sum(mix_of("multi").values()) == pytest.approx(1)
    assert {"wikitext2", "tinystories", "openwebtext", "pile", "c4", "fineweb"} <= set(registry.HUB)
    lines = [" = A = \n", " text \n", " = = B = = \n", " = C = \n", "end\n"]
    assert list(articles(iter(lines))) == ["".join(lines[:3]), "".join(lines[3:])]


def test_every_tenth_of_the_first_documents_is_held_out_of_a_data_set(monkeypatch):
    rows = [f"row {number}" for number in range(200)]
    monkeypatch.setattr(HubText, "rows", lambda self, split, streaming: iter(rows))
    monkeypatch.setattr(registry, "HELD_OUT_DOCUMENTS", 5)
    text = HubText("somebody/texts")
    held = [document.source.decode() for document in text.held_out()]
    assert held == ["row 9", "row 19", "row 29", "row 39", "row 49"]
    trained = [document.source.decode() for document in text.training()]
    assert sorted(trained + held) == sorted(rows)
    assert np.unique([document.name for document in text.training()]).size == 195
