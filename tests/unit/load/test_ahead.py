"""Reading ahead changes when tensors are read, not what is read."""

from __future__ import annotations

import time

import pytest
import torch

from qll.errors import MissingTensorError
from qll.load import ReadAhead, expect_block, open_source


class Counting(ReadAhead):
    """A source that notes what is read from it."""

    def __init__(self, source):
        super().__init__(source)
        self.source, self.names = source, []

    def read(self, name, rows=None):
        self.names.append(name)
        return self.source.read(name, rows)


@pytest.fixture
def counting(tiny_hf_folder):
    return Counting(open_source(tiny_hf_folder))


def test_each_tensor_is_read_once_and_is_the_same(counting):
    ahead = ReadAhead(counting)
    expect_block(ahead, 1)
    names = [name for name in counting.specs() if name.startswith("model.layers.1.")]
    for name in names:
        assert torch.equal(ahead.read(name), counting.source.read(name))
    assert sorted(counting.names) == sorted(names)
    ahead.read(names[0])
    assert counting.names.count(names[0]) == 2


def test_slices_and_other_tensors_go_past_it(counting):
    ahead = ReadAhead(counting)
    ahead.expect(["model.norm.weight"])
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(ahead.read(name, slice(2, 5)), counting.source.read(name)[2:5])
    assert ahead.fingerprint == counting.source.fingerprint


def test_a_block_beyond_the_last_expects_nothing(counting):
    ahead = ReadAhead(counting)
    expect_block(ahead, counting.config.num_hidden_layers)
    assert not counting.names


def test_what_nobody_reads_is_dropped(counting):
    ahead = ReadAhead(counting)
    name = "model.norm.weight"
    ahead.expect([name])
    deadline = time.monotonic() + 10
    while name not in counting.names:  # or it is dropped before it is read
        assert time.monotonic() < deadline, "never read"
        time.sleep(0.001)
    expect_block(ahead, 0)
    expect_block(ahead, 1)
    ahead.read(name)
    assert counting.names.count(name) == 2


def test_a_source_that_does_not_read_ahead_is_left_alone(tiny_hf_folder):
    expect_block(open_source(tiny_hf_folder), 0)


def test_errors_arrive_where_the_tensor_is_wanted(counting):
    ahead = ReadAhead(counting)
    ahead.expect(["no.such.tensor"])
    with pytest.raises(MissingTensorError):
        ahead.read("no.such.tensor")


def test_the_reader_has_one_thread_and_the_caller_keeps_its_own(tiny_hf_folder):
    threads, seen = torch.get_num_threads(), []

    class Asking(Counting):
        def read(self, name, rows=None):
            seen.append(torch.get_num_threads())
            return super().read(name, rows)

    ahead = ReadAhead(Asking(open_source(tiny_hf_folder)))
    for index in (0, 1):
        expect_block(ahead, index)
    for name in ahead.specs():
        ahead.read(name)
    blocks = [name for name in ahead.specs() if name.startswith("model.layers.")]
    others = len(ahead.specs()) - len(blocks)
    assert sorted(seen) == [1] * len(blocks) + [threads] * others
    assert torch.get_num_threads() == threads
