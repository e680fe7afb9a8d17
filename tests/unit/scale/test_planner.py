"""The planner: counts of real models, laws that any prediction obeys, the table and the flags."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from qll.cli import main
from qll.convert.units import linear_shapes
from qll.errors import UsageError
from qll.scale.draft import best_draft, speedup
from qll.scale.machines import machine_of
from qll.scale.planner import predict
from qll.scale.shapes import SHAPES, shape_of
from qll.scale.stages import Settings, calibrate, fit_matrix, rank
from qll.scale.survival import Autoencoders, predict_survival
from qll.scale.work import flops
from qll.tn import tensor_shapes
from qll.tn.network import NetworkSpec
from tests.conftest import make_tiny_llama

EIGHT = SHAPES["llama3-8b"]


def stage_of(found, name):
    """The prediction of one stage."""
    return next(stage for stage in found["stages"] if stage["name"] == name)


@pytest.mark.parametrize(
    ("name", "params"),
    [("llama3-8b", 8_030_261_248), ("llama3-70b", 70_553_706_496), ("1t", 1.0e12)],
)
def test_shapes_have_the_published_sizes(name, params):
    assert SHAPES[name].params == pytest.approx(params, rel=0 if name != "1t" else 0.02)
    assert SHAPES["llama3-405b"].params == pytest.approx(405.9e9, rel=1e-3)


def test_the_tiny_shape_is_that_of_the_tests():
    model = make_tiny_llama()
    shape = shape_of(model.config, "tiny")
    assert shape == SHAPES["tiny"]
    assert shape.params == sum(p.numel() for p in model.parameters())
    of_units = linear_shapes(model.config)
    assert list(shape.linears.values()) == list(of_units.values())


def test_forward_flops_are_those_of_the_cost_room():
    from qll.evaluate.cost import forward_flops

    model = make_tiny_llama()
    settings = Settings(metric="plain", calib_tokens=64, context=64)
    counted = forward_flops(model, 64, 64) - 2 * 64 * 64 * 512  # without the head
    passes = [item.count for item in calibrate(SHAPES["tiny"], settings) if item.size == 64]
    assert sum(passes) == counted


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_the_rank_stores_what_is_kept(keep):
    spec = NetworkSpec("lowrank", (1024, 4096), (rank(1024, 4096, keep),), gauge="interpolative")
    assert tensor_shapes(spec).num_params == pytest.approx(keep * 1024 * 4096, rel=0.005)


@pytest.mark.parametrize("width", [256, 512, 16384, 32768])
def test_work_grows_with_the_cube_of_the_width(width):
    # between these a symmetric product turns from a whole one to half of one
    settings = Settings(metric="kfac")
    small, large = (flops(fit_matrix(n, n, settings)) for n in (width, 2 * width))
    assert large == pytest.approx(8 * small, rel=0.01)


def test_more_workers_take_less_time_until_jobs_run_out():
    shape, settings = SHAPES["smollm2-135m"], Settings()
    one = predict(shape, replace(machine_of("cpu2"), cores=1), settings)
    two = predict(shape, machine_of("cpu2"), settings)
    many = predict(shape, machine_of("cluster:1000"), settings)
    assert stage_of(one, "convert")["seconds"] == pytest.approx(
        2 * stage_of(two, "convert")["seconds"]
    )
    assert stage_of(two, "plan")["seconds"] > stage_of(many, "plan")["seconds"]
    assert stage_of(many, "plan")["workers"] == shape.n_layers
    assert stage_of(many, "calibrate")["workers"] == 1


def test_workers_are_no_more_than_memory_has_room_for():
    machine = replace(machine_of("8xh100"), memory=100e9)
    found = predict(SHAPES["llama3-70b"], machine, Settings(metric="kfac"))
    convert = stage_of(found, "convert")
    held = convert["workers"] * convert["memory"]
    assert held <= 100e9 < held + convert["memory"]


def test_speculative_decoding_pays_above_its_cost():
    for cost in (0.1, 0.4, 0.8):
        assert best_draft(cost - 0.01, cost) == (0, 1.0)
        assert best_draft(cost + 0.01, cost)[1] > 1
    assert speedup(1.0, 0.5, 4) == pytest.approx(5 / 3)


def test_survival_of_an_eight_billion_model_fits_a_small_machine():
    found = predict_survival(EIGHT, machine_of("cpu2"), Autoencoders(places=31))
    assert found["memory"] < 4e9
    assert found["disk"] == 31 * found["file_bytes"]


def test_the_verb_prints_a_table_and_json(capsys, tmp_path):
    assert main(["plan", "--shape", "llama3-8b", "--keep", "0.6", "--machine", "cluster:64"]) == 0
    table = capsys.readouterr().out
    for word in ("8.03 G parameters", "64 nodes", "calibrate", "convert", "disk", "network"):
        assert word in table
    assert main(["plan", "--machine=h100", "--json"]) == 0  # the embedded model
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["params"] == SHAPES["smollm2-135m"].params
    (tmp_path / "config.json").write_text(json.dumps(small_config().to_dict()))
    assert main(["plan", "--machine", "cpu2", "--llama_dir", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == tmp_path.name


def test_wrong_names_are_refused(capsys):
    assert main(["plan", "--shape", "llama3-8b", "--machine", "cluster:none"]) == 2
    assert "cluster:N" in capsys.readouterr().err
    assert main(["plan", "--shape", "llama3-8b", "--llama_dir", "x"]) == 2
    with pytest.raises(UsageError):
        machine_of("abacus")


def small_config() -> LlamaConfig:
    """A config without weights."""
    return make_tiny_llama().config
