"""Windows mixed from several texts: shares, order, seeds."""

from __future__ import annotations

import pytest
import torch

from qll.errors import TextError
from qll.load import Text, mixed_windows
from qll.load.mixture import shares
from tests.unit.load.test_text import one_letter_per_byte


def texts(*lengths: int) -> list[Text]:
    """One text per length, each of a letter of its own."""
    return [Text(letter, letter * n) for letter, n in zip("abcdef", lengths, strict=False)]


def counts(windows: torch.Tensor) -> list[int]:
    """How many windows each letter has, the most first."""
    return sorted(windows[:, 0].unique(return_counts=True)[1].tolist(), reverse=True)


def test_weights_decide_how_many_windows_each_text_gives():
    found = mixed_windows(texts(400, 400), [3, 1], one_letter_per_byte(), 80, 4)
    assert found.shape == (20, 4)
    assert counts(found) == [15, 5]


def test_a_prefix_is_a_mixture_too():
    found = mixed_windows(texts(400, 400), [1, 1], one_letter_per_byte(), 160, 4)
    assert counts(found[:10]) == [5, 5]


def test_windows_come_from_everywhere_once_and_the_seed_decides():
    text = Text("t", "".join(c * 4 for c in "abcdefgh"))
    tokenizer = one_letter_per_byte()
    first, again, other = (mixed_windows([text], [1], tokenizer, 20, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    whole = mixed_windows([text], [1], tokenizer, 32, 4)
    assert counts(whole) == [1] * 8
    assert counts(first) == [1] * 5


def test_a_short_text_gives_all_it_has_and_says_so(caplog):
    found = mixed_windows(texts(400, 8), [1, 1], one_letter_per_byte(), 80, 4)
    assert counts(found) == [10, 2]
    assert "fewer than its share" in caplog.text


def test_too_few_tokens_are_named():
    with pytest.raises(TextError, match="one window"):
        mixed_windows(texts(400), [1], one_letter_per_byte(), 3, 4)


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.2, 0.5, 0.3], [5]])
def test_shares_sum_up(weights):
    for total in (0, 1, 7, 100):
        assert sum(shares(weights, total)) == total


def test_what_is_skipped_is_the_start_of_the_same_draw():
    text, tokenizer = Text("t", "".join(c * 4 for c in "abcdefgh")), one_letter_per_byte()
    first = mixed_windows([text], [1], tokenizer, 20, 4)
    rest = mixed_windows([text], [1], tokenizer, 12, 4, skip=20)
    assert counts(torch.cat([first, rest])) == [1] * 8


def test_nothing_is_left_behind_everything(caplog):
    text = texts(40, 40)[:1]
    assert len(mixed_windows(text, [1], one_letter_per_byte(), 8, 4, skip=4000)) == 0
    assert "fewer than its share" in caplog.text
