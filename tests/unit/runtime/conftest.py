"""Tiny converted models in memory, one per way to store a matrix, and costs that favour nothing."""

from __future__ import annotations

import pytest
import torch

from qll.model import TNLinear, insert_networks
from qll.model.groups import TNGroup
from qll.model.swap import entry_path
from qll.runtime import DeviceCosts, Line
from qll.runtime.kernels import CODED
from qll.tn import default_modes
from qll.tn.network import NetworkSpec
from qll.tn.packed import Packing, as_rows, pack
from qll.tn.rounding import round_nearest
from tests.conftest import make_tiny_llama
from tests.unit.model.conftest import decompose, lowrank, star
from tests.unit.model.test_inner_groups import SMALL
from tests.unit.model.test_inner_groups import entries_of as inner_entries

D, F, KV = 64, 128, 32


def flat(per_entry: float = 1.0, start: float = 0.0, gather: float = 0.0) -> DeviceCosts:
    """Costs that are proportional to sizes and tokens."""
    tokens = (1, 16)
    products = tuple(Line(start, per_entry * count) for count in tokens)
    moves = tuple(Line(0.0, gather * count) for count in tokens)
    codes = dict.fromkeys(CODED, products)
    return DeviceCosts(tokens, {"plain": products}, moves, moves, codes)


def stored(forms, costs):
    """Every matrix as it is stored."""
    return [tuple(each[0] for each in forms)], costs.tokens[-1]


def written(forms, costs):
    """The interpolative gauge written out."""
    return [tuple(each[len(each) // 2] for each in forms)], costs.tokens[-1]


def rebuilt(forms, costs):
    """Every matrix multiplied out."""
    return [tuple(each[-1] for each in forms)], costs.tokens[-1]


def both(forms, costs):
    """As stored for one token, multiplied out for more."""
    return [tuple(each[0] for each in forms), tuple(each[-1] for each in forms)], 1


CHOICES = {"stored": stored, "written": written, "rebuilt": rebuilt, "both": both}


def _each(spec_of, names=("q", "k", "v", "o", "gate", "up", "down")):
    shapes = {"q": (D, D), "k": (KV, D), "v": (KV, D), "o": (D, D)}
    shapes |= {"gate": (F, D), "up": (F, D), "down": (D, F)}
    return {
        (f"model.layers.{i}.{'self_attn' if n in 'qkvo' else 'mlp'}.{n}_proj",): spec_of(shapes[n])
        for i in range(2)
        for n in names
    }


def _mpo(shape):
    modes = default_modes(shape, 2)
    return NetworkSpec("mpo", shape, (12,), modes)


def _stars(gauge, rank=40, own=None):
    entries = _each(lambda shape: lowrank(shape, 24), ("o", "down"))
    for i in range(2):
        layer = f"model.layers.{i}"
        qkv = star(((D, D), (KV, D), (KV, D)), rank, gauge)
        gate_up = star(((F, D), (F, D)), rank, gauge)
        if own:
            qkv = qkv.with_ranks((rank, own, own, own))
        entries[tuple(f"{layer}.self_attn.{n}_proj" for n in "qkv")] = qkv
        entries[(f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")] = gate_up
    return entries


def _plain(shape):
    return lowrank(shape, 20).with_gauge("none")


def _mixed():
    """Some of q, k, v low rank in either gauge, some whole."""
    one = _each(lambda shape: lowrank(shape, 20), ("q", "up", "o", "down"))
    return one | _each(_plain, ("v", "gate"))


ENTRIES = {
    "dense": dict,
    "lowrank": lambda: _each(_plain),
    "interpolative": lambda: _each(lambda shape: lowrank(shape, 20)),
    "full": lambda: _each(lambda shape: lowrank(shape, min(shape))),
    "mixed": _mixed,
    "mpo": lambda: _each(_mpo),
    "stars": lambda: _stars("interpolative"),
    "written_stars": lambda: _stars("none"),
    "branched": lambda: _stars("interpolative", rank=36, own=12),
    "inner": lambda: inner_entries(2, SMALL, "interpolative"),
    "inner_none": lambda: inner_entries(2, SMALL, "none"),
    "head": lambda: {("model.embed_tokens",): lowrank((512, D), 40)},
}


def make_model(name: str, seed: int = 3, tied: bool | None = None):
    """The tiny Llama with the entries of that name, cores fitted to its weights."""
    model = make_tiny_llama(tied=name == "head" if tied is None else tied, seed=seed)
    weights = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    entries = ENTRIES[name]()
    insert_networks(model, entries)
    holders = dict(model.named_modules())
    for members, spec in entries.items():
        network = decompose(members, spec, weights)
        assert network.spec == holders[entry_path(members)].spec
        fresh = (TNGroup if len(members) > 1 else TNLinear).from_network(network)
        holders[entry_path(members)].load_state_dict(fresh.state_dict())
    return model.eval().requires_grad_(False)


def make_packed(bits: int, group: int, dtype: torch.dtype):
    """The tiny Llama with every block linear rounded to integers and held as such."""
    model = make_tiny_llama(seed=3)
    packing, found = Packing(bits, group), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers"):
            rounded = round_nearest(as_rows(module.weight.detach(), group), packing)
            found[name] = {"packed": pack(rounded.codes, bits), "scales": rounded.scales}
    insert_networks(model, {}, dict.fromkeys(found, packing))
    for name, tensors in found.items():
        model.get_submodule(name).load_state_dict(tensors)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(5))
