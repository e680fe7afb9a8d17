"""Random tokens as a prior: drawn by rank, a help for a few tokens of text, gone with many."""

from __future__ import annotations

import pytest
import torch

from qll.calibrate import MomentStore, collect, prior_windows
from qll.calibrate.prior import blended
from qll.convert.fit import fit
from qll.convert.metric import metric_of
from qll.load import open_source
from qll.tn.network import NetworkSpec
from tests.conftest import VOCAB

LINEAR = "model.layers.1.mlp.gate_proj"
SPEC = NetworkSpec("lowrank", (128, 64), (16,))


@pytest.fixture(scope="module")
def source(tiny_hf_folder):
    return open_source(tiny_hf_folder)


def text(tokens: int, seed: int) -> torch.Tensor:
    """Windows of 32 tokens of a language: frequent ids are low, half of all repeat the last but
    one, as words do."""
    draw = torch.Generator().manual_seed(seed)
    weights = (torch.arange(VOCAB, dtype=torch.float64) + 8) ** -1.2
    windows = torch.multinomial(weights, tokens, replacement=True, generator=draw).reshape(-1, 32)
    repeats = torch.rand(windows.shape, generator=draw) < 0.5
    for place in range(2, 32):
        here = repeats[:, place]
        windows[here, place] = windows[here, place - 2]
    return windows


@pytest.fixture(scope="module")
def collected(source, tmp_path_factory):
    """Moments of n tokens of text (or of the prior), by name, without gradients."""

    def measured(windows):
        return collect(source, windows, tmp_path_factory.mktemp("moments"), gradients=False)

    found = {f"few{seed}": measured(text(64, seed)) for seed in range(3)}
    found["many"] = measured(text(16384, 100))
    found["truth"] = measured(text(16384, 200))
    found["prior"] = measured(prior_windows(VOCAB, {0, 1, 2}, 4096, 32))
    return found


def loss(source, moments: MomentStore, truth: MomentStore) -> float:
    """What a truncation in the metric of `moments` loses in that of `truth`, of the whole."""
    weight = source.read(f"{LINEAR}.weight").double()
    metric = metric_of(moments.linear(LINEAR), "activation")
    matrix = fit([weight], SPEC, [metric], torch.float64).network.to_matrix()
    judge = metric_of(truth.linear(LINEAR), "activation")
    return judge.norm_squared(weight - matrix) / judge.norm_squared(weight)


@pytest.mark.parametrize("seed", range(3))
def test_it_helps_a_calibration_of_a_few_tokens(seed, source, collected):
    few = collected[f"few{seed}"]
    with_prior = MomentStore(few.folder, prior=collected["prior"])
    truth = collected["truth"]
    assert loss(source, with_prior, truth) < 0.97 * loss(source, few, truth)


def test_it_fades_with_many(source, collected):
    many, truth = collected["many"], collected["truth"]
    with_prior = MomentStore(many.folder, prior=collected["prior"])
    before, after = (loss(source, moments, truth) for moments in (many, with_prior))
    assert after == pytest.approx(before, rel=0.01)
    gap = with_prior.linear(LINEAR).input - many.linear(LINEAR).input
    assert float(gap.norm() / many.linear(LINEAR).input.norm()) < 0.04


def test_inputs_of_a_block_and_of_a_linear_agree_and_gradients_stay(source, tmp_path):
    windows = text(64, 0)
    moments = collect(source, windows, tmp_path / "text", gradients=True)
    prior = collect(source, windows + 1, tmp_path / "prior", gradients=False)
    store = MomentStore(moments.folder, prior=prior)
    one, of_block = store.linear(LINEAR), store.block(1)[LINEAR]
    assert torch.equal(one.input, of_block.input)
    assert torch.equal(one.grad, moments.linear(LINEAR).grad)
    assert not torch.allclose(one.input, moments.linear(LINEAR).input)
    assert float(one.input.trace()) == pytest.approx(float(moments.linear(LINEAR).input.trace()))


def test_tokens_are_drawn_by_rank_and_never_special():
    windows = prior_windows(1000, {0, 7}, tokens=60_000, context=100)
    counts = torch.bincount(windows.flatten(), minlength=1000)
    assert windows.shape == (600, 100)
    assert counts[[0, 7]].tolist() == [0, 0]
    assert counts[1] / counts[100] == pytest.approx(101.7 / 2.7, rel=0.4)
    assert torch.equal(windows, prior_windows(1000, {0, 7}, tokens=60_000, context=100))
    assert prior_windows(50, (), tokens=10, context=64).shape == (1, 64)


def test_the_prior_counts_as_its_worth_in_tokens():
    data, prior = torch.eye(3).double(), torch.diag(torch.tensor([3.0, 0, 0])).double()
    shares = [float(blended(data, n, prior, worth=512)[0, 0] - 1) / 2 for n in (0, 512, 512 * 99)]
    assert shares == pytest.approx([1.0, 0.5, 0.01])
