"""Documents: what is refused and where, what is held out, how texts are packed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qll.bytelm import documents
from qll.bytelm.corpus import local_parts
from qll.bytelm.documents import Document, check_documents, find_documents, split_documents
from qll.bytelm.packed import PackedText, pack, sample
from qll.errors import TextError

# without the byte 0, which separates documents, and half characters, which are no UTF-8
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def texts(folder, count, size=200):
    for number in range(count):
        (folder / f"{number:02d}.txt").write_text(f"document {number} " * (size // 11))
    return folder


def test_binary_and_broken_texts_are_refused_with_their_position(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 4)
    binary = Document("binary", b"abcdef\0gh")
    with pytest.raises(TextError, match=r"binary: a binary file.*byte 0 at position 6"):
        list(binary.pieces())
    (tmp_path / "latin").write_bytes("schön".encode("latin1"))
    with pytest.raises(TextError, match=r"latin: not UTF-8.*byte 0xf6 at position 3"):
        list(Document("latin", tmp_path / "latin").pieces())
    with pytest.raises(TextError, match=r"byte 0xe2 at position 7"):
        list(Document("cut", "euro: x€".encode()[:-1]).pieces())


@settings(max_examples=40, deadline=None)
@given(TEXT, st.integers(1, 9))
def test_pieces_are_the_document_wherever_they_are_cut(text, size):
    data = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", size)
        assert b"".join(Document("text", data).pieces()) == data


def test_folders_are_read_in_name_order_without_hidden_and_empty_files(tmp_path):
    for name in ("b.txt", "a/z.txt", ".hidden", ".git/x", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "empty.txt").write_text("")
    assert [found.name for found in find_documents([tmp_path])] == ["a/z.txt", "b.txt", "c.md"]
    assert [found.name for found in find_documents([tmp_path], "*.md")] == ["c.md"]
    with pytest.raises(TextError, match="no text in this folder"):
        find_documents([tmp_path], "*.rst")
    with pytest.raises(TextError, match=r"no such file or folder.*--dataset"):
        find_documents([tmp_path / "missing"])


def test_every_tenth_document_is_held_out_or_the_end_of_each(tmp_path):
    trained, held = split_documents(find_documents([texts(tmp_path, 23)]))
    assert [document.name for document in held] == ["09.txt", "19.txt"]
    assert len(trained) == 21
    text = Document("one", ("ä" * 500).encode())
    (first,), (last,) = split_documents([text])
    assert b"".join(first.pieces()) + b"".join(last.pieces()) == text.source
    assert len(last) == 100


def test_packing_keeps_every_byte_and_every_boundary(tmp_path):
    parts = [Document("a", "ein Bär".encode()), Document("b", b"x" * 50), Document("c", b"y")]
    text = PackedText(pack(parts, tmp_path / "packed"))
    assert [bytes(found) for found in text.documents()] == [part.source for part in parts]
    assert len(text) == sum(map(len, parts)) + 4
    facts = check_documents(parts)
    assert (facts["bytes"], facts["documents"]) == (59, 3)
    assert check_documents(reversed(parts))["sha256"] != facts["sha256"]
    # a limit inside the two bytes of a character takes neither
    assert pack(parts, tmp_path / "cut", limit=6).read_bytes() == b"\0ein B\0"


def test_a_text_that_fails_leaves_no_packed_file(tmp_path):
    with pytest.raises(TextError):
        pack([Document("good", b"text"), Document("bad", b"te\0xt")], tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "empty").write_text("")
    with pytest.raises(TextError, match="too short to hold a part out"):
        local_parts([tmp_path / "empty"])
    (tmp_path / "tiny").write_text("some words")
    with pytest.raises(TextError, match="at least 64 bytes held out"):
        local_parts([tmp_path / "tiny"])


def test_samples_are_spread_over_the_documents(tmp_path):
    found = PackedText(pack([Document("d", b"x" * 100)] * 40, tmp_path / "packed")).documents()
    assert [len(part) for part in sample(found, 320)] == [20] * 16
    assert len(sample(found, 4000)) == 40
