"""JointTucker: grouped-query heads, the transposed output path, gauge, counts, spectra."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from qll.errors import ShapeError, UsageError
from qll.tn.joint_tucker import JointTucker
from qll.tn.network import NetworkSpec
from qll.tn.tucker import Tucker

HEADS, D_HEAD, D_MODEL = (4, 2, 2, 4), 5, 14  # heads times d_head is not d_model
RANKS = [(12, 5, 14), (6, 3, 8), (10, 2, 5), (1, 1, 1)]


def spec_of(ranks=(6, 3, 8), heads=HEADS) -> NetworkSpec:
    members = [(count * D_HEAD, D_MODEL) for count in heads[:3]]
    members += [(D_MODEL, count * D_HEAD) for count in heads[3:]]
    modes = {"heads": heads, "d_head": (D_HEAD,), "d_model": (D_MODEL,)}
    shape = (sum(out for out, _ in members), D_MODEL)
    return NetworkSpec("joint_tucker", shape, ranks, modes, members=tuple(members))


def matrices_of(dtype=torch.float64, heads=HEADS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in spec_of(heads=heads).members
    ]


@functools.cache  # networks are immutable
def network_of(ranks=(6, 3, 8), dtype=torch.float64) -> JointTucker:
    return JointTucker.decompose(matrices_of(dtype), spec_of(ranks))


def stacked(matrices) -> torch.Tensor:
    heads = [m.mT if j == 3 else m for j, m in enumerate(matrices)]
    return torch.cat(heads).reshape(-1, D_HEAD, D_MODEL)


def dense(network: JointTucker) -> torch.Tensor:
    return stacked([network.to_matrix(j) for j in range(network.members)])


@pytest.mark.parametrize("heads", [HEADS, HEADS[:3]])
def test_full_ranks_are_exact_and_cost_what_the_dense_matrices_cost(heads):
    matrices = matrices_of(heads=heads)
    spec = spec_of(heads=heads)
    spec = spec.with_ranks(JointTucker.max_ranks(spec))
    network = JointTucker.decompose(matrices, spec).interpolate()
    for member, matrix in enumerate(matrices):
        torch.testing.assert_close(network.to_matrix(member), matrix, rtol=0, atol=1e-10)
    assert network.num_floats == sum(matrix.numel() for matrix in matrices)


def test_the_fit_is_that_of_the_stack():
    network = network_of()
    stack = stacked(matrices_of())
    alone = NetworkSpec("tucker", (60, 14), (6, 3, 8), {"stack": (12, 5, 14)})
    expected = Tucker.decompose(stack.reshape(60, 14), alone).to_matrix()
    torch.testing.assert_close(dense(network), expected.reshape(12, 5, 14))


@pytest.mark.parametrize("ranks", RANKS)
def test_the_gauge_saves_the_square_of_every_rank_and_changes_nothing(ranks):
    network = network_of(ranks)
    fixed = network.interpolate()
    torch.testing.assert_close(dense(fixed), dense(network), rtol=0, atol=1e-10)
    torch.testing.assert_close(dense(fixed.expand()), dense(network), rtol=0, atol=1e-10)
    assert network.num_params - fixed.num_floats == sum(rank**2 for rank in ranks)
    for member in (network, fixed):
        shapes = JointTucker.tensor_shapes(member.spec)
        assert tuple(tuple(core.shape) for core in member.cores) == shapes.cores
        assert tuple(tuple(index.shape) for index in member.indices) == shapes.indices
        assert member.num_params == shapes.num_params


@pytest.mark.parametrize("ranks", RANKS)
def test_apply_and_rows_are_those_of_each_matrix(ranks):
    network = network_of(ranks)
    for stored in (network, network.interpolate()):
        for member, (out, into) in enumerate(stored.spec.members):
            for tokens in (1, 7, 64):
                x = torch.randn(tokens, into, dtype=torch.float64)
                expected = x @ stored.to_matrix(member).mT
                torch.testing.assert_close(stored.apply(x, member), expected)
                if stored.shares_input(member):
                    again = stored.apply(x, member, shared=stored.project(x))
                    torch.testing.assert_close(again, expected)
            ids = torch.randint(out, (2, 3))
            torch.testing.assert_close(
                stored.rows(ids, member), stored.to_matrix(member)[ids], rtol=0, atol=1e-11
            )


def test_only_the_output_matrix_reads_something_else():
    network = network_of()
    assert [network.shares_input(member) for member in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_in_storage_precision_has_gradients_everywhere(dtype):
    network = network_of(dtype=torch.float32).interpolate()
    cores = tuple(core.to(dtype).requires_grad_() for core in network.cores)
    indices = tuple(index.int() for index in network.indices)
    stored = JointTucker(network.spec, cores, indices)
    x, inner = torch.randn(2, 3, 14).to(dtype), torch.randn(2, 3, 20).to(dtype)
    outputs = [stored.apply(x, member) for member in range(3)] + [stored.apply(inner, 3)]
    sum(y.float().square().sum() for y in outputs).backward()
    assert all(core.grad is not None and core.grad.abs().sum() > 0 for core in cores)
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    for member, y in enumerate(outputs):
        matrix = network.to_matrix(member).double()
        exact = (inner if member == 3 else x).double() @ matrix.mT
        assert y.dtype == dtype
        assert (y - exact).abs().max() < tolerance * exact.abs().max()


def test_bond_spectra_are_those_of_the_stack():
    network = network_of()
    spectra = JointTucker.cut_spectra(matrices_of(), spec_of())
    for leg in range(3):
        for found, tensor in (
            (network.interpolate().bond_spectrum(leg), dense(network)),
            (spectra[leg], stacked(matrices_of())),
        ):
            sigma = torch.linalg.svdvals(tensor.movedim(leg, 0).flatten(1))[: len(found)]
            torch.testing.assert_close(found, sigma, rtol=0, atol=1e-7)
    sigma = network.bond_spectrum(1)
    weights = sigma.square() / sigma.square().sum()
    assert network.entropy(1) == pytest.approx(-(weights * weights.log()).sum().item())


def test_transform_legs_turns_the_model_leg_of_every_member():
    network = network_of()
    turn = torch.randn(14, 14, dtype=torch.float64)
    moved = network.transform_legs(out=[None, None], into=[turn])
    torch.testing.assert_close(moved.to_matrix(1), network.to_matrix(1) @ turn)
    torch.testing.assert_close(moved.to_matrix(3), turn.mT @ network.to_matrix(3))
    still = network.interpolate().transform_legs(out=[None, None], into=[None])
    torch.testing.assert_close(dense(still), dense(network))


@pytest.mark.parametrize("rtol", [1e-6, 0.2, 0.7])
def test_rounding_stays_within_its_tolerance_and_finds_planted_ranks(rtol):
    network = network_of(RANKS[0]).interpolate()
    error = (dense(network.round(rtol=rtol)) - dense(network)).norm()
    assert error <= (rtol + 1e-9) * dense(network).norm()
    planted = network_of()
    assert planted.round(rtol=1e-7).spec == planted.spec
    assert planted.round(ranks=(2, 2, 2)).spec.ranks == (2, 2, 2)


def test_flops_are_far_below_dense_at_low_rank_and_linear_in_tokens():
    network = JointTucker.decompose(matrices_of(), spec_of((2, 2, 2))).interpolate()
    assert network.flops(64) == 64 * network.flops(1)
    assert network.flops(1) < sum(matrix.numel() for matrix in matrices_of())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ranks": (12, 5, 99)}, "clamp"),
        ({"ranks": (12, 5)}, "one rank per leg"),
        ({"modes": {"heads": HEADS, "d_head": (5,)}}, "modes need"),
        ({"modes": {"heads": HEADS[:3], "d_head": (5,), "d_model": (14,)}}, "modes need"),
        ({"modes": {"heads": HEADS, "d_head": (4,), "d_model": (14,)}}, "heads multiply"),
        ({"members": ((20, 14), (10, 14), (10, 14), (20, 14))}, "heads multiply"),
        ({"shape": (53, 14)}, "heads multiply"),
    ],
)
def test_specs_that_cannot_be_are_refused(change, words):
    with pytest.raises(UsageError, match=words):
        JointTucker.tensor_shapes(replace(spec_of(), **change))


def test_matrices_that_are_not_the_members_are_refused():
    matrices = matrices_of()
    with pytest.raises(ShapeError, match="members"):
        JointTucker.decompose([*matrices[:3], matrices[3].mT], spec_of())
