"""Identities of the byte model's mathematics on arbitrary numbers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qll.bytelm.energy import pair_energy, phasors
from qll.bytelm.matrix_state import Writes, chunked, recurrent
from qll.bytelm.rotary import rotate

SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(-100, 100), st.floats(1e-6, 1e6))
def test_a_rotation_keeps_lengths_and_is_undone(seed, angle, size):
    x, turn = size * drawn(seed, 3, 8), torch.tensor([angle], dtype=torch.float64)
    turned = rotate(x, (turn.cos(), turn.sin()))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)
    back = rotate(turned, (turn.cos(), -turn.sin()))
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10 * size)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(2, 12), st.integers(1, 4))
def test_the_energy_of_all_pairs_in_linear_time_is_the_double_sum(seed, seq, pairs):
    x = drawn(seed, 2, seq, 2 * pairs)
    phases = torch.atan2(x[..., 1::2], x[..., 0::2])
    differences = (phases[:, :, None] - phases[:, None, :]).cos()
    other = ~torch.eye(seq, dtype=torch.bool)
    expected = 1 - differences.movedim(-1, 1)[:, :, other].mean()
    torch.testing.assert_close(pair_energy(phasors(x)), expected, rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 17), st.integers(1, 20), st.booleans(), st.floats(0, 30))
def test_chunks_of_any_length_give_the_same_reads(seed, seq, chunk, delta, forgetting):
    keys = torch.nn.functional.normalize(drawn(seed, 1, 2, seq, 1, 4), dim=-1)
    writes = Writes(
        drawn(seed + 1, 1, 2, seq, 4),
        keys,
        drawn(seed + 2, 1, 2, seq, 1, 3),
        -forgetting * drawn(seed + 3, 1, 2, seq).abs(),
        drawn(seed + 4, 1, 2, seq).sigmoid() if delta else None,
    )
    start = drawn(seed + 5, 1, 2, 4, 3)
    torch.testing.assert_close(
        chunked(writes, start, chunk), recurrent(writes, start), rtol=0, atol=1e-10
    )
