"""What each part promises beyond the laws of every model."""

from __future__ import annotations

import math

import pytest
import torch

from qll.bytelm.adapter import AdaptedLinear, with_adapters, without_adapters
from qll.bytelm.born import complex_features, real_features
from qll.bytelm.born_head import AmplitudeHead
from qll.bytelm.brickwall import Brickwall, gate
from qll.bytelm.complex_numbers import conjugate_product
from qll.bytelm.concept import nearest, strongest, use_sae
from qll.bytelm.config import ConceptConfig, MemoryConfig, MixerConfig, StreamConfig, WeightConfig
from qll.bytelm.context import Context
from qll.bytelm.growth import grow
from qll.bytelm.linears import network_spec
from qll.bytelm.model import ByteModel
from qll.bytelm.phase import Phase
from qll.bytelm.rotary import rotate
from qll.bytelm.sizing import count_parameters, plain_twin
from qll.errors import ShapeError, UsageError
from qll.lens.sae import SAE
from qll.load.sae_file import LatentMatrix, SAESpec, StoredSAE
from qll.tn import tensor_shapes
from tests.unit.bytelm.byte_models import byte_model, randomise, settings, text


def x(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# -- phase rotation ----------------------------------------------------------------------
def test_a_phase_rotation_is_an_isometry_and_minus_the_angle_undoes_it():
    phase = Phase(settings("rotation")).double()
    randomise(phase)
    stream, nowhere = x(2, 7, 16), (torch.ones(7, 1), torch.zeros(7, 1))
    turned, angle = phase(stream, Context(3, nowhere)), phase.angles(stream, 3)
    torch.testing.assert_close(turned.norm(dim=-1), stream.norm(dim=-1), rtol=1e-14, atol=0)
    torch.testing.assert_close(rotate(turned, (angle.cos(), (-angle).sin())), stream)
    assert (turned - stream).abs().max() > 0.1
    # content and position both turn, and angles go beyond pi
    assert not torch.allclose(angle[0, 0], angle[1, 0])
    assert not torch.allclose(phase.angles(stream, 4), angle)
    assert phase.angles(1e3 * stream, 0).shape == angle.shape


def test_its_twin_is_no_isometry():
    twin = Phase(settings("scaling")).double()
    randomise(twin)
    scaled = twin(x(2, 7, 16), Context(0, (torch.ones(7, 1), torch.zeros(7, 1))))
    assert not torch.allclose(scaled.norm(dim=-1), x(2, 7, 16).norm(dim=-1), rtol=1e-2)


# -- Born attention ----------------------------------------------------------------------
def test_features_are_squared_overlaps():
    left, right = x(5, 6), x(5, 6, seed=1)
    real, imaginary = conjugate_product(left, right)
    found = (complex_features(left) * complex_features(right)).sum(dim=-1)
    torch.testing.assert_close(found, real.square() + imaginary.square())
    found = (real_features(left) * real_features(right)).sum(dim=-1)
    torch.testing.assert_close(found, (left * right).sum(dim=-1).square())
    assert complex_features(left).shape[-1] == 9
    assert real_features(left).shape[-1] == 21


def test_two_slits():
    """|psi_1 + psi_2|^2 = |psi_1|^2 + |psi_2|^2 + 2 Re(psi_1* psi_2)."""
    one, two = x(6), x(6, seed=1)
    together = (one + two).square().sum()
    cross = 2 * conjugate_product(one, two)[0]
    torch.testing.assert_close(together, one.square().sum() + two.square().sum() + cross)


# -- brickwall ---------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["cayley", "exponential"])
@pytest.mark.parametrize("d_model", [16, 24, 36])
def test_a_brickwall_is_orthogonal(kind, d_model):
    config = settings("plain", d_model=d_model, stream=StreamConfig(brickwall=3, gates=kind))
    wall = Brickwall(config).double()
    randomise(wall)
    matrix, one = wall.matrix(), torch.eye(d_model, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, one, rtol=0, atol=1e-12)
    assert (matrix - one).abs().max() > 0.05
    vectors = x(2, 3, d_model)
    torch.testing.assert_close(wall(vectors).norm(dim=-1), vectors.norm(dim=-1))


def test_a_free_gate_is_not_orthogonal():
    free = gate(x(6), 4, "free")
    assert not torch.allclose(free @ free.T, torch.eye(4, dtype=torch.float64), atol=1e-2)


# -- adapters ----------------------------------------------------------------------------
def test_adapters_merge_and_unmerge():
    model = byte_model("adapters")
    ids = text(2, 9)
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    assert len(layers) == 4 * model.config.n_layers
    with torch.no_grad():
        before = model(ids)
        torch.testing.assert_close(without_adapters(model)(ids), before, rtol=0, atol=1e-12)
        for change in (AdaptedLinear.merge, AdaptedLinear.merge, AdaptedLinear.unmerge):
            for layer in layers:
                change(layer)
            torch.testing.assert_close(model(ids), before, rtol=0, atol=1e-12)


def test_only_adapters_learn_on_a_frozen_base():
    plain = byte_model("plain")
    model = with_adapters(plain, rank=2, alpha=4.0)
    with torch.no_grad():
        assert torch.equal(model(text(1, 9)), plain(text(1, 9)))
    model(text(1, 9)).sum().backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learns == {name for name, _ in model.named_parameters() if "adapter_" in name}


# -- concept layer -----------------------------------------------------------------------
def test_codes_are_the_nearest_and_the_strongest():
    z, book = x(3, 5, 4), x(9, 4, seed=1)
    assert torch.equal(nearest(z, book), torch.cdist(z, book.expand(3, 9, 4)).argmin(dim=-1))
    kept = strongest(x(3, 5, 9).relu(), 2)
    assert ((kept > 0).sum(dim=-1) <= 2).all()
    assert torch.equal(kept.amax(dim=-1), x(3, 5, 9).relu().amax(dim=-1))


@pytest.mark.parametrize("subtract", [True, False])
def test_a_trained_autoencoder_as_codebook(subtract):
    spec = SAESpec("layers.0", 16, 40, 16, "topk", k=4, subtract_b_dec=subtract)
    vectors = {"b_enc": x(40, seed=1).float(), "b_dec": x(16, seed=2).float()}
    encoder, decoder = x(40, 16, seed=3).float(), x(40, 16, seed=4).float()
    sae = SAE(StoredSAE(spec, LatentMatrix(encoder), LatentMatrix(decoder), vectors))
    plain = byte_model("plain").float()
    model = use_sae(plain, sae, layer=1)
    ids, notes = text(1, 9), {}
    with torch.no_grad():
        before = plain(ids)
        torch.testing.assert_close(model(ids), before)
        plain.step(ids, plain.initial_state(1), notes)
        model.concept.gain.fill_(1.0)
        found: dict = {}
        model.step(ids, model.initial_state(1), found)
    torch.testing.assert_close(
        found["stream"][0][0], sae.reconstruct(notes["stream"][0][0]), rtol=1e-4, atol=1e-4
    )
    assert not any(p.requires_grad for n, p in model.concept.named_parameters() if n != "gain")
    with pytest.raises(ShapeError, match="another width"):
        use_sae(byte_model("plain", d_model=32), sae)


# -- memory ------------------------------------------------------------------------------
@torch.no_grad()
def test_recurrent_memory_carries_a_byte_beyond_every_window():
    """Without it the logits at the end do not depend on a byte so far back."""
    ids = text(1, 38)
    changed = ids.clone()
    changed[0, 5] = 200  # the last byte of the first segment; the last write is two bytes back
    kinds = {"plain": {"memory": MemoryConfig()}, "recurrent memory": {}}
    for part, extra in kinds.items():
        model = byte_model(part, context=4, n_layers=1, **extra)
        same = torch.equal(model(ids)[:, -1], model(changed)[:, -1])
        assert same == (part == "plain")


@torch.no_grad()
def test_a_window_forgets_exactly_what_lies_before_it():
    model = byte_model("plain", context=4, n_layers=1)
    ids = text(1, 12)
    changed = ids.clone()
    changed[0, 3] = 200
    near, far = model(ids), model(changed)
    assert not torch.equal(near[:, 6], far[:, 6])
    assert torch.equal(near[:, 7:], far[:, 7:])


@torch.no_grad()
def test_sizes_of_states():
    """A matrix state does not grow; a cache grows up to the window and no further."""
    for part, grows in (
        ("interference", False),
        ("delta", False),
        ("born", False),
        ("plain", True),
    ):
        model, sizes = byte_model(part), []
        state = model.initial_state(1)
        for _ in range(4):
            _, state = model.step(text(1, 6), state)
            sizes.append(state.num_bytes())
        assert (sizes[1] > sizes[0]) == grows
        assert sizes[2] == sizes[3]


# -- networks, growth, sizes -------------------------------------------------------------
@pytest.mark.parametrize("format", ["lowrank", "mpo", "tree", "kron"])
def test_networks_keep_the_share_they_are_told(format):
    spec = network_spec(format, 48, 96, 0.5)
    assert 0.4 * 48 * 96 < tensor_shapes(spec).num_params <= 0.5 * 48 * 96
    torch.manual_seed(0)
    model = ByteModel(settings("plain", d_model=48, d_ff=96, weights=WeightConfig(format=format)))
    weight = model.blocks[0].feed_forward.gate_up.weight
    assert 0.5 < weight.std() / 0.02 < 2


@pytest.mark.parametrize("tie", [False, True])
def test_growth_keeps_the_function(tie):
    model = byte_model("prefix", tie=tie)
    ids = text(2, 15)
    with torch.no_grad():
        once = grow(model, 32, d_ff=48)
        twice = grow(once, 48, n_layers=3, d_ff=48)
        torch.testing.assert_close(once(ids), model(ids), rtol=0, atol=1e-12)
        torch.testing.assert_close(twice(ids), model(ids), rtol=0, atol=1e-12)
        single = grow(model.float(), 48)(ids)
        torch.testing.assert_close(single, model(ids), rtol=1e-4, atol=1e-5)
    assert (twice.config.n_heads, twice.config.d_head) == (6, 8)
    twice(ids).square().sum().backward()
    grown = twice.blocks[0].mixer.out.weight.grad
    assert grown.abs().amin(dim=1).min() > 0  # new channels learn


@pytest.mark.parametrize(
    ("part", "size"), [("interference", 32), ("rotation", 32), ("plain", 20), ("plain", 8)]
)
def test_growth_refuses(part, size):
    with pytest.raises(UsageError):
        grow(byte_model(part), size)


def test_the_plain_twin_has_as_many_parameters():
    for config in (
        settings("interference", d_model=64),
        settings("complex", d_model=64, d_ff=512),
        settings("topk", d_model=64, concept=ConceptConfig(kind="topk", codes=200)),
    ):
        twin = plain_twin(config)
        assert twin.mixer == MixerConfig()
        assert twin.stream == StreamConfig()
        assert abs(count_parameters(twin) / count_parameters(config) - 1) < 0.01


def test_probabilities_of_the_born_head_are_squares_of_amplitudes():
    model, ids = byte_model("Born head"), text(2, 7)
    assert isinstance(model.head, AmplitudeHead)
    with torch.no_grad():
        notes: dict = {}
        logits = model.step(ids, model.initial_state(2), notes)[0]
        stream = model.norm(notes["stream"][0])
        psi = torch.view_as_complex((stream @ model.head.weight.T).unflatten(-1, (256, 2)))
    squares = psi.abs().square()
    expected = squares / squares.sum(-1, keepdim=True)
    torch.testing.assert_close(logits.softmax(-1), expected, rtol=1e-5, atol=1e-8)
    # bits per byte are ordinary ones: of a distribution that sums to one
    torch.testing.assert_close(logits.softmax(-1).sum(-1), torch.ones(2, 7).double())
    with pytest.raises(UsageError, match="cannot be tied"):
        byte_model("Born head", tie=True)


def test_an_amplitude_of_zero_has_a_finite_logit_and_gradient():
    head = AmplitudeHead(settings("Born head"))
    torch.nn.init.zeros_(head.weight)
    loss = torch.nn.functional.cross_entropy(head(torch.ones(1, 16)), torch.tensor([7]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(256), abs=1e-4)
    assert torch.isfinite(head.weight.grad).all()
