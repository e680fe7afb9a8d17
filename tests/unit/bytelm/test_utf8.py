"""The table of UTF-8 agrees with Python's decoder on every pair of bytes and on any text."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qll.bytelm.utf8 import Utf8State, state_after
from qll.errors import TextError

TAILS = (b"", b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\xa0\x80", b"\x90\x80\x80")


def begins_a_text(data: bytes) -> bool:
    """Whether Python decodes these bytes after one of the tails that end any character."""
    for tail in TAILS:
        with contextlib.suppress(UnicodeDecodeError):
            (data + tail).decode()
            return True
    return False


def test_every_pair_and_many_triples_of_bytes_agree_with_python():
    for first in range(256):
        assert Utf8State().allowed(4)[first] == begins_a_text(bytes([first]))
        if not Utf8State().allowed(4)[first]:
            continue
        state = Utf8State().after(first)
        for second in range(256):
            assert state.allowed(4)[second] == begins_a_text(bytes([first, second]))
    state = Utf8State().after(0xF0).after(0x90)
    assert [state.allowed(4)[third] for third in (0x7F, 0x80, 0xBF, 0xC0)] == [0, 1, 1, 0]


@given(st.text())
def test_any_text_ends_between_characters(text):
    assert state_after(text.encode()) == Utf8State()


@given(st.text(min_size=1), st.integers(1, 3))
def test_a_cut_text_needs_the_bytes_that_were_cut(text, cut):
    data = text.encode()
    last = len(text[-1].encode())
    if cut < last:
        assert state_after(data[:-cut]).needed == cut


def test_no_character_begins_that_cannot_end():
    for remaining in (1, 2, 3, 4):
        allowed = Utf8State().allowed(remaining)
        for size, character in enumerate("A\u00e9\u20ac\U0001f600", start=1):
            assert allowed[character.encode()[0]] == (size <= remaining)


@pytest.mark.parametrize(
    "data", [b"\xff", b"ok\x80", b"\xc3(", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"]
)
def test_what_is_no_utf8_is_refused(data):
    with pytest.raises(TextError, match="UTF-8"):
        state_after(data)
