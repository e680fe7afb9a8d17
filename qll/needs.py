"""What a run needs before it starts: bytes of disk by what lies there, bytes of memory by stage.

Both follow from the shapes alone. They are printed, and a machine that has not got them is told how
much is needed, where, and what to do.
"""

from __future__ import annotations

import math
import sys

from qll import store
from qll.calibrate.capture import stream_count
from qll.calibrate.streams import stored_bytes
from qll.convert import saved_dtype
from qll.errors import UsageError
from qll.runfolder import Run
from qll.runmodel import distilling_bytes
from qll.runplan import calibration_precision
from qll.train import free_bytes

PROGRAM = 800 << 20  # Python, torch and transformers
ROOM = 1 << 24  # JSON, tokenizer, page
# of a matrix in float64 while it is factored: itself, its image, its error, its network; or the
# three of an MLP and what is made of one
COPIES = 6


def require_needs(state: Run, until: str) -> None:
    """Print what the run needs; raise DiskFullError or UsageError when it is not there."""
    disk, memory = disk_bytes(state), memory_bytes(state, until)
    stage = max(memory, key=memory.get)
    for line in needs_text(state, until).splitlines():
        print(f"[needs] {line}", file=sys.stderr)
    store.require_space(state.out, sum(disk.values()))
    free = free_bytes(state.device)
    if state.device.type == "cpu" and memory[stage] > free:
        raise UsageError(
            "too little memory for this run",
            where=f"stage {stage}",
            expected=f"about {memory[stage] / 1e9:.1f} GB",
            found=f"{free / 1e9:.1f} GB free",
            hint=_advice(stage),
        )


def needs_text(state: Run, until: str) -> str:
    """Two lines for people: disk with its parts, memory of the largest stage."""
    disk, memory = disk_bytes(state), memory_bytes(state, until)
    stage = max(memory, key=memory.get)
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in disk.items() if size > ROOM)
    return (
        f"disk         at most {sum(disk.values()) / 1e9:.2f} GB in {state.out}"
        f"{f' ({parts})' if parts else ''}\n"
        f"memory       about {memory[stage] / 1e9:.2f} GB (stage {stage}) beside cached files"
    )


def disk_bytes(state: Run) -> dict[str, int]:
    """Bytes at most in the output folder at a time, by what they are."""
    config, options, train = state.source.config, state.config.convert, state.config.train
    params, kept = _params(state), saved_dtype(state.source, options).itemsize
    numbers = moment_numbers(state)
    refined = 4 * 4 * config.hidden_size * train.refine_tokens * bool(train.passes)
    return {
        "moments": 4 * numbers * config.num_hidden_layers,
        "activations": max(_streams(state)[1] if _streams(state)[0] else 0, refined),
        "cores": params * kept,
        # float32: refined blocks; a start, healed blocks, and a checkpoint with two moments of Adam
        "training": 4 * params * (bool(train.passes) + 5 * bool(train.healing)),
        "checkpoint": params * kept,
        "other": ROOM,
    }


def moment_numbers(state: Run) -> int:
    """Numbers in the stored moments of one block: triangles."""
    config, options = state.source.config, state.config.convert
    d_model, d_ff = config.hidden_size, config.intermediate_size
    d_kv = config.num_key_value_heads * config.head_dim
    inputs = (3 * d_model**2 + d_ff**2) // 2
    grads = (3 * d_model**2 + 2 * d_kv**2 + 2 * d_ff**2) // 2
    share = {"plain": 0, "activation": inputs, "kfac": inputs + grads}[options.metric]
    return share + inputs * bool(state.config.texts.prior_tokens)


def memory_bytes(state: Run, until: str) -> dict[str, int]:
    """Bytes of memory at most in each stage that is run, without files that are only cached."""
    config, options, train = state.source.config, state.config.convert, state.config.train
    d_model, d_ff = config.hidden_size, config.intermediate_size
    width = calibration_precision(state).itemsize
    stored = next(iter(state.source.specs().values())).dtype.itemsize
    block, table = _block_params(state), config.vocab_size * d_model
    on_disk, streams = _streams(state)
    context = state.config.texts.context
    window = 4 * context * (6 * d_ff + 12 * d_model)
    # in float64, then packed as float32 one after another
    sums = 8 * moment_numbers(state) + 4 * d_ff**2 // 2
    is_kfac = options.metric == "kfac"
    stages = {
        "calibrate": block * (2 * stored + width)
        + sums
        # the backward pass keeps the block's activations beside their gradients
        + (window * 3 // 2 if is_kfac else window)
        + (0 if on_disk else streams),
    }
    moments = 8 * d_ff**2 * _squares(state)
    factors = 8 * (COPIES * d_model * d_ff + 4 * d_model**2) + moments + block * stored
    stages["plan"] = factors
    if until == "calibrate" or until == "plan":
        return {name: size + PROGRAM for name, size in stages.items()}
    tables = (1 if config.tie_word_embeddings else 2) * table
    kept = saved_dtype(state.source, options).itemsize
    stages |= {"convert": factors, "write": 2 * tables * kept + 4 * block}
    if train.passes:
        tokens = 4 * d_model * train.refine_tokens * 4
        stages["refine"] = 4 * 5 * block + min(tokens, 2 << 30) + window * 3
    heals, tunes = train.healing and not options.is_exact, train.tuning and options.is_packed
    distilling = distilling_bytes(state)
    # left out, with a warning, where there is no room for it
    if (heals or tunes) and distilling + PROGRAM <= free_bytes(state.device):
        stages["heal" if heals else "tune"] = distilling
    if until == "report":
        stages["evaluate"] = 4 * 2 * _params(state)
    return {name: size + PROGRAM for name, size in stages.items()}


def _squares(state: Run) -> int:
    """How many second moments of the widest side are in memory at a time while one unit is fitted.

    The moment, and again while it is shrunk or its channels are put in order, or as the inverse of
    the channels that are left; a root and its inverse as well where a format needs them, and of
    both members of a tree.
    """
    options = state.config.convert
    if options.metric == "plain":
        return 0
    has_tree = options.format == "auto" and options.sharing in ("bonds", "all")
    if has_tree or options.format == "joint_tree":
        return 6 if options.metric == "kfac" else 4
    by_short_side = ("auto", "lowrank", "dense", "joint_channels")
    has_panels = options.format == "auto" and options.singles == "panels"
    return 2 if options.format in by_short_side and not has_panels else 4


def _streams(state: Run) -> tuple[bool, int]:
    """Whether the activations of the calibration lie on disk, and their bytes."""
    config, texts = state.source.config, state.config.texts
    if state.config.convert.metric == "plain":
        return False, 0
    windows = -(-texts.calib_tokens // texts.context)
    count = stream_count(config.num_hidden_layers, state.config.convert.metric == "kfac")
    shape = (windows, texts.context, config.hidden_size)
    return stored_bytes(shape, count, calibration_precision(state))


def _params(state: Run) -> int:
    return sum(math.prod(spec.shape) for spec in state.source.specs().values())


def _block_params(state: Run) -> int:
    specs = state.source.specs().items()
    return sum(math.prod(spec.shape) for name, spec in specs if name.startswith("model.layers.0."))


def _advice(stage: str) -> str:
    if stage == "evaluate":
        return "use `convert`, which leaves out the comparison of two whole models, or more memory"
    if stage == "calibrate":
        return "use --metric activation, a shorter --context or fewer --calib_tokens"
    return "use --format lowrank and --effort fast, or a machine with more memory"
