"""A checkpoint that changes under a run is noticed."""

from __future__ import annotations

import os

import pytest

from qll.errors import SourceChangedError
from qll.load import require_unchanged, stamps_of


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"abcdef")
    return path


def test_an_untouched_file_passes(file):
    require_unchanged(stamps_of([file]))


@pytest.mark.parametrize("kind", ["longer", "same size", "gone"])
def test_the_file_that_changed_is_named(file, kind):
    stamps = stamps_of([file])
    if kind == "gone":
        file.unlink()
    else:
        file.write_bytes(b"abcdefgh" if kind == "longer" else b"fedcba")
        os.utime(file, ns=(1, 1))
    with pytest.raises(SourceChangedError, match=r"model\.safetensors.*changed"):
        require_unchanged(stamps)
