"""Low rank plus single entries: those that matter are found, counted, and worth their price."""

from __future__ import annotations

import pytest
import torch

from qll.convert import convert_units, make_plan
from qll.convert.candidates import ladder
from qll.convert.fit import fit, spectra
from qll.convert.metric import Metric, plain
from qll.convert.outliers import outlier_ladder
from qll.convert.units import Unit
from qll.errors import UsageError
from qll.load import open_source
from qll.options import ConvertOptions
from qll.tn.network import NetworkSpec

SHAPE = (24, 32)
UNIT = Unit(("a",), (SHAPE,))
SPEC = NetworkSpec("sparse", SHAPE, gauge="interpolative")


def spiked(seed: int = 0, size: float = 6.0) -> torch.Tensor:
    """Rank four, a little noise, and eight large entries."""
    generator = torch.Generator().manual_seed(seed)
    one, other, noise = (
        torch.randn(*shape, generator=generator).double() for shape in ((24, 4), (4, 32), SHAPE)
    )
    weight = one @ other + 0.01 * noise
    places = torch.randperm(weight.numel(), generator=generator)[:8]
    weight.view(-1)[places] += size
    return weight


def random_metric(seed: int) -> Metric:
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(n, 2 * n, generator=generator).double() for n in SHAPE]
    return Metric("kfac", *(side @ side.mT / side.shape[1] for side in sides))


@pytest.mark.parametrize("metric", [plain(), random_metric(1)], ids=["plain", "kfac"])
def test_the_fit_keeps_the_predicted_loss_and_the_counted_size(metric):
    weight = spiked()
    item = outlier_ladder(UNIT, SPEC, weight, metric, 8 / 768, keep=0.3, step=4)[0]
    network = fit([weight], item.spec, [metric], torch.float64).network
    assert metric.norm_squared(weight - network.to_matrix()) <= 1.05 * item.loss
    assert item.params == sum(t.numel() for t in (*network.cores, *network.indices))
    assert len(network.cores[0]) == len(network.indices[0]) == 8


def test_entries_pay_where_there_are_super_weights_and_only_there():
    for weight, pays in ((spiked(), True), (spiked(size=0.0), False)):
        alone = ladder(UNIT, NetworkSpec("lowrank", SHAPE, gauge="interpolative"),
                       spectra([weight], NetworkSpec("lowrank", SHAPE), [plain()]), 1)  # fmt: skip
        beside = outlier_ladder(UNIT, SPEC, weight, plain(), 8 / 768, keep=0.3, step=1)
        budget = next(item.params for item in beside if item.spec.ranks[1] == 4)
        best = [
            min((item.loss for item in items if item.params <= budget), default=float("inf"))
            for items in (alone, beside)
        ]
        assert (best[1] < 0.2 * best[0]) == pays


def test_auto_takes_them_when_they_are_offered_and_pay(tiny_hf_folder, tmp_path):
    source = open_source(tiny_hf_folder)
    options = ConvertOptions(keep=0.8, metric="plain", outliers=0.02, sharing="none")
    plan = make_plan(source, None, options)
    without = make_plan(source, None, ConvertOptions(keep=0.8, metric="plain", sharing="none"))
    assert plan.block_params <= plan.budget == without.budget
    assert sum(e.loss for e in plan.entries) <= sum(e.loss for e in without.entries) * 1.002
    sparse = [e for e in plan.entries if e.spec is not None and e.spec.format == "sparse"]
    assert all(len(entry.spec.ranks) == 2 for entry in sparse)
    records = convert_units(source, None, plan, options, tmp_path / "cores", tmp_path / "events")
    assert len(records) == 2 * 7 + 2


def test_a_share_of_one_or_more_is_refused():
    with pytest.raises(UsageError, match="--outliers"):
        ConvertOptions(outliers=1.0)
