"""Texts are disjoint, windows do not overlap, and bytes are those of the scored tokens."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qll.errors import MissingFileError, TextError
from qll.load.text import LEAK_WORDS, Text, builtin_texts, encode, read_text
from qll.load.tokenizer_build import Piece, byte_level_bpe, sentencepiece_bpe, to_transformers


def runs(text: str, length: int = LEAK_WORDS) -> set[str]:
    words = text.split()
    return {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}


@pytest.fixture(scope="module")
def texts():
    return builtin_texts()


# --- Built-in texts -------------------------------------------------------------------------


def test_calibration_and_evaluation_share_no_topic_and_no_eight_words(texts):
    calibration = texts["python_topics_calibration"].text
    evaluation = texts["python_topics_evaluation"].text
    assert runs(calibration).isdisjoint(runs(evaluation))
    names = sorted(topics)
    used = [name for name in names if topics[name].strip() in calibration]
    assert set(names[0::2]) <= set(used)
    # a topic of the other half may stand inside one of these, and then must be gone over there
    heads = {name: topics[name].strip().splitlines()[0] for name in names}
    assert not any(f"{heads[name]}\n*" in evaluation for name in used)


def test_splitting_by_topic_alone_would_leak():
    # the reason for dropping paragraphs: without it this test's twin above could not hold
    names = sorted(topics)
    halves = ["\n".join(topics[name] for name in names[start::2]) for start in (0, 1)]
    assert len(runs(halves[0]) & runs(halves[1])) > 1000


def test_builtin_texts_are_long_enough_and_reproducible(texts, smollm2):
    for text in texts.values():
        windows, _ = encode(text, smollm2, 16384, 1024)
        assert windows.shape == (16, 1024)
    again = builtin_texts()
    assert {name: text.sha256 for name, text in texts.items()} == {
        name: text.sha256 for name, text in again.items()
    }


def test_source_code_is_another_domain(texts):
    assert "def " in texts["python_source"].text
    assert runs(texts["python_source"].text, 13).isdisjoint(
        runs(texts["python_topics_calibration"].text, 13)
    )


# --- read_text ------------------------------------------------------------------------------


def test_read_text_keeps_every_byte(tmp_path):
    file = tmp_path / "verse.txt"
    file.write_bytes("a\r\nb\u00e9\n".encode())
    text = read_text(file)
    assert (text.name, text.text) == ("verse", "a\r\nb\u00e9\n")


def test_text_that_is_not_utf8_names_byte_and_offset(tmp_path):
    file = tmp_path / "latin1.txt"
    file.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(TextError, match="byte 0xe9 at offset 3"):
        read_text(file)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(MissingFileError):
        read_text(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(TextError, match="no text"):
        read_text(tmp_path / "empty.txt")


# --- encode ---------------------------------------------------------------------------------


def one_letter_per_byte(add_bos: bool = False) -> PreTrainedTokenizerFast:
    pieces = [Piece(letter) for letter in pre_tokenizers.ByteLevel.alphabet()]
    pieces.append(Piece("<s>", role="control"))
    backend = byte_level_bpe(pieces, [], [], ignore_merges=False)
    return to_transformers(backend, special={"bos_token": "<s>"}, add_bos=add_bos, add_eos=False)


def test_windows_are_the_ids_in_order_without_overlap(smollm2, texts):
    text = texts["python_topics_evaluation"]
    windows, _ = encode(text, smollm2, 4096, 256)
    ids = smollm2(text.text)["input_ids"]
    assert windows.dtype == torch.int64
    assert windows.flatten().tolist() == ids[:4096]


def test_fewer_tokens_are_a_prefix_of_more(smollm2, texts):
    text = texts["python_source"]
    short, _ = encode(text, smollm2, 1024, 128)
    long, _ = encode(text, smollm2, 8192, 128)
    assert torch.equal(short, long[:8])


def test_last_partly_filled_window_is_left_out():
    windows, bytes_scored = encode(Text("t", "abcdefghij"), one_letter_per_byte(), None, 4)
    assert windows.shape == (2, 4)
    assert bytes_scored == 6


def test_bytes_of_all_tokens_are_the_bytes_of_the_text():
    text = Text("t", "na\u00efve \u4f60\u597d \U0001f600!")
    tokenizer = one_letter_per_byte()
    size = len(text.text.encode())
    windows, bytes_scored = encode(text, tokenizer, None, size)
    assert windows.shape == (1, size)
    assert bytes_scored == size - 1  # all but the first token's one byte


def test_bytes_of_real_tokens_add_up(smollm2, texts):
    text = Text("t", texts["python_topics_evaluation"].text[:5000])
    ids = smollm2(text.text)["input_ids"]
    windows, bytes_scored = encode(text, smollm2, None, len(ids))
    first = len(smollm2.decode(ids[:1]).encode())
    assert windows.shape == (1, len(ids))
    assert bytes_scored == len(text.text.encode()) - first


def test_bos_stands_once_and_counts_no_bytes():
    text = Text("t", "abcdefg")
    windows, bytes_scored = encode(text, one_letter_per_byte(add_bos=True), None, 4)
    assert (windows == 256).nonzero().tolist() == [[0, 0]]
    assert bytes_scored == 6  # a b c, e f g


def test_sentencepiece_bytes_are_those_of_the_text():
    pieces = [Piece("<unk>", role="unknown")]
    pieces += [Piece(f"<0x{byte:02X}>", role="byte") for byte in range(256)]
    pieces += [
        Piece("\u2581", -1.0),
        Piece("a", -2.0),
        Piece("\u2581a", -3.0),
        Piece("\u00e9", -4.0),
    ]
    backend = sentencepiece_bpe(pieces, add_space_prefix=False)
    tokenizer = to_transformers(backend, special={}, add_bos=False, add_eos=False)
    text = Text("t", "a a\u00e9 \u4f60")
    ids = tokenizer(text.text)["input_ids"]
    _, bytes_scored = encode(text, tokenizer, None, len(ids))
    assert bytes_scored == len(text.text.encode()) - 1


def test_special_token_written_in_the_text_counts_its_characters():
    backend = Tokenizer(models.BPE({"a": 0, "<mark>": 1}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<mark>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    _, bytes_scored = encode(Text("t", "a<mark>a"), tokenizer, None, 3)
    assert bytes_scored == len("<mark>a")


def test_too_short_a_text_says_how_long_it_is():
    with pytest.raises(TextError, match=r"t: .*at least 8, found 3"):
        encode(Text("t", "abc"), one_letter_per_byte(), None, 8)
    with pytest.raises(TextError, match=r"at least 8, found 4"):
        encode(Text("t", "abc" * 99), one_letter_per_byte(), 4, 8)


def test_text_shorter_than_asked_is_used_whole_with_a_warning(caplog):
    windows, _ = encode(Text("t", "abcdefgh"), one_letter_per_byte(), 100, 4)
    assert windows.shape == (2, 4)
    assert "fewer than the 100 asked for" in caplog.text


def test_context_of_one_scores_nothing_and_is_refused():
    with pytest.raises(TextError, match="two tokens"):
        encode(Text("t", "abc"), one_letter_per_byte(), None, 1)
