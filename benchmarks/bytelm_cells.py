"""The cells of the byte-model tables, as data: what is trained, on how many bytes, on which seeds.

Budgets are bytes, so that a busy machine changes how long a cell takes and not what it finds. The
minutes of the tables become bytes once, by REFERENCE_RATE. Add a part here and its rows appear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SEEDS = (0, 1, 2)
# bytes of training that a second of the tables stands for: a round figure for two quiet cores; the
# row speed/throughput says what a machine really does
REFERENCE_RATE = 6000
MINUTES = 8.0
LONG_MINUTES = 60.0
CONTEXT = 256
BATCH = 16

PLAIN = "plain_twin"
BEST = "best"
# settings of the best combination, as `lm train --set` takes them; chosen from the ablation
BEST_SETTINGS = (
    "mixer.pattern=interference,attention",
    "mixer.numbers=complex",
    "mixer.conv=4",
)

# part -> (settings that switch it on, settings of its real-valued twin or None)
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "phase rotation": (("stream.phase=rotation",), ("stream.phase=scaling",)),
    "complex stream": (("stream.numbers=complex",), None),
    "complex stream, modReLU": (("stream.numbers=complex", "stream.activation=modrelu"), None),
    "interference, every second block": (
        ("mixer.pattern=interference,attention", "mixer.numbers=complex"),
        ("mixer.pattern=interference,attention", "mixer.numbers=real"),
    ),
    "interference, every block": (
        ("mixer.pattern=interference", "mixer.numbers=complex"),
        ("mixer.pattern=interference", "mixer.numbers=real"),
    ),
    "interference, three states": (
        ("mixer.pattern=interference,attention", "mixer.numbers=complex", "mixer.states=3"),
        ("mixer.pattern=interference,attention", "mixer.numbers=real", "mixer.states=3"),
    ),
    "delta rule, every second block": (
        ("mixer.pattern=delta,attention", "mixer.numbers=complex"),
        ("mixer.pattern=delta,attention", "mixer.numbers=real"),
    ),
    "Born attention, every second block": (
        ("mixer.pattern=born,attention", "mixer.numbers=complex"),
        ("mixer.pattern=born,attention", "mixer.numbers=real"),
    ),
    "brickwall gates": (
        ("stream.brickwall=2", "stream.gates=cayley"),
        ("stream.brickwall=2", "stream.gates=free"),
    ),
    "Born head": (("head=born",), ("head=sum",)),
    "global memory": (("memory.global_tokens=16",), None),
    "recurrent memory": (("memory.memory_tokens=8", "memory.segment=128"), None),
    "concepts, vector-quantised": (("concept.kind=vq",), ("concept.kind=dense",)),
    "concepts, top-k": (("concept.kind=topk",), ("concept.kind=dense",)),
    "dynamic width": (("weights.width_groups=8",), None),
    "MPO linears": (
        ("weights.format=mpo", "weights.keep=0.5"),
        ("weights.format=lowrank", "weights.keep=0.5"),
    ),
    "dynamic rank": (
        ("weights.format=lowrank", "weights.keep=0.5", "weights.rank_groups=8"),
        ("weights.format=lowrank", "weights.keep=0.5"),
    ),
    "LoRA while the base trains": (("weights.lora_rank=8",), None),
    "learned positions": (("positions=learned",), None),
    "no positions": (("positions=none",), None),
    "short convolution (not quantum-inspired)": (("mixer.conv=4",), None),
}
# flags of `lm train` beside the model's settings -> what they switch on
FLAGS: dict[str, tuple[str, ...]] = {
    "coherence energy": ("--coherence", "0.01"),
    "all-pairs interference energy": ("--interference", "0.01"),
    "entanglement energy": ("--entanglement", "0.01"),
    "unlikelihood": ("--unlikelihood", "0.05"),
    "founding curriculum, structure first": ("--stages", "seed"),
    "orthogonal embedding": ("--embedding", "orthogonal"),
    "embedding of mutual information": ("--embedding", "ppmi"),
    "spectral embedding": ("--embedding", "spectral"),
    "embedding of frequency phases": ("--embedding", "frequency"),
}
# (channels, blocks, longest run in minutes) of the runs for the scaling law
SCALING = ((64, 2, 32), (96, 3, 32), (128, 4, 32), (192, 4, 16), (256, 4, 16))
SCALING_MINUTES = (2, 4, 8, 16, 32)
# the law is fitted to these and longer ones: shorter ones are still on the way down from the start
LAW_MINUTES = 8.0
GENERATION_LENGTHS = (256, 1024, 4096)
GENERATION = {
    "attention, cache of everything": ("context=4097",),
    "attention, window of 256": ("context=256",),
    "interference, recurrent": ("mixer.pattern=interference", "mixer.numbers=complex"),
    "delta rule, recurrent": ("mixer.pattern=delta", "mixer.numbers=complex"),
}


@dataclass(frozen=True)
class Cell:
    """One row of bytelm.json."""

    kind: str
    """train, loop (the nanoGPT-style baseline), compressors, throughput, generation."""
    table: str
    """ablation, long, scaling, baselines, speed or generation: where the row is shown."""
    label: str
    seed: int = 0
    minutes: float = 0.0
    settings: tuple[str, ...] = ()
    """Settings of the model, as `lm train --set` takes them."""
    flags: tuple[str, ...] = ()
    """Other flags of `lm train`."""
    matched: bool = True
    """Whether its feed-forward layers are narrowed to the parameters of the plain twin."""

    @property
    def name(self) -> str:
        """Its key, such as ablation/phase_rotation/seed0.

        >>> Cell("train", "ablation", "phase rotation", 1, 8.0).name
        'ablation/phase_rotation/seed1'
        """
        word = self.label.replace(",", "").replace(" ", "_")
        return f"{self.table}/{word}/seed{self.seed}"

    def steps(self, rate: float) -> int:
        """Steps of its budget.

        >>> Cell("train", "ablation", "phase rotation", 0, 8.0).steps(6000)
        703
        """
        return round(60 * self.minutes * rate / (BATCH * CONTEXT))


def all_cells(minutes: float = MINUTES, long_minutes: float = LONG_MINUTES) -> list[Cell]:
    """Every cell: what is quick, then the long runs, then the first seed of everything, and so on.

    >>> names = [cell.name for cell in all_cells()]
    >>> len(names) == len(set(names)), names[0]
    (True, 'baselines/compressors/seed0')
    """
    return [
        Cell("compressors", "baselines", "compressors"),
        Cell("throughput", "speed", "throughput"),
        *_generation(),
        *sorted(_ablation(minutes), key=lambda cell: cell.seed),
        Cell("train", "long", PLAIN, 0, long_minutes),
        Cell("train", "long", BEST, 0, long_minutes, BEST_SETTINGS),
        *_scaling(),
    ]


def twin_of(part: str) -> str:
    """The label of a part's real-valued twin."""
    return f"twin of {part}"


