"""Fitting: exact at full rank, optimal in its metric, honest about its own errors."""

import pytest
import torch

from qll.calibrate import LinearMoments
from qll.convert.candidates import format_of
from qll.convert.fit import dense_members, fit, whiten
from qll.convert.metric import Metric, factor, metric_of, plain
from qll.tn import default_modes
from qll.tn.network import NetworkSpec

SHAPE = (24, 18)
SPECS = {
    "lowrank": NetworkSpec("lowrank", SHAPE, gauge="interpolative"),
    "mpo": NetworkSpec("mpo", SHAPE, modes=default_modes(SHAPE, 3), gauge="interpolative"),
    "tree": NetworkSpec("tree", SHAPE, modes=default_modes(SHAPE, 3), gauge="interpolative"),
    "kron": NetworkSpec("kron", SHAPE, modes=default_modes(SHAPE, 2), gauge="interpolative"),
    "tucker": NetworkSpec("tucker", SHAPE, modes={"stack": (4, 6, 18)}, gauge="interpolative"),
}
JOINT = {
    "joint_tree": NetworkSpec(
        "joint_tree", (20, 12), gauge="interpolative", members=((12, 12), (4, 12), (4, 12))
    ),
    "joint_tucker": NetworkSpec(
        "joint_tucker",
        (32, 12),
        modes={"heads": (3, 1, 1, 3), "d_head": (4,), "d_model": (12,)},
        gauge="interpolative",
        members=((12, 12), (4, 12), (4, 12), (12, 12)),
    ),
}


def moments(out: int, into: int, seed: int) -> LinearMoments:
    torch.manual_seed(seed)
    x = torch.randn(64, into, dtype=torch.float64) @ torch.randn(into, into, dtype=torch.float64)
    g = torch.randn(64, out, dtype=torch.float64) @ torch.randn(out, out, dtype=torch.float64)
    return LinearMoments(input=x.T @ x, grad=g.T @ g, tokens=64, grad_tokens=64)


def full(spec: NetworkSpec) -> NetworkSpec:
    return spec.with_ranks(format_of(spec).max_ranks(spec))


@pytest.mark.parametrize("kind", ["plain", "activation", "kfac"])
@pytest.mark.parametrize("format", sorted(SPECS))
def test_full_rank_is_exact_in_every_metric(format, kind):
    torch.manual_seed(3)
    weight = torch.randn(SHAPE, dtype=torch.float64)
    metric = metric_of(moments(*SHAPE, seed=4), kind)
    fitted = fit([weight], full(SPECS[format]), [metric], torch.float64)
    assert fitted.rel_error[0] < 1e-7
    assert fitted.network.spec.gauge == "interpolative"


@pytest.mark.parametrize("kind", ["plain", "kfac"])
@pytest.mark.parametrize("format", sorted(JOINT))
def test_joint_formats_at_full_rank_are_exact(format, kind):
    torch.manual_seed(5)
    spec = JOINT[format]
    weights = [torch.randn(shape, dtype=torch.float64) for shape in spec.members]
    metrics = [metric_of(moments(*shape, seed=6), kind) for shape in spec.members]
    fitted = fit(weights, full(spec), metrics, torch.float64)
    assert max(fitted.rel_error) < 1e-7


def test_lowrank_is_optimal_in_the_metric():
    torch.manual_seed(7)
    weight = torch.randn(SHAPE, dtype=torch.float64)
    metric = metric_of(moments(*SHAPE, seed=8), "kfac")
    fitted = fit([weight], SPECS["lowrank"].with_ranks((6,)), [metric], torch.float64)
    root_out, root_in = factor(metric.left).root, factor(metric.right).root
    values = torch.linalg.svdvals(root_out.T @ weight @ root_in)
    best = float((values[6:].square().sum() / values.square().sum()).sqrt())
    assert fitted.metric_error[0] == pytest.approx(best, rel=1e-6)
    assert fitted.discarded_weight == pytest.approx(best**2, rel=1e-6)


def test_the_metric_beats_the_plain_truncation_in_its_own_norm():
    torch.manual_seed(9)
    weight = torch.randn(SHAPE, dtype=torch.float64)
    metric = metric_of(moments(*SHAPE, seed=10), "kfac")
    for format, ranks in {"lowrank": (6,), "mpo": (6, 6), "kron": (6,)}.items():
        spec = format_of(SPECS[format]).clamp(SPECS[format].with_ranks(ranks))
        aware = fit([weight], spec, [metric], torch.float64).network
        blind = fit([weight], spec, [plain()], torch.float64).network
        errors = [
            metric.norm_squared(weight - dense_members(network)[0]) for network in (aware, blind)
        ]
        assert errors[0] < errors[1]


def test_a_diagonal_metric_weights_rows():
    torch.manual_seed(11)
    weight = torch.randn(SHAPE, dtype=torch.float64)
    rows = torch.ones(SHAPE[0], dtype=torch.float64)
    rows[:4] = 1e4
    spec = SPECS["lowrank"].with_ranks((6,))
    error = (
        weight - fit([weight], spec, [Metric("kfac", left=rows)], torch.float64).network.to_matrix()
    )
    assert error[:4].norm() < 0.1 * error[4:].norm()


def test_errors_are_those_of_the_cast_cores():
    weight = torch.randn(SHAPE, dtype=torch.float64)
    spec = full(SPECS["lowrank"])
    assert fit([weight], spec, [plain()], torch.bfloat16).rel_error[0] > 1e-4


def test_whitening_pads_legs_that_exceed_the_matrix():
    spec = NetworkSpec("mpo", (23, 18), modes={"out": (4, 6), "in": (3, 6)}, gauge="interpolative")
    weight = torch.randn(23, 18, dtype=torch.float64)
    metric = metric_of(moments(23, 18, seed=12), "kfac")
    seen = whiten([weight], spec, [metric])
    assert seen.matrices[0].shape == (24, 18)
    fitted = fit([weight], full(spec), [metric], torch.float64)
    assert fitted.rel_error[0] < 1e-6
    assert fitted.network.to_matrix().shape == (23, 18)
