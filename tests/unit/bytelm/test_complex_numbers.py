"""Split-real layers against complex arithmetic, and the phase equivariance of whole blocks."""

from __future__ import annotations

import pytest
import torch

from qll.bytelm.block import Block
from qll.bytelm.complex_numbers import (
    ComplexLinear,
    ComplexRMSNorm,
    ModulusGate,
    conjugate_product,
    mod_relu,
    modulus,
)
from qll.bytelm.context import Context
from qll.bytelm.rotary import position_angles, rotate
from tests.unit.bytelm.byte_models import randomise, settings

ANGLE = torch.tensor([0.7], dtype=torch.float64)
TURN = (ANGLE.cos(), ANGLE.sin())


def z(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 7, 16, generator=generator, dtype=torch.float64)


def as_complex(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def test_layers_are_complex_arithmetic():
    layer, gain = ComplexLinear(16, 6).double(), torch.rand(8, dtype=torch.float64)
    weight = torch.view_as_complex(layer.weight.detach())
    torch.testing.assert_close(as_complex(layer(z())), as_complex(z()) @ weight.T)
    norm = ComplexRMSNorm(16).double()
    norm.gain.data.copy_(gain)
    numbers = as_complex(z())
    # the mean is over parts, of which there are two per number
    rms = (numbers.abs().square().mean(dim=-1, keepdim=True) / 2).sqrt()
    torch.testing.assert_close(as_complex(norm(z())), numbers / rms * gain, rtol=1e-5, atol=1e-6)
    cut = torch.relu(numbers.abs() - gain) * torch.exp(1j * numbers.angle())
    torch.testing.assert_close(as_complex(mod_relu(z(), -gain)), cut)
    inner = (numbers.conj() * as_complex(z(1))).sum(dim=-1)
    torch.testing.assert_close(torch.complex(*conjugate_product(z(), z(1))), inner)


def test_a_modulus_has_a_gradient_at_zero():
    x = torch.zeros(4, requires_grad=True)
    modulus(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    "layer",
    [ComplexLinear(16, 16), ComplexRMSNorm(16), lambda x: mod_relu(x, torch.full((8,), -0.3))],
)
def test_layers_commute_with_a_global_phase(layer):
    layer = layer.double() if isinstance(layer, torch.nn.Module) else layer
    torch.testing.assert_close(layer(rotate(z(), TURN)), rotate(layer(z()), TURN))


def test_a_gate_commutes_with_the_phase_of_its_values_and_ignores_that_of_the_gate():
    gate = ModulusGate(16).double()
    turned = gate(rotate(z(1), (-TURN[0], TURN[1])), rotate(z(), TURN))
    torch.testing.assert_close(turned, rotate(gate(z(1), z()), TURN))


@pytest.mark.parametrize(
    "mixer", ["plain", "interference", "delta", "delta real", "born", "born real"]
)
@pytest.mark.parametrize(
    "extra", [{}, {"phase": "rotation"}, {"brickwall": 2}, {"activation": "modrelu"}]
)
def test_blocks_of_a_complex_stream_commute_with_a_global_phase(mixer, extra):
    from qll.bytelm.config import StreamConfig, WeightConfig

    config = settings(
        mixer,
        stream=StreamConfig(numbers="complex", **extra),
        weights=WeightConfig(width_groups=3),
    )
    torch.manual_seed(0)
    block = Block(config, 0).double()
    randomise(block)
    angles = position_angles(0, 7, config.d_head, torch.device("cpu"), torch.float64)
    context, state = Context(0, angles), block.initial_state(z()[:, 0])
    with torch.no_grad():
        straight = block(z(), state, context)[0]
        turned = block(rotate(z(), TURN), state, context)[0]
    torch.testing.assert_close(turned, rotate(straight, TURN), rtol=0, atol=1e-10)


def test_a_stream_stays_in_single_precision_under_autocast():
    from tests.unit.bytelm.byte_models import byte_model, text

    notes: dict = {}
    model = byte_model("complex").float()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        model.step(text(1, 5), model.initial_state(1), notes)
    assert notes["stream"][0].dtype == torch.float32
