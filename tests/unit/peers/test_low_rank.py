"""The low-rank peers against the identities their papers state."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.peers import asvd, kfac_lems, load_method, pifa, svd, svd_llm, swift_svd
from benchmarks.peers.case import pair_rank
from qll.tn.lowrank import LowRank
from qll.tn.network import NetworkSpec

KEEP = 0.7


def output_error(weight, replacement, inputs):
    return float(((weight - replacement.matrix.double()) @ inputs.T).norm())


def test_svd_discards_exactly_the_tail(problem):
    weight, _, moments = problem
    rank = pair_rank(weight.shape, KEEP)
    found = svd.truncate(weight, moments, KEEP)
    tail = torch.linalg.svdvals(weight)[rank:].norm()
    assert float((weight - found.matrix).norm()) == pytest.approx(float(tail), rel=1e-5)
    assert found.params == rank * 50 <= KEEP * 600 < (rank + 1) * 50


def test_svd_llm_discards_exactly_the_output_error(problem):
    weight, inputs, moments = problem
    rank = pair_rank(weight.shape, KEEP)
    left, right, values = svd_llm.whitened(weight, moments.input, rank)
    error = ((weight - left @ right) @ inputs.T).norm()
    assert float(error) == pytest.approx(float(values[rank:].norm()), rel=1e-8)
    assert output_error(weight, svd.truncate(weight, moments, KEEP), inputs) > 1.5 * float(error)


def test_swift_svd_is_svd_llm(problem):
    weight, _, moments = problem
    one = svd_llm.truncate(weight, moments, KEEP)
    two = swift_svd.truncate(weight, moments, KEEP)
    assert two.params == one.params
    assert torch.allclose(one.matrix, two.matrix, atol=1e-4 * float(weight.abs().max()))


def test_svd_llm_takes_a_singular_moment(problem):
    weight, inputs, moments = problem
    few = inputs[:10]
    singular = type(moments)(few.T @ few, moments.grad, 10, moments.grad_tokens)
    assert torch.isfinite(svd_llm.truncate(weight, singular, KEEP).matrix).all()


def test_asvd_scales_columns(problem):
    weight, inputs, _ = problem
    scale = inputs.abs().mean(0) ** asvd.ALPHA
    found = asvd.truncate(weight, scale, 6)
    tail = torch.linalg.svdvals(weight * scale)[6:].norm()
    assert float(((weight - found) * scale).norm()) == pytest.approx(float(tail), rel=1e-8)


def test_asvd_measures_mean_magnitudes(tiny_case, tiny_llama):
    case, seen = tiny_case(), []
    linear = tiny_llama.model.layers[1].mlp.up_proj
    hook = linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        tiny_llama(case.windows)
    hook.remove()
    means = asvd.input_means(case)
    wanted = seen[0].abs().mean((0, 1))
    assert torch.allclose(means["model.layers.1.mlp.up_proj"], wanted, rtol=1e-4)
    assert torch.equal(means["model.layers.1.mlp.up_proj"], means["model.layers.1.mlp.gate_proj"])


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (16, 16)])
@pytest.mark.parametrize("keep", [0.9, 0.6, 0.3])
def test_pifa_buys_the_largest_rank_and_counts_like_our_storage(shape, keep):
    rank = pifa.rank_of(shape, keep)
    assert pifa.params_of(shape, rank) <= keep * shape[0] * shape[1]
    assert pifa.params_of(shape, rank + 1) > keep * shape[0] * shape[1]
    shapes = LowRank.tensor_shapes(NetworkSpec("lowrank", shape, (rank,), gauge="interpolative"))
    assert pifa.params_of(shape, rank) == shapes.num_params


def test_pifa_is_lossless(problem):
    weight, inputs, moments = problem
    found = pifa.truncate(weight, moments, KEEP)
    rank = pifa.rank_of(weight.shape, KEEP)
    left, right, values = svd_llm.whitened(weight, moments.input, rank)
    assert torch.allclose(found.matrix.double(), left @ right, atol=1e-4)
    assert rank > pair_rank(weight.shape, KEEP)
    assert output_error(weight, found, inputs) == pytest.approx(
        float(values[rank:].norm()), rel=1e-2
    )


def test_refit_is_exact_for_a_target_it_can_reach(problem):
    """A weight of low rank, a compressed stream equal to the dense one: nothing is lost."""
    weight, _, moments = problem
    low = svd.truncate(weight, moments, 0.4).matrix.double()
    rank = pair_rank(weight.shape, 0.4)
    start = svd_llm.whitened(low, moments.input, rank)[:2]
    own = moments.input / moments.tokens
    left, right = pifa.refit(low, start[0] + 0.1, start[1], own, own, moments.tokens)
    assert torch.allclose(left @ right, low, atol=1e-5)


def test_refit_lowers_the_error_on_the_compressed_stream(problem):
    weight, inputs, moments = problem
    stream = inputs + 0.3 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(3))
    target = ((1 - pifa.DENSE_SHARE) * stream + pifa.DENSE_SHARE * inputs) @ weight.T
    own, cross = pifa._second_moments(stream, inputs)
    left, right, _ = svd_llm.whitened(weight, moments.input, 6)
    new_left, new_right = pifa.refit(weight, left, right, own, cross, len(stream))
    # U alone is the least squares solution, which beats the start
    assert (stream @ (left @ right).T - target).norm() > (
        stream @ (new_left @ new_right).T - target
    ).norm()
    solution = torch.linalg.lstsq(stream @ right.T, target).solution.T
    assert torch.allclose(solution, new_left, rtol=1e-6, atol=1e-8)
    # V: the ridge solution for the whole matrix, over the sums of all tokens, projected
    ridge = 1e-3 * torch.eye(weight.shape[1]).double()
    whole = torch.linalg.solve(stream.T @ stream + ridge, (target.T @ stream + 1e-3 * weight).T).T
    projected = torch.linalg.lstsq(new_left, whole).solution
    assert torch.allclose(projected, new_right, rtol=1e-6, atol=1e-8)


def test_kfac_discards_exactly_the_tail_of_the_metric(problem):
    weight, _, moments = problem
    found = kfac_lems.whiten(weight, moments)
    rank = 7
    error = weight - (found.left[:, :rank].double() @ found.right[:rank].double())
    left = kfac_lems.shrunk(moments.grad / moments.grad_tokens, kfac_lems.SHRINK_GRADIENT)
    right = kfac_lems.shrunk(moments.input / moments.tokens, kfac_lems.SHRINK_INPUT)
    loss = float(torch.trace(error.T @ left @ error @ right))
    assert loss == pytest.approx(found.tail(rank), rel=1e-5)
    assert torch.allclose(found.at(20).double(), weight, atol=1e-4)


def test_allocation_spends_where_it_hurts():
    generator = torch.Generator().manual_seed(0)
    found = {}
    for index in range(3):
        left, right = (torch.randn(64, 64, generator=generator) for _ in range(2))
        energies = torch.linspace(1, 0.01, 64, dtype=torch.float64)
        found[f"model.layers.{index}.x"] = kfac_lems.Whitened(left, right, energies)
    sensitivity = dict(zip(found, (1.0, 1.0, 100.0), strict=True))
    ranks = kfac_lems.allocate(found, sensitivity, 0.7, 0.0, 0.0)
    params = [4096 if rank is None else 128 * rank for rank in ranks.values()]
    assert sum(params) <= 0.7 * 3 * 4096
    assert ranks["model.layers.2.x"] is None
    assert all(rank is None or (rank % 8 == 0 and rank >= 0.3 * 32) for rank in ranks.values())
    # with equal sensitivities, depth weights protect the first block
    equal = dict.fromkeys(found, 1.0)
    ranks = kfac_lems.allocate(found, equal, 0.7, 0.0, 7.0)
    first, *_, last = [32 if rank is None else rank for rank in ranks.values()]
    assert first > last


def test_sensitivity_is_the_divergence_of_the_whole_model(tiny_case, tiny_llama):
    case = tiny_case()
    watch = kfac_lems.Watch(case)
    name = "model.layers.1.mlp.up_proj"
    matrix = torch.zeros_like(tiny_llama.get_submodule(name).weight)
    found = watch.divergence({name: matrix})
    changed = copy.deepcopy(tiny_llama)
    changed.get_submodule(name).weight.data.zero_()
    ids = case.windows[:2]
    with torch.no_grad():
        dense = tiny_llama(ids).logits.log_softmax(-1)
        other = changed(ids).logits.log_softmax(-1)
    wanted = (dense.exp() * (dense - other)).sum(-1).mean()
    assert found == pytest.approx(float(wanted), rel=1e-3)
    assert watch.divergence({name: tiny_llama.get_submodule(name).weight}) < 1e-6


@pytest.mark.parametrize("name", ["svd", "fp16", "rtn_int4"])
def test_a_method_without_calibration_asks_for_no_moments(tiny_case, name):
    def gather():
        raise AssertionError("moments were asked for")

    assert len(dict(load_method(name)(tiny_case(gather=gather)))) == 14


@pytest.mark.parametrize(
    "name",
    ["svd", "asvd", "svd_llm", "swift_svd", "whitened_interpolative", "mpifa", "kfac_lems"],
)
@pytest.mark.parametrize("keep", [0.9, 0.5])
def test_every_low_rank_peer_replaces_every_linear_within_the_budget(tiny_case, name, keep):
    case = tiny_case(keep=keep)
    found = dict(load_method(name)(case))
    shapes = {path: case.source.specs()[f"{path}.weight"].shape for path in found}
    dense = sum(shape[0] * shape[1] for shape in shapes.values())
    assert len(found) == 14
    assert all(tuple(found[path].matrix.shape) == tuple(shapes[path]) for path in found)
    assert 0.9 * keep * dense < sum(item.params for item in found.values()) <= keep * dense
    assert all(torch.isfinite(item.matrix).all() for item in found.values())
