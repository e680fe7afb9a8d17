"""The work of every stage of a conversion, in closed form from shapes and token counts.

For one low-rank network per matrix in the activation or K-FAC metric, interpolative storage. Each
function returns operations; planner.py turns them into seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from qll.scale.shapes import Shape
from qll.scale.work import Operation
from qll.tn.symmetric import PANEL

MOMENT_PASSES = 20  # times a second moment moves through memory on its way to a root
MATRIX_PASSES = 12  # and a weight, from the file to a network
PACK_BYTES = 60.0  # that move until a number of a second moment is in its file
# to open files and list the sizes of a matrix; to write its network and the journal as well
PLAN_SECONDS, FIT_SECONDS = 0.005, 0.025
TEXT_SECONDS = 0.15  # to read and tokenise the built-in texts
LOGIT_BYTES = 450.0  # that move for a logit of both models until they are compared
SLOPE_BYTES = 64.0  # and for one whose gradient is wanted
# and in training, forward and backward: for a number of the residual stream, one inside the MLP,
# a weight of attention; once a step, for a number that is trained
STATE_BYTES, INNER_BYTES, WEIGHT_BYTES, STEP_BYTES = 600.0, 200.0, 22.0, 55.0
STEP_TOKENS, STEP_CONTEXT = 1024, 512  # of a step of training, and of a window in it
# qll.evaluate.speed measures decoding and prefill of both models so often, on so many tokens,
REPEATS, DECODED, PROMPT = 4, 32, 512 + 64
# and qll.evaluate.pair those of `generate`, whose limits take so many seconds to measure
TURNS, STEPS, READ, LIMIT_SECONDS = 4, 16, 512, 2.0
CONTEXT = 1024  # of a window that is scored
CALLS = 3.5  # overhead of a dense block and of a converted one, in dense blocks
QR_LIMIT = 3e10  # rows x rank^2 beyond which pivots come from an LU (qll.tn.gauge)
FLOAT32_FROM = 1 << 23  # numbers of a matrix whose errors are float32 (qll.convert.metric)


@dataclass(frozen=True)
class Settings:
    """What a prediction assumes of the run."""

    keep: float = 0.6
    metric: str = "activation"
    calib_tokens: int = 262144
    context: int = 2048
    eval_tokens: int = 4096
    texts: int = 2
    refine_tokens: int = 65536
    passes: int = 0
    """Passes of block refinement; 0 with --effort fast."""
    itemsize: int = 2
    """Bytes of a number in the files."""

    @property
    def gradients(self) -> bool:
        """Whether gradients are calibrated."""
        return self.metric == "kfac"


def rank(out: int, into: int, keep: float) -> int:
    """The rank whose interpolative storage is `keep` of the matrix: r (out + in - r) numbers.

    >>> rank(4096, 4096, 0.75)
    2048
    """
    both = out + into
    return max(1, round((both - (both**2 - 4 * keep * out * into) ** 0.5) / 2))


def legs(out: int, into: int, settings: Settings) -> list[int]:
    """Sizes of the second moments of a matrix."""
    return {"plain": [], "activation": [into], "kfac": [into, out]}[settings.metric]


def gram(out: int, into: int, settings: Settings) -> list[Operation]:
    """Read a weight and its moments, and make the Gram matrix of its short side in the metric.

    As qll.convert.short_side does: a root of the short side's moment, the long side's as it is.
    """
    (short, of_short), (long, of_long) = _sides(out, into, settings)
    squares = sum(leg**2 for leg in legs(out, into, settings))
    work = [
        Operation("bytes", 8.0 * (MATRIX_PASSES * out * into + MOMENT_PASSES * squares)),
        # half of a symmetric product, in panels
        Operation("product", float(long * short * (short + min(short, PANEL))), short),
    ]
    if of_short:
        work.append(Operation("cholesky", short**3 / 3, short))
        work.append(Operation("product", 2.0 * short**2 * long, short))
    if of_long:
        work.append(Operation("product", 2.0 * short * long**2, short))
    return work


def plan_matrix(out: int, into: int, settings: Settings) -> list[Operation]:
    """Singular values of a matrix in its metric."""
    short = min(out, into)
    return [
        *gram(out, into, settings),
        Operation("eigenvalues", 4 / 3 * short**3, short),
        Operation("fixed", PLAN_SECONDS),
    ]


def fit_matrix(out: int, into: int, settings: Settings) -> list[Operation]:
    """The factors, back out of the metric, in the interpolative gauge, and both errors."""
    (short, of_short), (long, _) = _sides(out, into, settings)
    r = rank(out, into, settings.keep)
    pivots = Operation("pivots" if out * r * r <= QR_LIMIT else "product", 2.0 * out * r * r, short)
    narrow = "forward" if out * into >= FLOAT32_FROM else "product"
    back = short**2 * r if of_short else 0.0
    return [
        *gram(out, into, settings),
        Operation("eigenvectors", 9.0 * short**3, short),
        Operation("product", back + 2.0 * short * long * r, short),
        # an orthonormal basis of the left factor, pivots, coefficients, the right factor
        Operation("product", 4.0 * out * r * r - 4 / 3 * r**3, r),
        pivots,
        Operation("product", 2 / 3 * r**3 + 2.0 * r * r * (out - r + into), r),
        # the error of what is stored
        Operation("forward", 2.0 * out * into * r, short),
        Operation(narrow, sum(2.0 * out * into * leg for leg in legs(out, into, settings)), short),
        Operation("fixed", FIT_SECONDS),
    ]


def _sides(out: int, into: int, settings: Settings) -> list[tuple[int, bool]]:
    """(size, whether it has a moment) of the short and the long side."""
    sides = [(out, settings.metric == "kfac"), (into, settings.metric != "plain")]
    return sides if out <= into else sides[::-1]


def calibrate(shape: Shape, settings: Settings) -> list[Operation]:
    """Forward passes, with gradients a second one and a backward one; the sums of moments."""
    tokens, linears = settings.calib_tokens, shape.linears.values()
    passes = 3.0 if settings.gradients else 1.0
    # q/k/v share one, gate/up another
    inputs = [shape.d_model, shape.d_model, shape.n_heads * shape.d_head, shape.d_ff]
    outputs = [out for out, _ in linears] if settings.gradients else []
    windows = max(1, tokens // settings.context)
    work = [_passes(shape, tokens, settings.context, passes)]
    for size in [*inputs, *outputs]:
        work.append(Operation("forward", float(tokens * size * (size + 256)), 256))
        work.append(Operation("bytes", (10.0 * windows + PACK_BYTES) * size**2))
    work = [item.times(shape.n_layers) for item in work]
    if settings.gradients:
        logits = float(tokens * shape.d_vocab)
        work.append(Operation("forward", 4 * logits * shape.d_model, shape.d_model))
        work.append(Operation("bytes", SLOPE_BYTES * logits))
    return [*work, Operation("fixed", TEXT_SECONDS)]


def refine(shape: Shape, settings: Settings) -> list[Operation]:
    """Both streams through every block once more, and the training steps on seven eighths.

    Products are those of training (bfloat16 where that is faster). What runs between them forward
    and backward moves memory, as the optimiser does once a step.
    """
    if not settings.passes:
        return []
    tokens, params = settings.refine_tokens, settings.keep * shape.block_params
    trained = settings.passes * 7 / 8 * tokens
    # held out, before the first pass and after each; and once more for the next block
    scored = (settings.passes + 1) / 8 * tokens + tokens
    weights = STEP_CONTEXT * shape.n_heads
    moved = STATE_BYTES * shape.d_model + INNER_BYTES * shape.d_ff + WEIGHT_BYTES * weights
    products = 2.0 * params + 4.0 * weights * shape.d_head
    dense = _passes(shape, tokens, STEP_CONTEXT, 1.0).count
    bond = rank(shape.d_model, shape.d_model, settings.keep)
    # without a backward pass a third of both, also in the dense block
    one = [
        Operation("coarse", (3 * trained + scored) * products + dense, bond),
        Operation("bytes", (trained + (scored + tokens) / 3) * moved),
        Operation("bytes", trained / STEP_TOKENS * STEP_BYTES * params),
    ]
    return [item.times(shape.n_layers) for item in one]


def evaluate(shape: Shape, settings: Settings) -> list[Operation]:
    """Both models over the texts, their logits compared, and the rates of both measured."""
    tokens, both = settings.texts * settings.eval_tokens, 1 + settings.keep
    head = shape.d_vocab * shape.d_model
    steps = REPEATS * DECODED + TURNS * STEPS
    weights = both * shape.n_layers * shape.block_params + 2 * head
    return [
        _passes(shape, tokens, CONTEXT, both).times(shape.n_layers),
        Operation("forward", 4.0 * tokens * head, shape.d_model),
        Operation("bytes", LOGIT_BYTES * tokens * shape.d_vocab),
        _passes(shape, REPEATS * PROMPT + (TURNS + 1) * READ, 512, both).times(shape.n_layers),
        Operation("vector", 2.0 * steps * weights, shape.d_model),
        Operation("calls", CALLS * steps * shape.n_layers),
        Operation("fixed", TEXT_SECONDS + LIMIT_SECONDS),
    ]


def write(shape: Shape, settings: Settings) -> float:
    """Bytes of the cores, read, and of the shards, written and loaded again for the fingerprint of
    their logits; jobs wrote the cores, and the sums of the shards are taken from memory."""
    return 3.0 * converted_bytes(shape, settings)


def converted_bytes(shape: Shape, settings: Settings) -> float:
    """Bytes of the converted checkpoint."""
    params = settings.keep * shape.n_layers * shape.block_params + shape.vocabulary_params
    return settings.itemsize * params


def moment_bytes(shape: Shape, settings: Settings) -> float:
    """Bytes of the moments of all blocks on disk: upper triangles in float32."""
    inputs = 2 * shape.d_model**2 + (shape.n_heads * shape.d_head) ** 2 + shape.d_ff**2
    outputs = sum(out**2 for out, _ in shape.linears.values())
    squares = {"plain": 0, "activation": inputs, "kfac": inputs + outputs}[settings.metric]
    return 2.0 * squares * shape.n_layers


def stream_bytes(shape: Shape, settings: Settings) -> float:
    """Bytes of activations between blocks that a calibration keeps, float32."""
    count = shape.n_layers + 3 if settings.gradients else 2
    calibration = 4.0 * settings.calib_tokens * shape.d_model * count
    return max(calibration, 16.0 * settings.refine_tokens * shape.d_model * bool(settings.passes))


def _passes(shape: Shape, tokens: int, context: int, passes: float) -> Operation:
    """Passes through one block; a backward pass to the inputs costs as much as a forward one."""
    attention = 4.0 * tokens * context * shape.n_heads * shape.d_head
    one = 2.0 * tokens * shape.block_params + attention
    return Operation("forward", passes * one, shape.d_model)
