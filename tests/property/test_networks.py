"""What every format promises, on random shapes, ranks and gauges."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qll.errors import UsageError
from qll.tn import JOINTS, NETWORKS, build, default_modes, tensor_shapes
from qll.tn.network import NetworkSpec, TensorShapes

CHAINS = ("lowrank", "mpo", "kron")  # their bonds are the only gauge freedom
quick = settings(derandomize=True, max_examples=15, deadline=None)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def draws(draw: st.DrawFn, formats: tuple[str, ...] = tuple(NETWORKS)) -> dict:
    """Raw choices for a spec. (qll itself is not called here: its type checks use `random`.)"""
    name = draw(st.sampled_from(formats))
    few = {"lowrank": st.just(1), "sparse": st.just(1), "kron": st.just(2)}
    legs = draw(few.get(name, st.integers(2, 3)))
    sizes = st.lists(st.integers(1, 12 if legs == 1 else 4), min_size=legs, max_size=legs)
    fractions = st.lists(st.floats(0, 1), min_size=8, max_size=8)
    return {
        "name": name,
        "out": tuple(draw(sizes)),
        "in": tuple(draw(sizes)),
        "cut": draw(st.integers(0, 1)),
        "fractions": draw(fractions),
    }


def spec_of(drawn: dict) -> NetworkSpec:
    """A clamped spec of some format, padded now and then."""
    name, out, into = drawn["name"], drawn["out"], drawn["in"]
    if name in ("lowrank", "sparse"):
        spec = NetworkSpec(name, (*out, *into))
    elif name == "panels":
        order = {"order": (sum(out),)} if drawn["cut"] else {}
        spec = NetworkSpec(name, (sum(out), into[0]), modes={"rows": out} | order)
    elif name == "tucker":
        stack = (*out, into[0])
        spec = NetworkSpec(name, (prod(out), into[0]), modes={"stack": stack})
    else:
        shape = tuple(max(1, prod(legs) - drawn["cut"]) for legs in (out, into))
        spec = NetworkSpec(name, shape, modes={"out": out, "in": into})
    largest = NETWORKS[name].max_ranks(spec)
    ranks = [
        1 + round(fraction * (rank - 1))
        for fraction, rank in zip(drawn["fractions"], largest, strict=False)
    ]
    return NETWORKS[name].clamp(spec.with_ranks(ranks))


def unpadded(spec: NetworkSpec) -> NetworkSpec:
    """The same legs with a matrix that fills them: errors in padding are cut off, and not seen."""
    if "out" not in spec.modes:
        return spec
    return replace(spec, shape=(prod(spec.modes["out"]), prod(spec.modes["in"])))


def full(spec: NetworkSpec) -> NetworkSpec:
    return NETWORKS[spec.format].clamp(spec.with_ranks(NETWORKS[spec.format].max_ranks(spec)))


def decomposed(spec: NetworkSpec, seed: int = 0):
    return NETWORKS[spec.format].decompose(noise(*spec.shape, seed=seed), spec)


@quick
@given(draws())
def test_full_ranks_lose_nothing_in_either_gauge(drawn):
    spec = spec_of(drawn)
    matrix = noise(*spec.shape)
    network = NETWORKS[spec.format].decompose(matrix, full(spec))
    for found in (network, network.interpolate(), network.interpolate().expand()):
        torch.testing.assert_close(found.to_matrix(), matrix, rtol=0, atol=1e-10)


@quick
@given(draws(CHAINS))
def test_full_ranks_cost_the_dense_matrix(drawn):
    spec = spec_of(drawn)
    chosen = full(spec).with_gauge("interpolative")
    floats = sum(prod(shape) for shape in tensor_shapes(chosen).cores)
    legs = chosen.modes or {"out": (chosen.shape[0],), "in": (chosen.shape[1],)}
    assert floats == prod(legs["out"]) * prod(legs["in"])


@quick
@given(draws(CHAINS))
def test_the_gauge_saves_the_square_of_every_bond(drawn):
    spec = spec_of(drawn)
    plain = sum(prod(shape) for shape in tensor_shapes(spec).cores)
    stored = sum(prod(shape) for shape in tensor_shapes(spec.with_gauge("interpolative")).cores)
    assert plain - stored == sum(rank * rank for rank in spec.ranks)


@quick
@given(draws(), st.sampled_from([1, 7, 64]))
def test_application_and_rows_agree_with_the_matrix(drawn, tokens):
    spec = spec_of(drawn)
    x = noise(tokens, spec.shape[1], seed=1)
    ids = torch.arange(spec.shape[0]).flip(0)
    network = decomposed(spec)
    for found in (network, network.interpolate()):
        dense = found.to_matrix()
        torch.testing.assert_close(found.apply(x), x @ dense.mT)
        torch.testing.assert_close(found.rows(ids), dense[ids])
        assert found.flops(tokens) > 0


@quick
@given(draws())
def test_shapes_are_known_before_any_tensor(drawn):
    spec = spec_of(drawn)
    network = decomposed(spec)
    for found in (network, network.interpolate()):
        assert found.spec.ranks == spec.ranks
        cores = tuple(tuple(core.shape) for core in found.cores)
        indices = tuple(tuple(index.shape) for index in found.indices)
        assert tensor_shapes(found.spec) == TensorShapes(cores, indices)
        assert NetworkSpec.from_json(found.spec.to_json()) == found.spec
        again = build(found.spec, list(found.cores), list(found.indices))
        assert torch.equal(again.to_matrix(), found.to_matrix())


@quick
@given(draws(), st.integers(0, 3))
def test_clamping_is_idempotent_and_within_the_maximum(drawn, extra):
    spec = spec_of(drawn)
    kind = NETWORKS[spec.format]
    clamped = kind.clamp(spec.with_ranks([rank + extra for rank in spec.ranks]))
    assert kind.clamp(clamped) == clamped
    assert all(a <= b for a, b in zip(clamped.ranks, kind.max_ranks(spec), strict=True))
    assert all(a >= b for a, b in zip(clamped.ranks, spec.ranks, strict=True))


@quick
@given(draws())
def test_error_is_bounded_by_the_tails_of_the_cut_spectra(drawn):
    spec = unpadded(spec_of(drawn))
    matrix = noise(*spec.shape)
    spectra = NETWORKS[spec.format].cut_spectra(matrix, spec)
    assert len(spectra) == len(spec.ranks)
    tails = [float(s[r:].square().sum()) for s, r in zip(spectra, spec.ranks, strict=True)]
    error = float((decomposed(spec).to_matrix() - matrix).square().sum())
    assert max(tails, default=0.0) - 1e-12 <= error <= sum(tails) + 1e-12


@quick
@given(draws(CHAINS))
def test_bond_spectra_are_cut_spectra_of_what_the_network_is(drawn):
    spec = unpadded(spec_of(drawn))
    network = decomposed(spec).interpolate()
    expected = NETWORKS[spec.format].cut_spectra(network.to_matrix(), spec)
    for k, s in enumerate(expected):
        found = network.bond_spectrum(k)
        torch.testing.assert_close(found, s[: len(found)], rtol=1e-6, atol=1e-6)
        assert network.entropy(k) >= 0.0


@quick
@given(draws(), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([0.5, 0.05]))
def test_rounding_keeps_its_tolerance(drawn, dtype, rtol):
    spec = spec_of(drawn)
    matrix = noise(*spec.shape).to(dtype)
    network = NETWORKS[spec.format].decompose(matrix, full(spec))
    rounded = network.round(rtol=rtol)
    assert rounded.cores[0].dtype == dtype
    assert (rounded.to_matrix() - matrix).norm() <= rtol * matrix.norm() * (1 + 1e-5)


@pytest.mark.parametrize("name", ["mpo", "kron", "tree"])
@pytest.mark.parametrize("shape", [(97, 131), (576, 192)])
def test_default_modes_fit_every_paired_format(name, shape):
    spec = NetworkSpec(name, shape, modes=default_modes(shape, 2))
    kind = NETWORKS[name]
    chosen = kind.clamp(spec.with_ranks([4] * len(kind.max_ranks(spec))))
    assert kind.decompose(noise(*shape), chosen).to_matrix().shape == shape


def test_registries_are_keyed_by_name():
    assert {name: kind.name for name, kind in (NETWORKS | JOINTS).items()} == {
        name: name for name in (*NETWORKS, *JOINTS)
    }
    assert list(NETWORKS) == ["lowrank", "mpo", "tucker", "tree", "kron", "panels", "sparse"]
    inner = ["joint_channels", "joint_value_output", "joint_query_key"]
    assert list(JOINTS) == ["joint_tree", "joint_tucker", *inner]
    with pytest.raises(UsageError, match="no such tensor network"):
        tensor_shapes(NetworkSpec("monarch", (2, 2)))
