"""report.json: what is missing or wrong is named, what is not a number becomes null."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from qll.errors import ReportError
from qll.report import build_report, check_report
from qll.report.build import EACH, OPTIONAL, SCHEMA

GOLDEN = Path(__file__).parents[2] / "golden"


def rebuild(report: dict, **changes):
    parts = {
        key: report[key]
        for key in ("model", "compression", "entropy", "quality", "sae", "cost", "provenance")
    }
    return build_report(**{**parts, "warnings": report["warnings"], **changes})


def paths(schema, prefix=()):
    """Every place of the schema as a path of keys; lists and EACH step into their first item."""
    if isinstance(schema, dict):
        for key, inner in schema.items():
            yield from paths(inner, (*prefix, key))
    elif isinstance(schema, list):
        yield prefix
        yield from paths(schema[0], (*prefix, 0))
    else:
        yield prefix


def step(value, key):
    if key is EACH:
        return next(iter(value.values()))
    return value[key.removesuffix(OPTIONAL) if isinstance(key, str) else key]


NAMED = [path for path in paths(SCHEMA) if isinstance(path[-1], str) and path[-1] is not EACH]
REQUIRED = [path for path in NAMED if not path[-1].endswith(OPTIONAL)]


def test_the_golden_sample_is_what_its_maker_makes(sample):
    spec = importlib.util.spec_from_file_location("maker", GOLDEN / "make_report_sample.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert json.loads(json.dumps(maker.make())) == sample


def test_a_report_rebuilt_from_its_parts_is_the_same(sample):
    assert rebuild(sample) == sample


@pytest.mark.parametrize("path", REQUIRED, ids=lambda path: ".".join(map(str, path)))
def test_every_required_key_is_missed(small, path):
    holder = small
    for key in path[:-1]:
        holder = step(holder, key)
    del holder[path[-1]]
    with pytest.raises(ReportError, match=f"key is missing .expected '{path[-1]}'"):
        check_report(small)


@pytest.mark.parametrize("path", NAMED, ids=lambda path: ".".join(map(str, path)))
def test_every_wrong_kind_of_value_is_named(small, path):
    holder = small
    for key in path[:-1]:
        holder = step(holder, key)
    holder[path[-1].removesuffix(OPTIONAL)] = object()
    with pytest.raises(ReportError, match="wrong kind of value"):
        check_report(small)


def test_true_is_not_a_number(small):
    small["compression"]["keep"] = True
    with pytest.raises(ReportError, match=r"report.compression.keep: .* found bool"):
        check_report(small)


def test_a_report_of_another_version_is_refused(small):
    small["schema_version"] = 99
    with pytest.raises(ReportError, match="found 99"):
        check_report(small)


def test_what_is_not_finite_becomes_null_with_a_warning(small):
    quality = copy.deepcopy(small["quality"])
    quality["texts"]["python_source"]["converted"]["ppl"] = float("inf")
    report = rebuild(small, quality=quality, warnings=["first"])
    assert report["quality"]["texts"]["python_source"]["converted"]["ppl"] is None
    assert report["warnings"][0] == "first"
    assert "python_source.converted.ppl is not a finite number" in report["warnings"][1]
    json.dumps(report, allow_nan=False)


def test_tensors_paths_and_tuples_become_plain_data(small):
    provenance = {"loss": torch.tensor(1.5), "out": Path("runs/demo"), "modes": (8, 9)}
    report = rebuild(small, provenance=provenance)
    assert report["provenance"] == {"loss": 1.5, "out": "runs/demo", "modes": [8, 9]}


def test_what_is_not_data_is_refused_with_its_place(small):
    with pytest.raises(ReportError, match=r"report.provenance.weights: not JSON data"):
        rebuild(small, provenance={"weights": torch.zeros(3)})


def test_without_saes_there_is_an_empty_section(small):
    assert rebuild(small, sae=None)["sae"] == {"layers": {}}
