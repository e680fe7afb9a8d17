"""Weight-only survival against matrices written out, for formats that drop or mix channels too."""

from __future__ import annotations

import copy

import pytest
import torch

from qll.convert.candidates import format_of
from qll.convert.fit import fit
from qll.convert.metric import plain
from qll.convert.units import group_unit, single_units, template
from qll.lens.read_write import STEP_OF, Crossing, answers, crossings, weight_survival
from qll.model import TNGroup, TNLinear, group_path, insert_networks

QKV = "model.layers.0.self_attn."


def converted(dense, units, shrink):
    """A copy of `dense` with networks for (unit, format), ranks `shrink` of the exact ones."""
    model = copy.deepcopy(dense)
    for unit, format in units:
        spec = template(unit, format, "interpolative", 3, dense.config)
        most = format_of(spec).max_ranks(spec)
        spec = spec.with_ranks([max(1, int(shrink * rank)) for rank in most])
        spec = format_of(spec).clamp(spec)
        weights = [dense.get_submodule(member).weight.detach() for member in unit.members]
        network = fit(weights, spec, [plain() for _ in weights], torch.float32).network
        insert_networks(model, {unit.members: network.spec})
        if len(unit.members) > 1:
            made, path = TNGroup.from_network(network), group_path(unit.members)
            model.get_submodule(path).load_state_dict(made.state_dict(), assign=True)
        else:
            model.set_submodule(unit.members[0], TNLinear.from_network(network))
    return model


@pytest.fixture(scope="module")
def units(tiny_llama):
    """Block 0 with fewer inner channels, block 1 with a shared bond, low rank, MPO and tree."""
    config = tiny_llama.config
    joint = {"joint_query_key": "query_key", "joint_value_output": "value_output",
             "joint_channels": "gate_up_down"}  # fmt: skip
    found = [(group_unit(config, 0, name), format) for format, name in joint.items()]
    found.append((group_unit(config, 1, "qkv"), "joint_tree"))
    formats = {"o_proj": "lowrank", "gate_proj": "mpo", "up_proj": "tree", "down_proj": "lowrank"}
    for unit in single_units(config, 1):
        if format := formats.get(unit.members[0].rpartition(".")[2]):
            found.append((unit, format))
    return found


@pytest.fixture(scope="module")
def lossy(tiny_llama, units):
    return converted(tiny_llama, units, 0.6)


@pytest.fixture(scope="module")
def directions():
    return torch.randn(20, 64, generator=torch.Generator().manual_seed(3))


def test_full_rank_loses_nothing(tiny_llama, units, directions):
    exact = converted(tiny_llama, units, 1)
    every = crossings("layers.0", 2, reach=2) + crossings("embed_tokens", 2, reach=1)
    every += crossings("layers.1", 2, reach=2)
    assert len({found.matrix for found in every}) == 14
    for crossing in every:
        rho = weight_survival(tiny_llama, exact, crossing, directions)
        torch.testing.assert_close(rho, torch.ones_like(rho), rtol=0, atol=1e-6, msg=str(crossing))


@pytest.mark.parametrize("block", [0, 1])
def test_against_matrices_written_out(tiny_llama, lossy, directions, block):
    crossing_of = {found.matrix: found for place in ("embed_tokens", "layers.0", "layers.1")
                   for found in crossings(place, 2, reach=2)}  # fmt: skip
    for name in STEP_OF:
        path = f"model.layers.{block}.{name}"
        if block == 0 and name.endswith(("v_proj", "o_proj")):
            continue
        crossing = crossing_of[path]
        before, after = (model.get_submodule(path).weight for model in (tiny_llama, lossy))
        norm = "post_attention_layernorm" if "mlp" in path else "input_layernorm"
        gain = tiny_llama.get_parameter(f"model.layers.{block}.{norm}.weight")
        if crossing.side == "read":
            change, whole = (
                (w @ (gain * directions).T).square().sum(0) for w in (after - before, before)
            )
        else:
            change, whole = ((w.T @ directions.T).square().sum(0) for w in (after - before, before))
        rho = weight_survival(tiny_llama, lossy, crossing, directions)
        assert float(rho.max()) < 0.9999, path
        torch.testing.assert_close(
            rho, (1 - change / whole).detach().double(), rtol=1e-4, atol=1e-4
        )


def test_value_and_output_are_compared_as_a_pair(tiny_llama, lossy, directions):
    gain = tiny_llama.get_parameter("model.layers.0.input_layernorm.weight")
    products = []
    for model in (tiny_llama, lossy):
        value = model.get_submodule(QKV + "v_proj").weight.unflatten(0, (2, 16))
        output = model.get_submodule(QKV + "o_proj").weight.unflatten(1, (4, 16))
        products.append([output[:, head] @ value[head // 2] for head in range(4)])
    for side, seen in (("read", gain * directions), ("write", directions)):
        crossing = Crossing(QKV + ("v_proj" if side == "read" else "o_proj"), side)
        turned = [[w if side == "read" else w.T for w in four] for four in products]
        before, after = (torch.cat([seen @ w.T for w in four], 1) for four in turned)
        expected = 1 - (after - before).square().sum(1) / before.square().sum(1)
        rho = weight_survival(tiny_llama, lossy, crossing, directions)
        torch.testing.assert_close(rho, expected.detach().double(), rtol=1e-4, atol=1e-4)
        assert 0 < float(rho.mean()) < 1


def test_each_model_uses_its_own_gains(tiny_llama, directions):
    model, crossing = copy.deepcopy(tiny_llama), Crossing("model.layers.1.mlp.up_proj", "read")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight *= 2
    rho = weight_survival(tiny_llama, model, crossing, directions)
    torch.testing.assert_close(rho, torch.zeros_like(rho), rtol=0, atol=1e-6)
    assert weight_survival(model, model, crossing, directions * 0).isnan().all()


def test_which_matrices_stand_around_a_place(caplog):
    def names(place, reach=1):
        return {(c.matrix.split(".", 2)[2], c.side) for c in crossings(place, 3, reach)}

    readers = {f"1.{path}" for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                        "mlp.gate_proj", "mlp.up_proj")}  # fmt: skip
    writers = {("0.self_attn.o_proj", "write"), ("0.mlp.down_proj", "write")}
    assert names("layers.0") == {(name, "read") for name in readers} | writers
    assert names("layers.2") == {("2.self_attn.o_proj", "write"), ("2.mlp.down_proj", "write")}
    assert names("layers.0.self_attn") == {
        ("0.self_attn.o_proj", "write"),
        *{(f"0.mlp.{name}", "read") for name in ("gate_proj", "up_proj")},
        *{(f"1.self_attn.{name}", "read") for name in ("q_proj", "k_proj", "v_proj")},
    }
    assert names("layers.1.mlp.down_proj.input") == {("1.mlp.down_proj", "read")}
    assert not caplog.text
    assert names("layers.1.mlp.input") == set()
    assert "layers.1.mlp.input" in caplog.text


def test_answers_of_a_reader_hold_the_gain(tiny_llama, directions):
    found = answers(tiny_llama, Crossing("model.layers.0.self_attn.k_proj", "read"), directions)
    layer = tiny_llama.model.layers[0]
    expected = layer.self_attn.k_proj(layer.input_layernorm.weight * directions)
    torch.testing.assert_close(found, expected.detach())
