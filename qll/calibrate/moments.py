"""Second moments of every linear layer of a Llama: what `collect` leaves behind.

For a linear layer y = W x, `input` is the sum of x x^T over the calibration tokens and `grad` the
sum of g g^T with g = dLoss/dy. Together they are the Kronecker factors of K-FAC (Martens and
Grosse 2015, https://arxiv.org/abs/1503.05671): tr(grad E input E^T) / tokens approximates what an
error E of W costs.

A folder holds `block.0000.safetensors` and so on, `head.safetensors`, `embedding.safetensors` and,
written last, `moments.json`. A matrix is stored as its upper triangle, row after row, in float32
(a quarter of the bytes of the float64 square that the functions here return); layers that read the
same tensor (q/k/v, gate/up) share one stored input moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float64, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qll.calibrate.gram import unpack
from qll.calibrate.prior import blended
from qll.errors import IntegrityError, MissingFileError, UsageError
from qll.store import read_json

SUMMARY_NAME = "moments.json"
HEAD_NAME = "head.safetensors"
EMBEDDING_NAME = "embedding.safetensors"

# Tokens of text that the moments on random tokens count as.
PRIOR_WORTH = 512

# Name of the stored input moment -> the linear layers of a block that read that tensor.
INPUTS = {
    "self_attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
LINEARS = tuple(linear for members in INPUTS.values() for linear in members)


@dataclass(frozen=True)
class LinearMoments:
    """Sums over tokens for one linear layer, in float64; `grad` is None without a backward pass."""

    input: Float64[Tensor, "d_in d_in"]
    """Sum of x x^T over `tokens` tokens."""
    grad: Float64[Tensor, "d_out d_out"] | None
    """Sum of g g^T over `grad_tokens` tokens (fewer: the ends of each window are left out)."""
    tokens: int
    """Tokens in `input`."""
    grad_tokens: int = 0
    """Tokens in `grad`."""


class MomentStore:
    """The moments in `folder`, read one block at a time.

    With a `prior`, moments of the same model on random tokens (`qll.calibrate.prior`), inputs of
    block linears are shrunk towards those as if they were PRIOR_WORTH more tokens. Raises
    MissingFileError when `collect` has not finished there.
    """

    def __init__(self, folder: Path, prior: MomentStore | None = None) -> None:
        path = folder / SUMMARY_NAME
        if not path.is_file():
            raise MissingFileError(
                "no finished calibration",
                where=folder,
                expected=SUMMARY_NAME,
                hint="run the calibration again with the same settings; it resumes",
            )
        self.folder, self.prior = folder, prior
        self.summary: dict[str, Any] = read_json(path)
        self.tokens: int = self.summary["tokens"]
        self.grad_tokens: int = self.summary["grad_tokens"]
        self.gradients: bool = self.summary["gradients"]
        self.n_layers: int = self.summary["n_layers"]

    @property
    def block_influence(self) -> list[float]:
        """Per block, the mean over tokens of 1 - cos(input, output) of the residual stream
        (ShortGPT, https://arxiv.org/abs/2403.03853): 0 is a block that changes nothing."""
        return list(self.summary["block_influence"])

    @property
    def token_counts(self) -> Int64[Tensor, " vocab"]:
        """How often each token occurs in the calibration windows."""
        return self._load(HEAD_NAME)["token_counts"]

    def block(self, index: int) -> dict[str, LinearMoments]:
        """Moments of the seven linear layers of block `index`, by Hugging Face module path.

        q/k/v share one `input` tensor object, and so do gate/up.
        """
        if not 0 <= index < self.n_layers:
            raise UsageError(
                "no such block", where=self.folder, expected=f"0..{self.n_layers - 1}", found=index
            )
        tensors = self._load(block_name(index))
        return {
            f"model.layers.{index}.{linear}": self._linear(moment, tensors.get(f"{linear}.grad"))
            for name, members in INPUTS.items()
            for moment in [self._input(index, name, tensors[f"{name}.input"])]
            for linear in members
        }

    def linear(self, path: str) -> LinearMoments:
        """Moments of the one linear at `path`; reads and unpacks nothing else.

        Raises UsageError when the path is not of a linear of a block.
        """
        parts = path.split(".", 3)
        linear = parts[-1]
        source = next((name for name, members in INPUTS.items() if linear in members), None)
        if source is None or parts[:2] != ["model", "layers"]:
            raise UsageError("not a linear of a block", where=self.folder, found=path)
        name = block_name(int(parts[2]))
        keys = [f"{source}.input", *([f"{linear}.grad"] if self.gradients else [])]
        tensors = self._load(name, keys)
        moment = self._input(int(parts[2]), source, tensors[keys[0]])
        return self._linear(moment, tensors.get(f"{linear}.grad"))

    def head(self) -> LinearMoments:
        """Moment of what lm_head reads, the final normed hidden state.

        `grad` is None: vocab x vocab numbers would be of no use.
        """
        return LinearMoments(unpack(self._load(HEAD_NAME)["lm_head.input"]), None, self.tokens)

    def embedding_grad(self) -> Float64[Tensor, "d_model d_model"] | None:
        """Sum of g g^T with g = dLoss/d(embedding row looked up), or None without gradients."""
        if not self.gradients:
            return None
        return unpack(self._load(EMBEDDING_NAME)["embed_tokens.grad"])

    def _input(self, index: int, name: str, packed: Tensor) -> Tensor:
        """The input moment `name` of block `index`, shrunk to the prior if there is one."""
        moment = unpack(packed)
        if self.prior is None:
            return moment
        key = f"{name}.input"
        known = unpack(self.prior._load(block_name(index), [key])[key])
        return blended(moment, self.tokens, known, PRIOR_WORTH)

    def _linear(self, moment: Tensor, grad: Tensor | None) -> LinearMoments:
        if grad is None:
            return LinearMoments(moment, None, self.tokens)
        return LinearMoments(moment, unpack(grad), self.tokens, self.grad_tokens)

    def _load(self, name: str, keys: Sequence[str] | None = None) -> Mapping[str, Tensor]:
        """The tensors of a file, or only those of `keys`."""
        path = self.folder / name
        hint = f"delete {self.folder} and calibrate again"
        if not path.is_file():
            raise MissingFileError("file of the calibration is missing", where=path, hint=hint)
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in keys or file.keys()}
        except SafetensorError as error:
            raise IntegrityError(
                "not a readable safetensors file", where=path, found=str(error), hint=hint
            ) from None


def block_name(index: int) -> str:
    """File name of the moments of block `index`.

    >>> block_name(7)
    'block.0007.safetensors'
    """
    return f"block.{index:04d}.safetensors"
