"""Fewer channels between matrices: exact at full rank, counted, small where applied."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from qll.errors import ConfigError, ShapeError, UsageError
from qll.tn import JOINTS, build, require_valid, tensor_shapes
from qll.tn.elimination import eliminate, regression
from qll.tn.network import NetworkSpec

MODEL, FF, HEADS, KV_HEADS, D_HEAD = 12, 20, 4, 2, 4
ATTENTION = {"heads": (HEADS, KV_HEADS), "d_head": (D_HEAD,)}
SPECS = {
    "joint_channels": NetworkSpec(
        "joint_channels",
        (2 * FF + MODEL, MODEL),
        members=((FF, MODEL), (FF, MODEL), (MODEL, FF)),
    ),
    "joint_value_output": NetworkSpec(
        "joint_value_output",
        (KV_HEADS * D_HEAD + MODEL, MODEL),
        modes=ATTENTION,
        members=((KV_HEADS * D_HEAD, MODEL), (MODEL, HEADS * D_HEAD)),
    ),
    "joint_query_key": NetworkSpec(
        "joint_query_key",
        ((HEADS + KV_HEADS) * D_HEAD, MODEL),
        modes=ATTENTION,
        members=((HEADS * D_HEAD, MODEL), (KV_HEADS * D_HEAD, MODEL)),
    ),
}
SMALLER = {
    "joint_channels": (14, 5, 12, 7),
    "joint_value_output": (3, 6),
    "joint_query_key": (1,),
}


def matrices(spec, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64) for shape in spec.members]


def full(spec):
    return spec.with_ranks(JOINTS[spec.format].max_ranks(spec))


def function(format, members):
    """What a group of dense matrices computes on a few vectors, up to what attention adds."""
    torch.manual_seed(1)
    x = torch.randn(5, MODEL, dtype=torch.float64)
    if format == "joint_channels":
        gate, up, down = members
        return (silu(x @ gate.mT) * (x @ up.mT)) @ down.mT
    if format == "joint_value_output":
        heads = (x @ members[0].mT).unflatten(-1, (KV_HEADS, D_HEAD))
        return heads.repeat_interleave(HEADS // KV_HEADS, -2).flatten(-2) @ members[1].mT
    return torch.cat([x @ member.mT for member in members], -1)


@pytest.mark.parametrize("gauge", ["none", "interpolative"])
@pytest.mark.parametrize("format", sorted(SPECS))
def test_full_rank_computes_the_same(format, gauge):
    dense = matrices(SPECS[format])
    network = JOINTS[format].decompose(dense, full(SPECS[format]))
    network = network.interpolate() if gauge == "interpolative" else network
    found = [network.to_matrix(member) for member in range(len(dense))]
    torch.testing.assert_close(function(format, found), function(format, dense))


@pytest.mark.parametrize("gauge", ["none", "interpolative"])
@pytest.mark.parametrize("format", sorted(SPECS))
def test_stored_shapes_are_counted_and_both_gauges_compute_the_same(format, gauge):
    spec = SPECS[format].with_ranks(SMALLER[format])
    network = JOINTS[format].decompose(matrices(spec), spec)
    other = network.interpolate() if gauge == "interpolative" else network.expand()
    shapes = tensor_shapes(spec.with_gauge(gauge))
    assert shapes.cores == tuple(tuple(core.shape) for core in other.cores)
    assert shapes.indices == tuple(tuple(index.shape) for index in other.indices)
    assert other.num_params == shapes.num_params
    require_valid(other.spec, "test")
    members = range(len(spec.members))
    torch.testing.assert_close(
        function(format, [other.to_matrix(k) for k in members]),
        function(format, [network.to_matrix(k) for k in members]),
    )
    back = other.expand()
    torch.testing.assert_close(
        function(format, [back.to_matrix(k) for k in members]),
        function(format, [network.to_matrix(k) for k in members]),
    )


@pytest.mark.parametrize("gauge", ["none", "interpolative"])
@pytest.mark.parametrize("format", sorted(SPECS))
def test_apply_rows_and_gradients_are_those_of_the_matrix(format, gauge):
    spec = SPECS[format].with_ranks(SMALLER[format])
    network = JOINTS[format].decompose(matrices(spec), spec)
    network = network.interpolate() if gauge == "interpolative" else network
    cores = tuple(core.clone().requires_grad_() for core in network.cores)
    network = build(network.spec, cores, network.indices)
    used = 0.0
    for member in range(len(spec.members)):
        matrix, (out, into) = network.to_matrix(member), network.applied_shape(member)
        ids = torch.tensor([[0, 2], [1, 2]])
        torch.testing.assert_close(network.rows(ids, member), matrix[ids])
        if format == "joint_channels":  # the reduced matrix, at the kept channels
            kept = network.indices[0]
            matrix = matrix[:, kept] if member == 2 else matrix[kept]
        x = torch.randn(2, 3, into, dtype=torch.float64)
        assert matrix.shape == (out, into)
        torch.testing.assert_close(network.apply(x, member), x @ matrix.mT)
        used = used + network.apply(x, member).square().sum()
    assert all(grad is not None for grad in torch.autograd.grad(used, cores))
    assert network.flops(7) <= 2 * 7 * sum(out * into for out, into in spec.members)


def test_an_mlp_really_runs_at_the_smaller_width():
    spec = SPECS["joint_channels"].with_ranks((8, 8, 8, 8))
    network = JOINTS["joint_channels"].decompose(matrices(spec), spec)
    assert [network.applied_shape(k) for k in range(3)] == [(8, 12), (8, 12), (12, 8)]
    assert network.num_floats == 3 * 8 * MODEL
    assert network.flops(1) == 2 * 3 * 8 * MODEL


def test_value_and_output_save_the_square_of_each_heads_rank():
    for rank in (2, 4):
        spec = SPECS["joint_value_output"].with_ranks((rank, min(MODEL, HEADS * rank)))
        plain = tensor_shapes(spec).num_params
        saved = tensor_shapes(spec.with_gauge("interpolative")).num_params
        assert plain - saved == KV_HEADS * (rank**2 - rank)  # r pivots are stored instead


def test_aligned_members_are_near_the_originals_and_have_the_same_product():
    spec = SPECS["joint_value_output"].with_ranks((3, 12))
    dense = matrices(spec)
    network = JOINTS[spec.format].decompose(dense, spec).interpolate()
    aligned = network.aligned(dense[0])
    own = [network.to_matrix(0), network.to_matrix(1)]
    torch.testing.assert_close(function(spec.format, aligned), function(spec.format, own))
    for original, near, far in zip(dense, aligned, own, strict=True):
        assert (near - original).norm() < 0.8 * original.norm() < (far - original).norm()


def test_rotary_pairs_are_those_of_the_key_value_head_for_all_its_readers():
    spec = SPECS["joint_query_key"].with_ranks((1,))
    dense = matrices(spec)
    dense[1][2:4] = 0  # channels 2 and 3 of head 0: halves of the pairs 0 and 1
    dense[0][0 : 2 * D_HEAD : D_HEAD] = 9.0  # channel 0 of the query heads that read it
    network = JOINTS[spec.format].decompose(dense, spec)
    assert network.indices[0].tolist() == [0]
    zero = (network.to_matrix(0) == 0).all(1)
    assert zero[: 2 * D_HEAD].tolist() == [False, True, False, True] * 2


@pytest.mark.parametrize("format", sorted(SPECS))
def test_entropies_lie_between_zero_and_the_rank(format):
    spec = SPECS[format].with_ranks(SMALLER[format])
    network = JOINTS[format].decompose(matrices(spec), spec).interpolate()
    for bond in range(len(spec.ranks)):
        count = len(network.bond_spectrum(bond))
        assert 0 < network.entropy(bond) <= torch.tensor(float(count)).log()


@pytest.mark.parametrize("format", sorted(SPECS))
def test_wrong_members_ranks_and_matrices_are_refused(format):
    spec = SPECS[format].with_ranks(SMALLER[format])
    kind = JOINTS[format]
    with pytest.raises(ShapeError):
        kind.decompose(matrices(spec)[::-1], spec)
    with pytest.raises(ConfigError, match="impossible ranks"):
        require_valid(spec.with_ranks([99] * len(spec.ranks)), "file")
    other = NetworkSpec(format, spec.shape, spec.ranks, spec.modes, members=spec.members[:1])
    with pytest.raises(ConfigError):
        require_valid(other, "file")
    with pytest.raises(ConfigError):
        require_valid(spec.with_ranks((1,) * (len(spec.ranks) + 1)), "file")


def correlated(size: int) -> torch.Tensor:
    torch.manual_seed(4)
    root = torch.randn(size, size + 4, dtype=torch.float64)
    return root @ root.mT / size


def test_losses_of_an_elimination_are_those_of_the_best_refit():
    torch.manual_seed(5)
    matrix, moment = torch.randn(6, 90, dtype=torch.float64), correlated(90)
    found = eliminate(matrix, moment)
    assert sorted(found.order.tolist()) == list(range(90))
    for kept in (0, 1, 40, 89, 90):
        inputs = found.kept(kept)
        refit = regression(matrix, moment, inputs)
        error = matrix.clone()
        error[:, inputs] -= refit
        lost = float(((error @ moment) * error).sum())
        torch.testing.assert_close(float(found.losses[90 - kept]), lost, rtol=1e-7, atol=1e-7)
        gram = refit @ moment[inputs][:, inputs] @ refit.mT
        torch.testing.assert_close(found.gram(kept), gram, rtol=1e-6, atol=1e-6)


def test_elimination_beats_the_largest_columns_and_random_ones():
    torch.manual_seed(6)
    matrix, moment = torch.randn(6, 60, dtype=torch.float64), correlated(60)

    def lost(inputs):
        error = matrix.clone()
        error[:, inputs] -= regression(matrix, moment, inputs)
        return float(((error @ moment) * error).sum())

    best = lost(eliminate(matrix, moment).kept(30))
    assert best < lost(eliminate(matrix).kept(30))
    assert best < min(lost(torch.randperm(60)[:30].sort().values) for _ in range(20))


def test_ranks_of_other_counts_are_usage_errors():
    for spec in SPECS.values():
        with pytest.raises(UsageError):
            JOINTS[spec.format].clamp(spec.with_ranks((1,) * 7))
