"""The cells of the quality table, as data: which methods, at which sizes, on which seeds.

A seed is a choice of calibration windows; a method that reads no calibration and draws nothing has
seed 0 alone. Product rows are main.py with these flags; add a flag here and a row appears.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
SEEDS = (0, 1, 2)

CALIBRATED = (
    "asvd",
    "svd_llm",
    "swift_svd",
    "whitened_interpolative",
    "mpifa",
    "kfac_lems",
    "modegpt",
    "sparsegpt",  # the published peer of ours_sparse
)
UNCALIBRATED = ("svd", "tensorly_tt", "tensorly_tucker", "tltorch_blocktt", "tltorch_tucker")
# equal bytes: keep is 1, the row says how many bits a block weight takes
UNCALIBRATED_BITS = (
    "fp16",
    "rtn_int8",
    "rtn_int4",
    "rtn_int3",
    "rtn_int2",
    "gguf_bf16",
    "gguf_q8_0",
    "gguf_q5_1",
    "gguf_q5_0",
    "gguf_q4_1",
    "gguf_q4_0",
    "gguf_mxfp4",
)
CALIBRATED_BITS = ("gptq_int4", "gptq_int3", "gptq_int2")

OURS = {
    "ours_best": ("--effort", "best"),
    "ours_balanced": ("--effort", "balanced"),
    "ours_fast": ("--effort", "fast"),
    "ours_fast_panels": ("--effort", "fast", "--singles", "panels"),
    # a pruned matrix with a bit mask: no tensor network, and no fewer FLOPs
    "ours_sparse": ("--effort", "fast", "--format", "sparse"),
}
UNIFORM_SVD = ("--effort", "fast", "--format", "lowrank", "--allocation", "uniform")
# main.py as a peer of itself
PRODUCT_PEERS = {
    "whitened_interpolative_shrunk": (*UNIFORM_SVD, "--metric", "activation"),
}
PRODUCT_PEERS_UNCALIBRATED = {
    "mpo_plain": (
        *("--effort", "fast", "--format", "mpo", "--sites", "3"),
        *("--metric", "plain", "--allocation", "uniform"),
    ),
}
# (row, keep, flags); bits per block weight come from the saved files
OURS_BITS = (
    # dense matrices, rounded in the metric; with `best` their scales are then distilled
    ("ours_fast_int8", 1.0, ("--effort", "fast", "--bits", "8")),
    ("ours_fast_int4", 1.0, ("--effort", "fast", "--bits", "4")),
    ("ours_best_int4", 1.0, ("--effort", "best", "--bits", "4")),
    ("ours_fast_int3", 1.0, ("--effort", "fast", "--bits", "3")),
    ("ours_best_int3", 1.0, ("--effort", "best", "--bits", "3")),
    ("ours_best_int2", 1.0, ("--effort", "best", "--bits", "2")),
    # a width for every matrix, at the bits of all in four and in three, and between three and two
    ("ours_fast_4.5_bits", 1.0, ("--effort", "fast", "--bits_per_weight", "4.5")),
    ("ours_fast_3.5_bits", 1.0, ("--effort", "fast", "--bits_per_weight", "3.5")),
    ("ours_best_4.5_bits", 1.0, ("--effort", "best", "--bits_per_weight", "4.5")),
    ("ours_best_3.5_bits", 1.0, ("--effort", "best", "--bits_per_weight", "3.5")),
    ("ours_best_3_bits", 1.0, ("--effort", "best", "--bits_per_weight", "3.0")),
    # fewer numbers of four bits, beside all of them in three and in two
    ("ours_best_int4", 0.7, ("--effort", "best", "--bits", "4")),
    ("ours_best_int4", 0.5, ("--effort", "best", "--bits", "4")),
)

ABLATION_KEEP = 0.8
# closed forms alone: what training adds is in the rows of OURS, which stand in the same table
ABLATION_BASE = OURS["ours_fast"]
ABLATION_OURS = ("ours_fast", "ours_balanced", "ours_best", "ours_fast_panels")
# what is taken away, or added that is not the default -> the flags that do it
ABLATIONS = {
    "ablation_metric_activation": ("--metric", "activation"),
    "ablation_metric_plain": ("--metric", "plain"),
    "ablation_labels_text": ("--labels", "text"),
    "ablation_allocation_uniform": ("--allocation", "uniform"),
    "ablation_gauge_none": ("--gauge", "none"),
    "ablation_single_matrices": ("--format", "lowrank"),
    "ablation_no_sharing": ("--sharing", "none"),
    "ablation_no_inner_sharing": ("--sharing", "bonds"),
    "ablation_disentangle_all": ("--disentangle", "all"),
    "ablation_losses_measured": ("--losses", "measured"),
    "ablation_losses_depth": ("--losses", "depth"),
    "ablation_outliers": ("--outliers", "0.005"),
}

HEADLINE_KEEP = 0.8
# format -> flags, tried in this order: first the tree that shares bonds between matrices, then
# formats of more than one core pair inside a matrix, the least predicted loss last
HEADLINE = {
    "joint_tree": ("--effort", "fast", "--format", "joint_tree"),
    "tucker": ("--effort", "fast", "--format", "tucker"),
    "mpo": (
        *("--effort", "fast", "--format", "mpo", "--sites", "3"),
        *("--disentangle", "channels"),
    ),
    "kron": ("--effort", "fast", "--format", "kron", "--disentangle", "channels"),
    "panels": ("--effort", "fast", "--format", "panels"),
}
# activation-whitened SVD with interpolative storage: as published, and with our shrinkage
HEADLINE_BASELINES = ("whitened_interpolative", "whitened_interpolative_shrunk")
# the same metric, allocation and storage, and one low-rank network per matrix: what a format adds
HEADLINE_CONTROL = "ablation_single_matrices"


@dataclass(frozen=True)
class Cell:
    """One row of quality.json."""

    method: str
    keep: float
    seed: int
    table: str
    """keep, bits, ablation or headline: where the row is shown."""
    flags: tuple[str, ...] | None = None
    """Flags of main.py; None is a peer of benchmarks/peers."""

    @property
    def name(self) -> str:
        """Its key, such as svd_llm/keep0.8/seed0.

        >>> Cell("svd", 0.8, 0, "keep").name
        'svd/keep0.8/seed0'
        """
        return f"{self.method}/keep{self.keep:g}/seed{self.seed}"


def all_cells() -> list[Cell]:
    """Every cell, the first seed of everything before the second of anything."""
    return sorted(_cells(), key=lambda cell: cell.seed)


def _cells() -> Iterator[Cell]:
    for keep in (HEADLINE_KEEP, *(keep for keep in KEEPS if keep != HEADLINE_KEEP)):
        for method, flags in OURS.items():
            yield from _seeds(method, keep, "keep", flags)
        for method in CALIBRATED:
            yield from _seeds(method, keep, "keep")
        for method, flags in PRODUCT_PEERS.items():
            yield from _seeds(method, keep, "keep", flags)
        for method, flags in PRODUCT_PEERS_UNCALIBRATED.items():
            yield Cell(method, keep, 0, "keep", flags)
        for method in UNCALIBRATED:
            yield Cell(method, keep, 0, "keep")
    for format, flags in HEADLINE.items():
        yield from _seeds(f"headline_{format}", HEADLINE_KEEP, "headline", flags)
    for method, flags in ABLATIONS.items():
        words = replaced(ABLATION_BASE, flags)
        yield from _seeds(method, ABLATION_KEEP, "ablation", words)
    for method in UNCALIBRATED_BITS:
        yield Cell(method, 1.0, 0, "bits")
    for method in CALIBRATED_BITS:
        yield from _seeds(method, 1.0, "bits")
    for method, keep, flags in OURS_BITS:
        yield from _seeds(method, keep, "bits", flags)


def _seeds(
    method: str, keep: float, table: str, flags: tuple[str, ...] | None = None
) -> Iterator[Cell]:
    for seed in SEEDS:
        yield Cell(method, keep, seed, table, flags)


def replaced(base: tuple[str, ...], flags: tuple[str, ...]) -> tuple[str, ...]:
    """`base` with the flags of `flags` in place of its own.

    >>> replaced(("--effort", "balanced", "--sites", "3"), ("--effort", "fast"))
    ('--sites', '3', '--effort', 'fast')
    """
    pairs = dict(zip(base[::2], base[1::2], strict=True))
    for flag in flags[::2]:
        pairs.pop(flag, None)
    return (*(word for pair in pairs.items() for word in pair), *flags)
