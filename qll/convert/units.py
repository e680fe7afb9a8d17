"""The matrices of a Llama and the groups of them that can share a bond.

q/k/v read the same input, gate/up as well; q/k/v/o share the head and model legs. A unit is one
matrix or one such group: what an entry of a plan covers. Names are Hugging Face module paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import LlamaConfig

from qll.model import group_path
from qll.tn import default_modes, default_panels
from qll.tn.modes import skewed_modes
from qll.tn.network import NetworkSpec

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
GROUPS = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "qkvo": ("self_attn", ATTENTION),
    "query_key": ("self_attn", ("q_proj", "k_proj")),
    "value_output": ("self_attn", ("v_proj", "o_proj")),
    "gate_up": ("mlp", ("gate_proj", "up_proj")),
    "gate_up_down": ("mlp", MLP),
}
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"


@dataclass(frozen=True)
class Unit:
    """Matrices converted together; `shapes` are (out, in) in the order of `members`."""

    members: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def dense_params(self) -> int:
        """Parameters of the members as dense matrices."""
        return sum(out * into for out, into in self.shapes)

    @property
    def block(self) -> int | None:
        """Block index, or None for the embedding and the head."""
        parts = self.members[0].split(".")
        return int(parts[2]) if parts[:2] == ["model", "layers"] else None

    @property
    def name(self) -> str:
        """One file-name-safe word for the members."""
        return "+".join([self.members[0], *(path.rpartition(".")[2] for path in self.members[1:])])


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear of a block, by its path inside the block, in model order.

    >>> linear_shapes(LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=4,
    ...     num_key_value_heads=2))["self_attn.k_proj"]
    (4, 8)
    """
    d_model, d_ff, d_head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * d_head, config.num_key_value_heads * d_head
    return {
        "self_attn.q_proj": (queries, d_model),
        "self_attn.k_proj": (keys, d_model),
        "self_attn.v_proj": (keys, d_model),
        "self_attn.o_proj": (d_model, queries),
        "mlp.gate_proj": (d_ff, d_model),
        "mlp.up_proj": (d_ff, d_model),
        "mlp.down_proj": (d_model, d_ff),
    }


def single_units(config: LlamaConfig, block: int) -> list[Unit]:
    """One unit per linear of a block."""
    return [
        Unit((f"model.layers.{block}.{path}",), (shape,))
        for path, shape in linear_shapes(config).items()
    ]


def group_unit(config: LlamaConfig, block: int, group: str) -> Unit:
    """The unit of a group, by its name in `GROUPS`, in a block."""
    parent, names = GROUPS[group]
    shapes = linear_shapes(config)
    return Unit(
        tuple(f"model.layers.{block}.{parent}.{name}" for name in names),
        tuple(shapes[f"{parent}.{name}"] for name in names),
    )


def embedding_unit(config: LlamaConfig) -> Unit:
    """The token embedding [vocab, d_model]; a tied head is the same matrix."""
    return Unit((EMBEDDING,), ((config.vocab_size, config.hidden_size),))


def head_unit(config: LlamaConfig) -> Unit:
    """The output head [vocab, d_model] of a model that is not tied."""
    return Unit((HEAD,), ((config.vocab_size, config.hidden_size),))


def matrix_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every matrix of a model by its path: block linears, embedding, untied head."""
    units = [
        unit for block in range(config.num_hidden_layers) for unit in single_units(config, block)
    ]
    units.append(embedding_unit(config))
    if not config.tie_word_embeddings:
        units.append(head_unit(config))
    return {unit.members[0]: unit.shapes[0] for unit in units}


def tensor_path(members: Sequence[str]) -> str:
    """Where the cores of an entry are stored: the matrix itself, or its group's module."""
    return members[0] if len(members) == 1 else group_path(members)


def template(unit: Unit, format: str, gauge: str, sites: int, config: LlamaConfig) -> NetworkSpec:
    """The spec of `format` for `unit`, ranks still empty."""
    out, into = sum(shape[0] for shape in unit.shapes), unit.shapes[0][1]
    spec = NetworkSpec(format, (out, into), gauge=gauge)
    if format in ("lowrank", "sparse"):
        return spec
    if format == "panels":
        return replace(spec, modes=_panel_modes(unit, spec.shape))
    if format in ("joint_tree", "joint_channels"):
        return NetworkSpec(format, (out, into), gauge=gauge, members=unit.shapes)
    if format in ("joint_value_output", "joint_query_key"):
        heads = (config.num_attention_heads, config.num_key_value_heads)
        modes = {"heads": heads, "d_head": (config.head_dim,)}
        return NetworkSpec(format, (out, into), modes=modes, gauge=gauge, members=unit.shapes)
    if format == "joint_tucker":
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        modes = {
            "heads": (heads, kv_heads, kv_heads, heads),
            "d_head": (config.head_dim,),
            "d_model": (config.hidden_size,),
        }
        return NetworkSpec(format, (out, into), modes=modes, gauge=gauge, members=unit.shapes)
    if format == "tucker":
        rows = default_modes((out, into), 2)["out"]
        return NetworkSpec(format, (out, into), modes={"stack": (*rows, into)}, gauge=gauge)
    pieces = 2 if format == "kron" else sites
    return NetworkSpec(format, (out, into), modes=default_modes((out, into), pieces), gauge=gauge)


def templates(
    unit: Unit, format: str, gauge: str, sites: int, config: LlamaConfig
) -> list[NetworkSpec]:
    """Every spec of `format` to choose from for `unit`, the usual one first.

    Of mpo and kron the balanced split into sites, then those whose first cut is nearly rows
    against columns; of panels also two sorted ones.

    >>> unit = Unit(("w",), ((12, 12),))
    >>> [spec.modes["out"] for spec in templates(unit, "kron", "none", 2, LlamaConfig())]
    [(3, 4), (6, 2), (1, 12)]
    """
    first = template(unit, format, gauge, sites, config)
    if format == "panels":
        others = (replace(first, modes=modes) for modes in _panel_options(first.shape))
        return [first, *(spec for spec in others if spec != first)]
    if format not in ("mpo", "kron"):
        return [first]
    skewed = (skewed_modes(first.shape, len(first.modes["out"]), axis) for axis in (0, 1))
    return [first, *(replace(first, modes=modes) for modes in skewed if modes)]


def _panel_options(shape: tuple[int, int]) -> list[dict[str, tuple[int, ...]]]:
    """Two sorted panels along the longer leg, or along either leg of a square."""
    return [
        default_panels(shape, 2, axis) | {"order": (shape[axis],)}
        for axis in (0, 1)
        if shape[axis] == max(shape)
    ]


def _panel_modes(unit: Unit, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Panels along the longer leg, sorted unless that leg carries heads, which belong together."""
    name = unit.members[0].rpartition(".")[2]
    modes = default_panels(shape)
    if shape[0] == shape[1] and name == "o_proj":
        modes = {"columns": modes["rows"]}  # the leg of the heads
    if name in ATTENTION and ("columns" if name == "o_proj" else "rows") in modes:
        return modes
    return modes | {"order": (shape[0 if "rows" in modes else 1],)}
