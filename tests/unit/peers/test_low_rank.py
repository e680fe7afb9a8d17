"""The low-rank peers against the identities their papers state."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from benchmarks.peers import asvd, kfac_lems, load_method, pifa, svd, svd_llm, swift_svd
from benchmarks.peers.case import Factors, linears, pair_params, pair_rank
from benchmarks.peers.watch import Watch
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


def test_swift_svd_of_a_rank_is_svd_llm(problem):
    weight, inputs, moments = problem
    rank = pair_rank(weight.shape, KEEP)
    one = svd_llm.truncate(weight, moments, KEEP).matrix
    found = swift_svd.projected(weight, moments.input)
    assert torch.allclose(one, found.at(rank), atol=1e-4 * float(weight.abs().max()))
    error = ((weight - found.at(rank).double()) @ inputs.T).square().sum()
    assert float(error) == pytest.approx(found.tail(rank), rel=1e-3)


def factors_of(energies: list[float]) -> Factors:
    """A matrix [64, 64] of some energies."""
    zeros = torch.zeros(64, 64)
    return Factors(zeros, zeros, torch.tensor(energies, dtype=torch.float64))


def test_swift_svd_spreads_half_the_uniform_rank_by_importance_and_error():
    """Algorithm 2 of the paper, by hand: uniform rank 16 of 64 x 64 at a half."""
    tails = (1.0, 100.0, 10000.0)
    found = {
        f"model.layers.{index}.x": factors_of([1.0] * 16 + [tail / 48] * 48)
        for index, tail in enumerate(tails)
    }
    influence = [0.3, 0.1, 0.2]
    scores = torch.tensor([[2.0, 1.0, 1.5], [math.log(math.e + tail**0.5) for tail in tails]])
    for alpha in (0.0, 0.6, 1.0):
        ranks = swift_svd.allocate(found, influence, 0.5, alpha)
        share = scores[0] ** alpha * scores[1] ** (1 - alpha)
        wanted = 8 + 24 * share / share.sum()
        assert sum(ranks.values()) == 3 * 16
        assert all(
            abs(rank - float(want)) < 1 for rank, want in zip(ranks.values(), wanted, strict=True)
        )
    # past break-even two factors are larger than the matrix
    ranks = swift_svd.allocate(found, influence, 0.9, 0.0)
    assert ranks["model.layers.2.x"] is None
    assert all(rank <= 32 for rank in ranks.values() if rank is not None)


def test_swift_svd_takes_the_alpha_of_the_least_cross_entropy(tiny_case):
    case = tiny_case()
    found = {
        name: swift_svd.projected(weight, moments.input) for name, weight, moments in linears(case)
    }
    ranks = swift_svd.search(case, found)
    watch = Watch(case, swift_svd.TOKENS)

    def loss(ranks):
        return watch.cross_entropy(
            {name: found[name].at(rank) for name, rank in ranks.items() if rank is not None}
        )

    tried = [
        swift_svd.allocate(found, case.moments.block_influence, case.keep, alpha)
        for alpha in swift_svd.ALPHAS
    ]
    assert len(tried) == 11
    assert loss(ranks) == pytest.approx(min(map(loss, tried)), rel=1e-6)


def test_svd_llm_takes_a_singular_moment(problem):
    weight, inputs, moments = problem
    few = inputs[:10]
    singular = type(moments)(few.T @ few, moments.grad, 10, moments.grad_tokens)
    assert torch.isfinite(svd_llm.truncate(weight, singular, KEEP).matrix).all()


def test_asvd_scales_columns(problem):
    weight, inputs, _ = problem
    scale = inputs.abs().mean(0) ** asvd.ALPHA
    found = asvd.scaled(weight, scale)
    tail = torch.linalg.svdvals(weight * scale)[6:].norm()
    error = ((weight - found.at(6).double()) * scale).norm()
    assert float(error) == pytest.approx(float(tail), rel=1e-5)
    assert found.tail(6) == pytest.approx(float(tail) ** 2, rel=1e-8)


def test_asvd_measures_every_matrix_at_every_share(tiny_case, tiny_llama, tmp_path):
    case = tiny_case(cache=tmp_path)
    name = "model.layers.1.mlp.up_proj"
    weight = tiny_llama.get_submodule(name).weight.detach().double()
    found = {name: asvd.scaled(weight, torch.ones(weight.shape[1]).double())}
    measured = asvd.sensitivities(case, found)[name]
    assert tuple(measured) == (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    changed = copy.deepcopy(tiny_llama)
    changed.get_submodule(name).weight.data = found[name].at(pair_rank(weight.shape, 0.4))
    ids = case.windows[:2]
    with torch.no_grad():
        log_probs = changed(ids).logits[:, :-1].log_softmax(-1)
    wanted = -log_probs.gather(2, ids[:, 1:, None].long()).mean()
    assert measured[0.4] == pytest.approx(float(wanted), rel=1e-5)
    # kept for the other sizes
    assert asvd.sensitivities(case, {}) == {name: measured}


def test_asvd_takes_the_least_harmful_shares_until_the_budget_is_met():
    found = dict.fromkeys(("a", "b", "c"), factors_of([1.0] * 64))
    harm = {"a": 1.0, "b": 3.0, "c": 100.0}
    sensitivity = {
        name: {share: scale * (1 - share) for share in asvd.SHARES} for name, scale in harm.items()
    }
    shares = asvd.search(found, sensitivity, 0.7)
    assert shares["c"] == 1.0
    assert shares["a"] < shares["b"] < 1.0
    # as published: all up to a threshold, of each matrix the smallest
    for threshold in sorted(loss for losses in sensitivity.values() for loss in losses.values()):
        wanted = {
            name: min([1.0, *(share for share, loss in losses.items() if loss <= threshold)])
            for name, losses in sensitivity.items()
        }
        sizes = [
            4096 if share == 1 else pair_params((64, 64), pair_rank((64, 64), share))
            for share in wanted.values()
        ]
        if sum(sizes) <= 0.7 * 3 * 4096:
            break
    assert shares == wanted


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
        found[f"model.layers.{index}.x"] = Factors(left, right, energies)
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
    # ranks end below 0.95 of the break-even rank, and begin at a tenth of it below a keep of a half
    dear = dict(zip(found, (1.0, 1.0, 1e-9), strict=True))
    assert kfac_lems.allocate(found, dear, 0.5, 0.0, 0.0)["model.layers.2.x"] == 16
    assert kfac_lems.allocate(found, dear, 0.49, 0.0, 0.0)["model.layers.2.x"] == 8
    side = torch.zeros(82, 82)
    energies = torch.linspace(1, 0.01, 82, dtype=torch.float64)
    found = dict.fromkeys(found, Factors(side, side, energies))
    ranks = kfac_lems.allocate(found, equal, 0.995, 0.0, 0.0)
    assert sorted(rank or found["model.layers.0.x"].break_even for rank in ranks.values()) == [
        32,
        41,
        41,
    ]


def test_the_last_block_has_no_depth_weight():
    profile = kfac_lems.depth_profile(4, 1.0)
    assert profile[0] == 1
    assert profile[-1] == 0
    # (1/2 + 1/3) / (1/1 + 1/2 + 1/3)
    assert profile[1] == pytest.approx(5 / 11)


def test_trials_are_those_of_the_published_sampler():
    """optuna 4.6, TPESampler(seed=42): the first ten are drawn at random."""
    assert len(kfac_lems.trials()) == 10
    assert kfac_lems.trials()[0] == pytest.approx((1.1236203565420875, 6.655000144869414))
    assert kfac_lems.trials()[9] == pytest.approx((1.2958350559263474, 2.0386039813862933))


def test_sensitivity_is_the_divergence_of_the_whole_model(tiny_case, tiny_llama):
    case = tiny_case()
    watch = kfac_lems.DivergenceWatch(case)
    name = "model.layers.1.mlp.up_proj"
    matrix = torch.zeros_like(tiny_llama.get_submodule(name).weight)
    found = watch.divergence({name: matrix})
    changed = copy.deepcopy(tiny_llama)
    changed.get_submodule(name).weight.data.zero_()
    ids = case.windows[:2]
    with torch.no_grad():
        # at temperature 0.6, without the first quarter of these short windows
        dense = (tiny_llama(ids).logits[:, 10:] / 0.6).log_softmax(-1)
        other = (changed(ids).logits[:, 10:] / 0.6).log_softmax(-1)
    wanted = (dense.exp() * (dense - other)).sum(-1).mean()
    assert found == pytest.approx(float(wanted), rel=1e-3)
    assert watch.divergence({name: tiny_llama.get_submodule(name).weight}) < 1e-6


def test_the_first_256_positions_are_not_counted(tiny_case):
    windows = torch.randint(0, 512, (3, 1100), generator=torch.Generator().manual_seed(4))
    watch = kfac_lems.DivergenceWatch(tiny_case(windows=windows))
    assert watch.ids.shape == (2, 1024)
    assert sum(map(len, watch.dense)) == 2 * (1024 - 256)


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
