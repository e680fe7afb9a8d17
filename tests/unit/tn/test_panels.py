"""Panels: low-rank networks of rows or columns, and the order in which they are taken."""

import pytest
import torch

from qll.errors import UsageError
from qll.tn import NetworkSpec, default_panels, tensor_shapes
from qll.tn.lowrank import LowRank
from qll.tn.panels import Panels, panel_specs

ROWS = NetworkSpec("panels", (7, 5), (2, 3), {"rows": (4, 3), "order": (7,)})
COLUMNS = NetworkSpec("panels", (5, 7), (2, 3), {"columns": (4, 3), "order": (7,)})


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shuffled(spec: NetworkSpec) -> Panels:
    """Panels of noise with a random order."""
    places = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    return Panels.decompose(noise(*spec.shape), spec).reordered(places)


@pytest.mark.parametrize("spec", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_the_order_says_where_each_line_is(spec):
    network = shuffled(spec)
    axis = 0 if spec is ROWS else 1
    stacked = torch.cat([part.to_matrix() for part in network.parts()], dim=axis)
    matrix = network.to_matrix()
    for line, place in enumerate(network.indices[0].tolist()):
        assert torch.equal(matrix.select(axis, line), stacked.select(axis, place))


@pytest.mark.parametrize("gauge", ["none", "interpolative"])
@pytest.mark.parametrize("spec", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_every_verb_agrees_with_the_matrix(spec, gauge):
    network = shuffled(spec)
    network = network.interpolate() if gauge == "interpolative" else network
    matrix, x = network.to_matrix(), noise(2, 3, spec.shape[1], seed=2)
    torch.testing.assert_close(network.apply(x), x @ matrix.mT)
    ids = torch.tensor([[4, 0], [1, 4]])
    torch.testing.assert_close(network.rows(ids), matrix[ids])
    torch.testing.assert_close(network.expand().to_matrix(), matrix)
    stored = sum(tensor.numel() for tensor in (*network.cores, *network.indices))
    assert stored == tensor_shapes(network.spec).num_params
    stored = Panels(network.spec, network.cores, tuple(index.int() for index in network.indices))
    torch.testing.assert_close(stored.apply(x), network.apply(x))
    torch.testing.assert_close(stored.rows(ids), network.rows(ids))
    lower = network.round(ranks=(1, 2))
    assert lower.spec.ranks == (1, 2)
    assert lower.spec.gauge == gauge


@pytest.mark.parametrize("spec", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_gradients_reach_every_core(spec):
    network = shuffled(spec).interpolate()
    cores = tuple(core.requires_grad_() for core in network.cores)
    image = Panels(network.spec, cores, network.indices).apply(noise(4, spec.shape[1]))
    image.square().sum().backward()
    assert all(bool(core.grad.abs().sum() > 0) for core in cores if core.numel())


def test_one_factor_per_panel_and_one_for_the_other_side():
    network = shuffled(ROWS)
    first, second, right = noise(4, 4, seed=3), noise(3, 3, seed=4), noise(5, 5, seed=5)
    changed = network.transform_legs([first, second], [right])
    whole = torch.block_diag(first, second)[network.indices[0]][:, network.indices[0]]
    torch.testing.assert_close(changed.to_matrix(), whole @ network.to_matrix() @ right)
    with pytest.raises(UsageError, match="one factor or None per panel"):
        network.transform_legs([first], [right])


def test_a_square_panel_loses_less_of_noise_than_a_low_rank_matrix_of_its_size():
    """Why the format exists: at equal storage, of a flat spectrum."""
    matrix = noise(240, 80)
    spec = NetworkSpec("panels", (240, 80), modes=default_panels((240, 80)), gauge="interpolative")
    panels = spec.with_ranks((45, 45, 45))
    low = NetworkSpec("lowrank", (240, 80), gauge="interpolative")
    budget = tensor_shapes(panels).num_params
    fitting = [r for r in range(1, 81) if tensor_shapes(low.with_ranks((r,))).num_params <= budget]
    low = LowRank.decompose(matrix, low.with_ranks((max(fitting),)))
    error = (Panels.decompose(matrix, panels).to_matrix() - matrix).norm()
    assert error < 0.95 * (low.to_matrix() - matrix).norm()


@pytest.mark.parametrize(
    "modes",
    [{"rows": (4, 4)}, {"rows": (4, 3), "columns": (5,)}, {}, {"rows": (4, 3), "order": (6,)}],
)
def test_modes_that_do_not_fill_the_matrix_are_refused(modes):
    with pytest.raises(UsageError):
        panel_specs(NetworkSpec("panels", (7, 5), (1, 1), modes))
    with pytest.raises(UsageError, match="one rank per panel"):
        Panels.clamp(ROWS.with_ranks((1,)))