def _ablation(minutes: float) -> Iterator[Cell]:
    for seed in SEEDS:
        yield Cell("train", "ablation", PLAIN, seed, minutes)
        yield Cell("loop", "ablation", "nanoGPT-style loop", seed, minutes)
        yield Cell("train", "ablation", "AdamW", seed, minutes, flags=("--optimizer", "adamw"))
        for part, (on, twin) in PARTS.items():
            yield Cell("train", "ablation", part, seed, minutes, on)
            if twin is not None:
                yield Cell("train", "ablation", twin_of(part), seed, minutes, twin)
        for loss, flags in FLAGS.items():
            yield Cell("train", "ablation", loss, seed, minutes, flags=flags)
        yield Cell("train", "ablation", BEST, seed, minutes, BEST_SETTINGS)


def scaling_cell(width: int, blocks: int, minutes: float) -> Cell:
    """A plain transformer of this size, trained for as many bytes as `minutes` stand for.

    >>> scaling_cell(64, 2, 8).name
    'scaling/64_channels_2_blocks_8_minutes/seed0'
    """
    sizes = (f"d_model={width}", f"n_layers={blocks}")
    label = f"{width} channels {blocks} blocks {minutes:g} minutes"
    return Cell("train", "scaling", label, 0, minutes, sizes, matched=False)


def _scaling() -> Iterator[Cell]:
    for width, blocks, longest in SCALING:
        for minutes in SCALING_MINUTES:
            if minutes <= longest:
                yield scaling_cell(width, blocks, minutes)


def _generation() -> Iterator[Cell]:
    for label, settings in GENERATION.items():
        yield Cell("generation", "generation", label, settings=settings, matched=False)
