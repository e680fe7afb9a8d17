"""The modules: small state, gradients, copies, meta device, compilation, shared projections."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from qll.model import TNEmbedding, TNGroup, TNLinear, TNMember, TNTiedHead, group_path
from qll.tn import JOINTS, NETWORKS
from qll.tn.network import NetworkSpec
from tests.unit.model.conftest import lowrank, star

GAUGES = ("none", "interpolative")


def network(spec, seed=0, dtype=torch.float32):
    """A network of `spec` from a random matrix (or matrices)."""
    generator = torch.Generator().manual_seed(seed)
    plain = spec.with_gauge("none")
    if spec.members:
        matrices = [torch.randn(shape, generator=generator).to(dtype) for shape in spec.members]
        made = JOINTS[spec.format].decompose(matrices, plain)
    else:
        matrix = torch.randn(spec.shape, generator=generator).to(dtype)
        made = NETWORKS[spec.format].decompose(matrix, plain)
    return made.interpolate() if spec.gauge == "interpolative" else made


@pytest.mark.parametrize("gauge", GAUGES)
def test_linear_is_its_weight(gauge):
    layer = TNLinear.from_network(network(lowrank((12, 10), 4, gauge)))
    x = torch.randn(3, 5, 10)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)
    assert (layer.in_features, layer.out_features, layer.bias) == (10, 12, None)
    expected = 4 * 22 - (16 if gauge == "interpolative" else 0)
    assert sum(p.numel() for p in layer.parameters()) == expected
    assert set(layer.state_dict()) == {"cores.0", "cores.1"} | (
        {"indices.0"} if gauge == "interpolative" else set()
    )


def test_weight_is_read_only():
    layer = TNLinear.from_network(network(lowrank((12, 10), 4)))
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = torch.zeros(12, 10)
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = torch.nn.Parameter(torch.zeros(12, 10))


@pytest.mark.parametrize("gauge", GAUGES)
def test_gradients_reach_the_cores(gauge):
    layer = TNLinear.from_network(network(lowrank((6, 5), 3, gauge), dtype=torch.float64))
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def function(x, *cores):
        named = {f"cores.{i}": core for i, core in enumerate(cores)}
        return torch.func.functional_call(layer, named, (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_unloaded_cores_show():
    assert TNLinear(lowrank((6, 5), 3))(torch.ones(1, 5)).isnan().any()


def test_meta_device_then_load():
    made = TNLinear.from_network(network(lowrank((12, 10), 4)))
    empty = TNLinear(lowrank((12, 10), 4), device="meta", dtype=torch.float32)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(empty.weight, made.weight)


def test_copies_are_independent():
    layer = TNLinear.from_network(network(lowrank((12, 10), 4)))
    x = torch.randn(2, 10)
    before = layer(x)
    copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(copied(x), before)
    assert torch.equal(pickled(x), before)


def test_pivots_loaded_in_place_are_used():
    """Anything derived from the pivots must be derived again when they change."""
    first = TNLinear.from_network(network(lowrank((12, 10), 4), seed=1))
    second = TNLinear.from_network(network(lowrank((12, 10), 4), seed=2))
    x = torch.randn(2, 10)
    first(x)
    assert not torch.equal(first.indices.get_buffer("0"), second.indices.get_buffer("0"))
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("gauge", GAUGES)
def test_embedding_looks_up_rows_without_the_table(gauge, monkeypatch):
    table = TNEmbedding.from_network(network(lowrank((40, 10), 4, gauge)))
    ids = torch.tensor([[3, 39, 3], [0, 17, 8]])
    expected = table.weight[ids]
    monkeypatch.setattr(NETWORKS["lowrank"], "to_matrix", lambda network: 1 / 0)
    torch.testing.assert_close(table(ids), expected)


def test_tied_head_owns_nothing():
    table = TNEmbedding.from_network(network(lowrank((40, 10), 4)))
    head = TNTiedHead(table)
    assert not head.state_dict()
    assert not list(head.children())
    x = torch.randn(2, 3, 10)
    torch.testing.assert_close(head(x), x @ table.weight.T)
    both = copy.deepcopy(torch.nn.ModuleList([table, head]))
    assert both[1].embedding is both[0]


SHAPES = ((8, 10), (4, 10), (4, 10))


def group_of(gauge="interpolative", readers=3):
    """(group, members) as in self_attn."""
    group = TNGroup.from_network(network(star(SHAPES, 6, gauge)))
    return group, [TNMember(group, k, readers) for k in range(3)]


class Counted:
    """How often the shared projection was computed."""

    def __init__(self, monkeypatch):
        self.calls = 0
        original = JOINTS["joint_tree"].project

        def project(network, x):
            self.calls += 1
            return original(network, x)

        monkeypatch.setattr(JOINTS["joint_tree"], "project", project)


@pytest.mark.parametrize("gauge", GAUGES)
def test_members_are_their_matrices_and_share_the_projection(gauge, monkeypatch):
    group, members = group_of(gauge)
    x = torch.randn(2, 3, 10)
    expected = [x @ member.weight.T for member in members]
    counted = Counted(monkeypatch)
    for member, out in zip(members, expected, strict=True):
        torch.testing.assert_close(member(x), out)
        assert not member.state_dict()
    assert counted.calls == 1
    assert group._memo is None, "nothing is kept after the last reader"
    assert [(m.out_features, m.in_features) for m in members] == list(SHAPES)


def test_projection_is_not_reused_for_another_state(monkeypatch):
    group, (query, key, _) = group_of()
    x = torch.randn(3, 10)
    counted = Counted(monkeypatch)
    query(x)
    x += 1.0
    torch.testing.assert_close(key(x), x @ key.weight.T)
    query(x.clone())
    with torch.no_grad():
        group.cores[0].mul_(2.0)
    torch.testing.assert_close(key(x), x @ key.weight.T)
    query(x)
    with torch.no_grad():
        assert not key(x).requires_grad
    assert counted.calls == 5, "all but the second `query` had to compute"


def test_same_input_in_two_training_steps():
    _, members = group_of()
    group = members[0].group
    x = torch.randn(3, 10)
    optimiser = torch.optim.SGD(group.parameters(), lr=0.003)
    losses = []
    for _ in range(3):
        loss = sum(member(x).square().mean() for member in members)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_inference_mode_and_a_lone_reader():
    _, members = group_of()
    with torch.inference_mode():
        x = torch.randn(3, 10)
        torch.testing.assert_close(members[1](x), x @ members[1].weight.T)
    _, lone = group_of(readers=1)
    lone[0](torch.randn(3, 10))
    assert lone[0].group._memo is None


def test_group_survives_copies_mid_pass():
    group, members = group_of()
    x = torch.randn(3, 10)
    members[0](x)
    assert group._memo is not None
    for twin in (copy.deepcopy(group), pickle.loads(pickle.dumps(group))):
        assert twin._memo is None
        torch.testing.assert_close(twin(x, 1), members[1](x))


def test_group_names():
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    assert group_path(attention[:3]) == "model.layers.0.self_attn.qkv"
    assert group_path(attention) == "model.layers.0.self_attn.qkvo"
    with pytest.raises(KeyError):
        group_path(attention[1:3])
    with pytest.raises(KeyError):
        group_path([attention[0], "model.layers.1.self_attn.k_proj", attention[2]])


FORMATS = {
    "mpo": {"ranks": (3, 3), "modes": {"out": (2, 3, 2), "in": (2, 2, 3)}},
    "kron": {"ranks": (3,), "modes": {"out": (4, 3), "in": (3, 4)}},
}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_runs_in_a_linear(format):
    spec = NetworkSpec(format, (12, 12), **FORMATS[format])
    layer = TNLinear.from_network(network(NETWORKS[format].clamp(spec)))
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(layer(x), x @ layer.weight.T, atol=1e-5, rtol=1e-4)
    table = TNEmbedding.from_network(layer.network())
    ids = torch.tensor([[11, 0, 5]])
    torch.testing.assert_close(table(ids), layer.weight[ids], atol=1e-5, rtol=1e-4)
