"""What the page shows: places, order, bars, colours, from the report's own numbers."""

from __future__ import annotations

import pytest

from qll.report import units
from qll.report.matrices import place
from qll.report.view import pair, view


def test_names_are_placed_by_block_and_kind():
    assert place("model.layers.3.mlp.gate_up") == (3, "mlp.gate_up")
    assert place("layers.3.mlp.up_proj") == (3, "mlp.up_proj")
    assert place("model.layers.99999999999999.mlp.up_proj")[0] is None
    assert place("lm_head.weight") == (None, "lm_head")


def test_map_has_a_cell_per_matrix_in_a_block(sample):
    shown = view(sample)
    cells = shown["map"]["cells"]
    assert len(cells) == 210
    assert len({(cell["column"], cell["row"]) for cell in cells}) == 210
    assert [kind.rsplit(".")[-1] for kind in shown["map"]["kinds"]] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    outside = [shown["matrices"][number]["name"] for number in shown["map"]["outside"]]
    assert outside == ["model.embed_tokens"]


def test_joint_groups_get_their_own_row(small):
    group = dict(small["compression"]["per_matrix"][0], name="model.layers.1.self_attn.qkv")
    small["compression"]["per_matrix"].append(group)
    kinds = view(small)["map"]["kinds"]
    assert kinds.index("self_attn.v_proj") < kinds.index("self_attn.qkv")
    assert kinds.index("self_attn.qkv") < kinds.index("self_attn.o_proj")


def test_colour_grows_with_the_value_and_ends_are_the_scale(sample):
    for metric in view(sample)["metrics"]:
        shades = [shade for shade in metric["shade"][:210] if shade is not None]
        assert min(shades) == 0
        assert max(shades) == 1
    kept = next(metric for metric in view(sample)["metrics"] if metric["key"] == "kept")
    rows = sample["compression"]["per_matrix"][:210]
    shares = [row["params"] / row["params_dense"] for row in rows]
    order = sorted(range(210), key=shares.__getitem__)
    shades = [kept["shade"][number] for number in order]
    assert shades == sorted(shades)


def test_one_outlier_does_not_flatten_the_scale(sample):
    sample["compression"]["per_matrix"][5]["rel_error"] = 1000.0
    errors = next(m for m in view(sample)["metrics"] if m["key"] == "rel_error")
    assert errors["high"].startswith("\u2265")
    assert sum(shade is not None and shade > 0.5 for shade in errors["shade"]) > 5


def test_values_that_were_not_measured_are_not_invented(small):
    for row in small["compression"]["per_matrix"]:
        row["metric_error"] = None
    small["cost"]["decode_tokens_per_second"] = {"dense": None, "converted": None}
    del small["cost"]["runtime"]
    shown = view(small)
    assert "metric_error" not in {metric["key"] for metric in shown["metrics"]}
    assert not any(item["label"].startswith("decode") for item in shown["pairs"])


def test_a_pair_scales_its_bars_to_the_larger_value():
    item = pair("ppl", 10.0, 40.0, units.number)
    assert [bar["length"] for bar in item["bars"]] == [25.0, 100.0]
    assert item["ratio"] == "\u00d74.00"
    unknown = pair("ppl", 10.0, None, units.number)
    assert unknown["bars"][1]["text"] == unknown["ratio"] == "n/a"


def test_stages_add_up(sample):
    stages = view(sample)["stages"]
    assert sum(stage["share"] for stage in stages["stages"]) == pytest.approx(100)
    assert stages["total"] == "4 min 7 s"


@pytest.mark.parametrize(
    ("value", "text"),
    [(9.9994, "9.999"), (0.0, "0"), (-0.25, "-0.2500"), (123456.7, "123,457"), (None, "n/a")],
)
def test_numbers(value, text):
    assert units.number(value) == text


def test_shape_is_taken_from_the_spectrum_when_the_row_has_none(small):
    del small["compression"]["per_matrix"][0]["shape"]
    facts = dict(view(small)["data"]["matrices"][0]["facts"])
    assert facts["shape, out\u00d7in"] == "576\u00d7576"


def test_provenance_unfolds_groups_into_rows(small):
    small["provenance"] = {"settings": {"seed": 0, "texts": {"context": 128, "calib": None}}}
    rows = dict(view(small)["provenance"])
    assert rows["settings"] == "seed 0"
    assert rows["settings texts"] == "context 128, calib -"
