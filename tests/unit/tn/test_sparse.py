"""Kept entries: how they are named, and that nothing else is stored."""

import pytest
import torch

from qll.errors import UsageError
from qll.tn import NetworkSpec, tensor_shapes
from qll.tn.sparse import Sparse, packed, positions

SHAPE = (12, 20)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 257])
def test_a_mask_survives_packing(size, density):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < density
    words = packed(mask)
    assert words.dtype == torch.int32
    assert len(words) == -(-size // 32)
    found = positions(words, int(mask.sum()), size)
    assert found.tolist() == mask.nonzero().flatten().tolist()


@pytest.mark.parametrize(("kept", "named"), [(3, 3), (8, 8), (9, 8), (239, 8), (240, 0)])
def test_entries_are_named_in_the_cheaper_way(kept, named):
    matrix = noise(*SHAPE)
    network = Sparse.decompose(matrix, NetworkSpec("sparse", SHAPE, (kept,)))
    assert sum(index.numel() for index in network.indices) == named
    assert tensor_shapes(network.spec).num_params == kept + named
    found = network.to_matrix()
    assert int((found != 0).sum()) == kept
    assert torch.equal(found[found != 0], matrix[found != 0])
    if kept < matrix.numel():
        assert matrix[found == 0].abs().max() <= found[found != 0].abs().min()


@pytest.mark.parametrize("ranks", [(5,), (120,), (240,), (5, 2), (120, 3)])
@pytest.mark.parametrize("gauge", ["none", "interpolative"])
def test_every_verb_agrees_with_the_matrix(ranks, gauge):
    network = Sparse.decompose(noise(*SHAPE), NetworkSpec("sparse", SHAPE, ranks))
    network = network.interpolate() if gauge == "interpolative" else network
    matrix, x = network.to_matrix(), noise(3, SHAPE[1], seed=1)
    torch.testing.assert_close(network.apply(x), x @ matrix.mT)
    torch.testing.assert_close(network.rows(torch.tensor([3, 3, 0])), matrix[[3, 3, 0]])
    torch.testing.assert_close(network.expand().to_matrix(), matrix)
    shapes = tensor_shapes(network.spec)
    assert shapes.cores == tuple(tuple(core.shape) for core in network.cores)
    assert shapes.indices == tuple(tuple(index.shape) for index in network.indices)
    assert network.round(ranks=(4,)).spec.ranks == (4, *ranks[1:])


def test_gradients_reach_the_values():
    network = Sparse.decompose(noise(*SHAPE), NetworkSpec("sparse", SHAPE, (100,)))
    values = network.cores[0].requires_grad_()
    x = noise(6, SHAPE[1], seed=2)
    network.apply(x).sum().backward()
    expected = x.sum(0).expand(SHAPE)[network.to_matrix() != 0]
    torch.testing.assert_close(values.grad, expected)


def test_other_words_in_the_same_tensor_are_noticed():
    network = Sparse.decompose(noise(*SHAPE), NetworkSpec("sparse", SHAPE, (100,)))
    network.to_matrix()
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask.view(-1)[:100] = True
    network.indices[0].copy_(packed(mask))
    assert torch.equal(network.to_matrix() != 0, mask)


def test_a_network_that_was_never_loaded_is_not_a_number():
    spec = NetworkSpec("sparse", SHAPE, (100,))
    cores = (torch.full((100,), torch.nan),)
    network = Sparse(spec, cores, (torch.arange(8, dtype=torch.int32),))
    assert bool(network.to_matrix().isnan().any())


def test_ranks_are_one_or_two_numbers():
    for ranks in ((), (1, 2, 3)):
        with pytest.raises(UsageError, match="one or two ranks"):
            Sparse.clamp(NetworkSpec("sparse", SHAPE, ranks))
