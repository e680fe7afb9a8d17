"""How fast a large matrix is factorised, against what others do, at equal error.

    python benchmarks/factorise.py                                   4096 x 14336, an hour
    python benchmarks/factorise.py --rows 1024 --columns 3584 --result /tmp/small.json

The matrix is a gate projection of `make_llama`'s Llama 3 8B. Each method runs in a process of its
own, times itself after its imports, and returns two factors of the rank asked for; their Frobenius
error is compared with the optimal one, sum of the dropped sigma^2 from float64 singular values. A
method is at equal error when it is within 1e-3 of it. Two ranks: what --keep 0.8 leaves, and a
small one. `activation` rows are in the metric of a random second moment of the inputs, as SVD-LLM's
published procedure is: Cholesky factor S of it, full SVD of W S, truncation, S^-1 on the right.
Rows are saved as they come; those that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs as a script

from benchmarks.llama_weights import Weights
from benchmarks.main_job import machine
from qll import store
from qll.convert.metric import Metric
from qll.convert.short_side import short_truncation
from qll.tn.svd import singular_values, truncated_svd

RESULT = Path(__file__).parent / "results" / "factorise.json"
NAME = "model.layers.16.mlp.gate_proj.weight"
TOLERANCE = 1e-3
TOKENS = 2  # of the second moment, per column
Factors = tuple[Tensor, Tensor]


def main() -> None:
    """Run what is missing and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=14336)
    parser.add_argument("--limit", type=float, default=3600, help="seconds per method")
    parser.add_argument("--only", nargs="+", choices=METHODS, help="methods; default: all")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--child", nargs=2, metavar=("METHOD", "RANK"), help=argparse.SUPPRESS)
    parser.add_argument("--optimum", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = (arguments.rows, arguments.columns)
    if arguments.child:
        print(json.dumps(timed(arguments.child[0], shape, int(arguments.child[1]))))
        return
    if arguments.optimum:
        print(json.dumps(optimum(shape)))
        return
    results = read_results(arguments.result, shape)
    if "optimum" not in results:
        results["optimum"] = in_process(["--optimum"], shape, arguments.limit)
    for rank in ranks(shape):
        rows = results["ranks"].setdefault(str(rank), {})
        for method in arguments.only or METHODS:
            if method not in rows:
                words = ["--child", method, str(rank)]
                rows[method] = in_process(words, shape, arguments.limit)
                judge(rows[method], method, rank, results["optimum"])
                store.write_json(arguments.result, results)


def ranks(shape: tuple[int, int]) -> list[int]:
    """The rank whose interpolative storage is 0.8 of the matrix, and a sixteenth of its sides.

    >>> ranks((4096, 14336))
    [3054, 256]
    """
    total, product = sum(shape), shape[0] * shape[1]
    large = int((total - math.sqrt(total**2 - 4 * 0.8 * product)) / 2)
    return [large, min(shape) // 16]


def read_results(path: Path, shape: tuple[int, int]) -> dict[str, Any]:
    """The result file, or a new one for another shape or machine."""
    facts = {
        "shape": list(shape),
        "matrix": NAME,
        "tolerance": TOLERANCE,
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: installed(name) for name in ("torch", "scipy", "tensorly", "torchTT")},
    }
    found = store.read_json(path) if path.exists() else {}
    if all(found.get(key) == value for key, value in facts.items()):
        return found
    return {**facts, "ranks": {}}


def in_process(words: list[str], shape: tuple[int, int], limit: float) -> dict[str, Any]:
    """The JSON that this script prints for `words`, or why there is none."""
    command = [sys.executable, __file__, "--rows", str(shape[0]), "--columns", str(shape[1])]
    started = time.monotonic()
    try:
        found = subprocess.run([*command, *words], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"stopped_after_seconds": round(time.monotonic() - started)}
    if found.returncode != 0:
        return {"failed": found.stderr.strip().splitlines()[-1][:200]}
    return json.loads(found.stdout.splitlines()[-1])


def judge(row: dict[str, Any], method: str, rank: int, optimum: dict[str, Any]) -> None:
    """Add to a row how far its error is above the optimal one."""
    kind = "activation" if method in ACTIVATION else "plain"
    if "error_squared" in row:
        best = optimum[kind][str(rank)]
        row["excess"] = float(f"{math.sqrt(row.pop('error_squared') / best) - 1:.3g}")
        row["equal_error"] = row["excess"] <= TOLERANCE


def optimum(shape: tuple[int, int]) -> dict[str, Any]:
    """The smallest squared error at each rank, plain and in the metric."""
    weight, moment = matrix(shape).double(), second_moment(shape[1])
    plain = singular_values(weight)
    squares = torch.linalg.eigvalsh(weight @ moment @ weight.T).flip(0).clamp(min=0)
    return {
        kind: {str(rank): float(found[rank:].sum()) for rank in ranks(shape)}
        for kind, found in (("plain", plain.square()), ("activation", squares))
    }


def timed(method: str, shape: tuple[int, int], rank: int) -> dict[str, Any]:
    """Seconds of one factorisation and the squared error of its factors."""
    weight = matrix(shape).float()
    moment = second_moment(shape[1]) if method in ACTIVATION else None
    prepared = METHODS[method]()
    wall, cpu = time.perf_counter(), time.process_time()
    left, right = prepared(weight, rank, moment)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    error = weight.double() - left.double() @ right.double()
    seen = error if moment is None else error @ moment
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "error_squared": float((seen * error).sum()),
    }


