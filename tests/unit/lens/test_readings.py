"""Activations read once are those of single passes, in memory and in files; moved autoencoders."""

from __future__ import annotations

import pytest
import torch

from qll.errors import UsageError
from qll.lens.downstream import downstream
from qll.lens.hooks import capture
from qll.lens.readings import places_for, read
from tests.unit.lens.conftest import encoded, fitted_sae, random_sae

PLACES = ["embed_tokens", "layers.1.mlp.down_proj.input", "layers.2"]


@pytest.mark.parametrize("on_disk", [False, True])
def test_readings_are_what_passes_through(deep_llama, windows, tmp_path, on_disk):
    folder = tmp_path / "readings" if on_disk else None
    found = read(deep_llama, windows, [*PLACES, "layers.2"], special=[5], folder=folder)
    for number, window in enumerate(windows):
        for place, value in capture(deep_llama, window[None], PLACES).items():
            assert torch.equal(found.at(place, number), value[0])
        with torch.no_grad():
            states = deep_llama.model(input_ids=window[None]).last_hidden_state[0]
        assert torch.equal(found.states(number), states)
        assert torch.equal(found.kinds("layers.2", number) == 1, window == 5)
    if on_disk:
        assert sorted(path.name for path in folder.iterdir()) == [f"{n}.float32" for n in PLACES]
        assert (folder / "layers.2.float32").stat().st_size == 4 * windows.numel() * 64


def test_a_place_that_is_not_there(deep_llama, windows):
    with pytest.raises(UsageError, match="no such block"):
        read(deep_llama, windows, ["layers.3"])


def test_places_at_both_ends(deep_llama):
    first, last = random_sae(hookpoint="embed_tokens"), random_sae(hookpoint="layers.2")
    assert places_for(first.spec, 3) == ["embed_tokens", "layers.0", "layers.2"]
    assert places_for(last.spec, 3) == ["layers.1", "layers.2"]
    coder = random_sae(hookpoint="layers.1.mlp.input", writes="layers.1.mlp")
    assert set(places_for(coder.spec, 3)) == {
        *(f"layers.{n}.mlp{side}" for n in range(3) for side in ("", ".input")),
        *("layers.0", "layers.2"),
    }


def test_an_autoencoder_moves_with_its_readings(deep_llama, windows):
    here = encoded(deep_llama, fitted_sae(deep_llama, windows, "layers.1"), windows)
    assert here.moved(0) is here
    after = here.moved(1)
    assert torch.equal(after.written(0), here.readings.at("layers.2", 0))
    expected = here.sae.encode(here.readings.at("layers.2", 0))
    assert torch.equal(after.codes[0].indices, expected.indices)
    assert here.moved(2) is None
    assert here.moved(-3) is None


def test_prices_of_some_windows(deep_llama, windows):
    sae = fitted_sae(deep_llama, windows, "layers.1", k=4)
    whole, some = encoded(deep_llama, sae, windows), encoded(deep_llama, sae, windows[[0, 3]])
    assert downstream(whole, priced=2) == downstream(some)
    assert downstream(whole, priced=2)["all"]["tokens"] == 2 * 31
