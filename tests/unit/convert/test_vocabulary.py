"""Embeddings as networks: frequent tokens are kept better than rare ones, and a head counts too."""

from __future__ import annotations

import pytest
import torch

from qll.calibrate import collect
from qll.convert import fit, make_plan, metrics_of, read_weights
from qll.convert.candidates import format_of
from qll.convert.metric import plain
from qll.convert.units import embedding_unit, template
from qll.load import open_source
from qll.options import ConvertOptions
from tests.conftest import VOCAB, make_tiny_llama

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
FREQUENT = 40


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def measured(request, tmp_path_factory):
    """(source, moments) on windows in which only the first tokens occur."""
    folder = tmp_path_factory.mktemp("vocabulary")
    make_tiny_llama(tied=request.param, seed=4).save_pretrained(folder / "model")
    source = open_source(folder / "model")
    hand = torch.Generator().manual_seed(0)
    windows = torch.randint(3, FREQUENT, (4, 64), generator=hand)
    return source, collect(source, windows, folder / "moments", gradients=False)


def options(**changes) -> ConvertOptions:
    given = {"metric": "activation", "keep_embeddings": 0.5, "format": "lowrank"}
    return ConvertOptions(**given | changes)


def entry_of(measured, member, **changes):
    source, moments = measured
    plan = make_plan(source, moments, options(**changes))
    return next(entry for entry in plan.entries if entry.unit.members == (member,))


def row_errors(measured, spec, metrics) -> torch.Tensor:
    """Relative error of every row of the embedding at the ranks of `spec`."""
    source, _ = measured
    weights = read_weights(source, [EMBEDDING], options())
    rebuilt = fit(weights, spec, metrics, torch.float64).network.to_matrix()
    return (rebuilt - weights[0]).norm(dim=1) / weights[0].norm(dim=1)


@pytest.mark.parametrize("format", ["lowrank", "mpo", "tree", "tucker", "kron"])
def test_frequent_tokens_are_kept_better_at_the_same_size(measured, format):
    source, moments = measured
    spec = template(embedding_unit(source.config), format, "interpolative", 3, source.config)
    kind = format_of(spec)
    spec = kind.clamp(spec.with_ranks([max(1, rank // 2) for rank in kind.max_ranks(spec)]))
    blind = row_errors(measured, spec, [plain()])
    seen = row_errors(measured, spec, metrics_of(source, moments, [EMBEDDING], options()))
    assert seen[3:FREQUENT].mean() < 0.8 * blind[3:FREQUENT].mean()
    assert seen[3:FREQUENT].mean() < 0.8 * seen[FREQUENT:].mean()
    # rows that never occur still count a little: none is given up
    assert seen[FREQUENT:].mean() < 1.0


def test_the_budget_of_the_vocabulary_is_kept(measured):
    for keep in (0.3, 0.6, 0.9):
        entry = entry_of(measured, EMBEDDING, keep_embeddings=keep)
        assert entry.params <= keep * VOCAB * 64
        # ranks come in steps, so some of the budget may be left
        assert entry.params > (keep - 0.1) * VOCAB * 64
    assert entry_of(measured, EMBEDDING, keep_embeddings=1.0).spec is None


def test_a_head_of_its_own_is_converted_and_a_tied_one_is_the_embedding(measured):
    source, moments = measured
    members = [entry.unit.members for entry in make_plan(source, moments, options()).entries]
    assert ((HEAD,) in members) != source.config.tie_word_embeddings
    assert (EMBEDDING,) in members


def test_columns_are_weighted_by_what_the_head_reads(measured):
    source, moments = measured
    member = EMBEDDING if source.config.tie_word_embeddings else HEAD
    metric = metrics_of(source, moments, [member], options())[0]
    assert metric.right is not None
    head = moments.head()
    seen = (head.input / head.tokens).diagonal()
    weights = metric.right.diagonal()
    assert torch.corrcoef(torch.stack([seen, weights]))[0, 1] > 0.99
    if not source.config.tie_word_embeddings:
        assert metrics_of(source, moments, [EMBEDDING], options())[0].right is None