def matrix(shape: tuple[int, int]) -> Tensor:
    """The matrix, wide: what a gate projection of the stand-in is, transposed."""
    return Weights(n_layers=32).tensor(NAME, (shape[1], shape[0])).T.contiguous()


def second_moment(size: int) -> Tensor:
    """Of random inputs whose channels differ in size, a few of them much, float64."""
    draw = torch.Generator().manual_seed(1)
    scale = torch.rand(size, 1, generator=draw).double() + 0.1
    scale[:: size // 8] *= 20
    inputs = torch.randn(size, TOKENS * size, generator=draw, dtype=torch.float32)
    return scale * (inputs @ inputs.T).double() / inputs.shape[1] * scale.T


# -- methods: a function that imports what it needs and returns (weight, rank, moment) -> factors --
def ours() -> Callable[..., Factors]:
    def run(weight: Tensor, rank: int, moment: Tensor | None) -> Factors:
        u, s, vh, _ = truncated_svd(weight, rank=rank)
        return u * s, vh

    return run


def ours_activation() -> Callable[..., Factors]:
    def run(weight: Tensor, rank: int, moment: Tensor | None) -> Factors:
        network, _, _ = short_truncation(weight, rank, Metric("activation", right=moment))
        return network.cores

    return run


def torch_svd() -> Callable[..., Factors]:
    def run(weight: Tensor, rank: int, moment: Tensor | None) -> Factors:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank] * s[:rank], vh[:rank]

    return run


def tensorly(method: str) -> Callable[[], Callable[..., Factors]]:
    def prepare() -> Callable[..., Factors]:
        import tensorly
        from tensorly.tenalg import svd_interface

        tensorly.set_backend("pytorch")

        def run(weight: Tensor, rank: int, moment: Tensor | None) -> Factors:
            options = {"random_state": 0} if method == "randomized_svd" else {}
            u, s, vh = svd_interface(weight, method=method, n_eigenvecs=rank, **options)
            return u[:, :rank] * s[:rank], vh[:rank]

        return run

    return prepare


def torchtt() -> Callable[..., Factors]:
    import torchtt

    def run(weight: Tensor, rank: int, moment: Tensor | None) -> Factors:
        network = torchtt.TT(weight, eps=0.0, rmax=rank)
        return network.cores[0][0], network.cores[1][:, :, 0]

    return run


def svd_llm() -> Callable[..., Factors]:
    """The steps of SVD-LLM (Wang et al. 2024, algorithm 1): Cholesky in float64, the rest in the
    dtype of the weights."""

    def run(weight: Tensor, rank: int, moment: Tensor | None) -> Factors:
        scale = torch.linalg.cholesky(moment).float()
        inverse = torch.linalg.inv(scale)
        u, s, vh = torch.linalg.svd(weight @ scale, full_matrices=False)
        root = s[:rank].sqrt()
        return u[:, :rank] * root, (root[:, None] * vh[:rank]) @ inverse

    return run


METHODS: dict[str, Callable[[], Callable[..., Factors]]] = {
    "ours": ours,
    "torch_svd": torch_svd,
    "tensorly_truncated": tensorly("truncated_svd"),
    "tensorly_symeig": tensorly("symeig_svd"),
    "tensorly_randomized": tensorly("randomized_svd"),
    "torchtt": torchtt,
    "ours_activation": ours_activation,
    "svd_llm": svd_llm,
}
ACTIVATION = ("ours_activation", "svd_llm")


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
