"""Gauge freedoms: the same function, moments that turn along, and what they change for networks."""

from __future__ import annotations

import pytest
import torch

from qll.calibrate import collect
from qll.convert.disentangle import FREEDOMS, TURNED, BlockGauge, choose_gauge
from qll.convert.fit import fit
from qll.convert.gauged import disentangled
from qll.convert.metric import Metric, metric_of
from qll.load import Source, open_source
from qll.model import build_block, load_dense, run_block
from qll.options import ConvertOptions
from qll.tn.network import NetworkSpec

IDS = torch.randint(0, 512, (4, 48), generator=torch.Generator().manual_seed(0))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def source(tiny_hf_folder):
    return open_source(tiny_hf_folder)


@pytest.fixture(scope="module")
def moments(source, tmp_path_factory):
    return collect(source, IDS, tmp_path_factory.mktemp("moments"), gradients=True)


@pytest.fixture(scope="module")
def pair(source, moments, tmp_path_factory):
    """Source and moments with every freedom used."""
    path = tmp_path_factory.mktemp("gauge") / "work" / "gauges.safetensors"
    return disentangled(source, moments, ConvertOptions(disentangle="all"), path)


def logits(source: Source) -> torch.Tensor:
    with torch.no_grad():
        return load_dense(source)(input_ids=IDS).logits


@pytest.mark.parametrize("freedom", FREEDOMS)
def test_each_freedom_turns_its_matrices_and_keeps_the_function(freedom, source, tmp_path):
    options = ConvertOptions(disentangle=freedom, metric="plain")
    gauged, _ = disentangled(source, None, options, tmp_path / "gauges.safetensors")
    assert isinstance(gauged, Source)
    for linear, (_, turning) in TURNED.items():
        name = f"model.layers.1.{linear}.weight"
        changed = (gauged.read(name) - source.read(name)).norm() / source.read(name).norm()
        assert (changed > 0.1) == (freedom == turning)
        assert torch.equal(gauged.read(name, rows=slice(3, 9)), gauged.read(name)[3:9])
    torch.testing.assert_close(logits(gauged), logits(source), atol=1e-5, rtol=0)


def test_a_block_of_the_embedded_model_is_the_same_to_single_precision():
    source = open_source()
    members = {linear: source.read(f"model.layers.15.{linear}.weight") for linear in TURNED}
    weights = {linear: weight.double() for linear, weight in members.items()}
    gauge = choose_gauge(weights, dict.fromkeys(TURNED, Metric("plain")), source.config.head_dim)
    block, hidden = build_block(source, 15), noise(1, 24, source.config.hidden_size).float()
    before = run_block(block, hidden)
    for linear, weight in weights.items():
        turned = gauge.weight(linear, weight).float()
        assert not torch.allclose(turned, members[linear], atol=1e-3)
        block.get_submodule(linear).weight.data = turned
    after = run_block(block, hidden)
    assert (after - before).norm() < 1e-5 * before.norm()


def test_moments_are_those_of_the_turned_model(pair, tmp_path):
    gauged, turned = pair
    measured = collect(gauged, IDS, tmp_path / "again", gradients=True)
    for linear in TURNED:
        path = f"model.layers.1.{linear}"
        for found in (turned.linear(path), turned.block(1)[path]):
            wanted = measured.linear(path)
            for name in ("input", "grad"):
                size = float(getattr(wanted, name).norm())
                gap = float((getattr(found, name) - getattr(wanted, name)).norm())
                assert gap < 1e-4 * size, (linear, name)


def test_the_basis_is_kept_in_its_file(pair, source, moments, tmp_path):
    options, path = ConvertOptions(disentangle="all"), tmp_path / "gauges.safetensors"
    first, _ = disentangled(source, moments, options, path)
    before = path.read_bytes()
    again, _ = disentangled(source, moments, options, path)
    assert path.read_bytes() == before
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(first.read(name), again.read(name))
    assert torch.equal(first.read(name), pair[0].read(name))


@pytest.mark.parametrize("linear", sorted(TURNED))
def test_low_rank_does_not_see_a_gauge_and_kronecker_sums_do(linear, source, moments, pair):
    path = f"model.layers.0.{linear}"
    shape = tuple(source.read(f"{path}.weight").shape)
    modes = {"out": (8, shape[0] // 8), "in": (shape[1] // 8, 8)}
    errors = {}
    for format in ("lowrank", "kron"):
        spec = NetworkSpec(format, shape, (9,), modes if format == "kron" else {})
        errors[format] = []
        for place, store in ((source, moments), pair):
            metric = metric_of(store.linear(path), "kfac")
            weight = place.read(f"{path}.weight")
            errors[format] += fit([weight], spec, [metric], torch.float64).metric_error
    assert errors["lowrank"][1] == pytest.approx(errors["lowrank"][0], rel=1e-4)
    assert errors["kron"][1] != pytest.approx(errors["kron"][0], rel=1e-4)


def test_shuffled_channels_of_a_kronecker_product_are_put_in_order():
    """Rows of falling size, shuffled: the order brings back a product of one term."""
    first = torch.logspace(0, -4, 8, dtype=torch.float64)[:, None] * noise(8, 1).sign()
    second = torch.tensor([1.9, 1.6, 1.3, 1.1])[:, None].double() * torch.nn.functional.normalize(
        noise(4, 6, seed=1)
    )
    planted = torch.kron(first, second)
    shuffle = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    zero = torch.zeros(32, 6, dtype=torch.float64)
    weights = {"mlp.gate_proj": planted[shuffle], "mlp.up_proj": zero, "mlp.down_proj": zero.T}
    gauge = choose_gauge(weights, dict.fromkeys(weights, Metric("plain")), 2, ["channels"])
    spec = NetworkSpec("kron", (32, 6), (1,), {"out": (8, 4), "in": (1, 6)})
    found = gauge.weight("mlp.gate_proj", weights["mlp.gate_proj"])
    before, after = (
        fit([matrix], spec, [Metric("plain")], torch.float64).rel_error[0]
        for matrix in (weights["mlp.gate_proj"], found)
    )
    assert after < 1e-6 < 0.1 < before


def test_principal_axes_are_orthogonal_sorted_and_stay_in_their_planes():
    d_head = 8
    shapes = {
        linear: (24, 24) if linear[-6] in "qo" else (8, 24) for linear in TURNED if "attn" in linear
    }
    weights = {linear: noise(*shape, seed=k) for k, (linear, shape) in enumerate(shapes.items())}
    gauge = choose_gauge(
        weights, dict.fromkeys(weights, Metric("plain")), d_head, ["heads", "rotary"]
    )
    for basis in (gauge.heads, gauge.rotary):
        torch.testing.assert_close(basis @ basis.mT, torch.eye(d_head).double()[None])
    values = gauge.weight("self_attn.v_proj", weights["self_attn.v_proj"])
    gram = values @ values.T
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-9, rtol=0)
    assert (gram.diagonal().diff() <= 0).all()
    half = d_head // 2
    pair = torch.eye(half).double().repeat(2, 2).bool()
    assert not gauge.rotary[:, ~pair].any()
    torch.testing.assert_close(gauge.rotary[:, half:, half:], gauge.rotary[:, :half, :half])


def test_nothing_chosen_is_nothing_changed():
    gauge, weight = BlockGauge(), noise(4, 4)
    assert all(gauge.weight(linear, weight) is weight for linear in TURNED)
    assert all(gauge.moment(linear, weight, 0) is weight for linear in TURNED)
