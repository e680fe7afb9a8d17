"""Measured losses on the tiny Llama: a group has the KL of the whole model; resumable."""

from __future__ import annotations

import pytest
import torch

from qll.calibrate import collect
from qll.convert import Trial, load_plan, make_plan
from qll.convert.candidates import Candidate
from qll.convert.fit import dense_members, fit
from qll.convert.sensitivity import Probe, depth_ranges, kind_of, measure
from qll.convert.weights import metrics_of, read_weights
from qll.errors import ForeignRunError, UsageError
from qll.load import open_source
from qll.model import load_dense
from qll.options import ConvertOptions
from tests.conftest import VOCAB

OPTIONS = ConvertOptions(keep=0.5, losses="measured")
WINDOWS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def source(tiny_hf_folder):
    return open_source(tiny_hf_folder)


@pytest.fixture(scope="module")
def moments(source, tmp_path_factory):
    windows = torch.randint(0, VOCAB, (4, 64), generator=torch.Generator().manual_seed(0))
    return collect(source, windows, tmp_path_factory.mktemp("moments"), gradients=True)


@pytest.fixture(scope="module")
def chosen(source, moments):
    plan = make_plan(source, moments, ConvertOptions(keep=0.5))
    blocks = [entry for entry in plan.entries if entry.unit.block is not None]
    return [Candidate(e.unit, e.spec, e.params, e.loss) for e in blocks]


def divergence(dense, changed) -> float:
    with torch.no_grad():
        one, other = (model(WINDOWS).logits.log_softmax(-1) for model in (dense, changed))
    return float((one.exp() * (one - other)).sum(-1).mean())


def test_every_group_has_the_divergence_of_the_whole_model(source, moments, chosen, tmp_path):
    lines = measure(source, moments, OPTIONS, chosen, Trial(WINDOWS, tmp_path))
    lossy = [item for item in chosen if item.spec is not None]
    assert {(line.kind, line.first) for line in lines} == {
        (kind_of(item), item.unit.block) for item in lossy
    }
    dense = load_dense(source)
    for line in lines:
        changed = load_dense(source)
        items = [i for i in lossy if (kind_of(i), i.unit.block) == (line.kind, line.first)]
        for item in items:
            weights = read_weights(source, item.unit.members, OPTIONS)
            metrics = metrics_of(source, moments, item.unit.members, OPTIONS)
            network = fit(weights, item.spec, metrics, torch.float32, OPTIONS.sweeps).network
            for member, matrix in zip(item.unit.members, dense_members(network), strict=True):
                changed.get_submodule(member).weight.data = matrix
        assert line.predicted == pytest.approx(sum(item.loss for item in items))
        assert line.measured == pytest.approx(divergence(dense, changed), rel=2e-3, abs=1e-6)


def test_a_resumed_measurement_does_only_what_is_missing(
    source, moments, chosen, tmp_path, monkeypatch
):
    trial = Trial(WINDOWS, tmp_path)
    lines = measure(source, moments, OPTIONS, chosen, trial)
    (tmp_path / "depth.01.safetensors").unlink()
    done, real = [], Probe.divergences
    monkeypatch.setattr(Probe, "divergences", lambda *args: done.append(args[2]) or real(*args))
    assert measure(source, moments, OPTIONS, chosen, trial) == lines
    assert done == [range(1, 2)]
    monkeypatch.setattr(Probe, "run_dense", None)
    assert measure(source, moments, OPTIONS, chosen, trial) == lines
    with pytest.raises(ForeignRunError):
        measure(source, moments, OPTIONS, chosen, Trial(WINDOWS + 1, tmp_path))


def test_the_plan_minimises_and_names_what_was_measured(source, moments, tmp_path):
    plan = make_plan(source, moments, OPTIONS, Trial(WINDOWS, tmp_path / "trial"))
    predicted = make_plan(source, moments, ConvertOptions(keep=0.5))
    assert plan.block_params <= plan.budget == predicted.budget
    assert plan.measured
    assert not predicted.measured
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    with pytest.raises(UsageError, match="needs text to measure losses on"):
        make_plan(source, moments, OPTIONS)


def test_what_the_measurement_finds_dear_gets_more_parameters(
    source, moments, tmp_path, monkeypatch
):
    def dear(self, groups, blocks):
        return {kind: torch.full((4,), 100.0 if "down_proj" in kind else 1e-4) for kind in groups}

    monkeypatch.setattr(Probe, "divergences", dear)
    kept = {}
    for losses in ("predicted", "measured"):
        options = ConvertOptions(keep=0.5, losses=losses, sharing="none")
        plan = make_plan(source, moments, options, Trial(WINDOWS, tmp_path))
        kept[losses] = sum(e.params for e in plan.entries if "down_proj" in e.unit.name)
    assert kept["measured"] > kept["predicted"]


@pytest.mark.parametrize("layers", [1, 2, 6, 7, 30, 80])
def test_depths_cover_the_blocks_once(layers):
    ranges = depth_ranges(layers)
    assert [block for blocks in ranges for block in blocks] == list(range(layers))
    assert len(ranges) == min(6, layers)
