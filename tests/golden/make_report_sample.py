"""Make report_sample.json: a hand-made report in the shape of the embedded model, 30 blocks.

The numbers are invented (smooth curves over depth plus seeded noise), the structure is the real
one; tests of the page use it so that they need no model. Run from the project's folder:

    python tests/golden/make_report_sample.py
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from qll.report import build_report

TARGET = Path(__file__).with_name("report_sample.json")
MEASURED = [
    {"kind": "lowrank q_proj", "first": 0, "last": 4, "predicted": 0.0057, "measured": 0.0039},
    {"kind": "lowrank gate_proj", "first": 0, "last": 4, "predicted": 0.0022, "measured": 0.0071},
]
LAYERS = 30
SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
STRUCTURE = {  # how far below a random matrix the spectrum lies, 0 to 1
    "self_attn.q_proj": 0.85,
    "self_attn.k_proj": 0.80,
    "self_attn.v_proj": 0.35,
    "self_attn.o_proj": 0.30,
    "mlp.gate_proj": 0.40,
    "mlp.up_proj": 0.25,
    "mlp.down_proj": 0.28,
}
SITES = {576: (8, 8, 9), 192: (4, 6, 8), 1536: (8, 12, 16)}
POINTS = 48


def random_nats(rows: int, columns: int) -> float:
    """Entropy of a real Gaussian matrix at its ordinary cut, leading orders."""
    small, large = sorted((rows, columns))
    return math.log(small) - (small + 1) / (2 * large)


def depth_curve(layer: int, strength: float) -> float:
    """More structure in the first blocks and a little in the last ones."""
    start = math.exp(-layer / 4.0)
    end = math.exp(-(LAYERS - 1 - layer) / 3.0)
    return strength * (0.35 + 0.9 * start + 0.25 * end)


class Maker:
    """Draws one consistent report from a seed."""

    def __init__(self, seed: int) -> None:
        self.noise = random.Random(seed)

    def matrix(self, name: str, kind: str, layer: int) -> dict[str, Any]:
        """One row of compression.per_matrix."""
        out, into = SHAPES[kind]
        dense = out * into
        structure = depth_curve(layer, STRUCTURE[kind]) + self.noise.gauss(0, 0.02)
        share = max(0.35, 0.93 - 0.42 * structure + self.noise.gauss(0, 0.03))
        if share > 0.93:
            return self.dense_row(name, (out, into))
        half = (out + into) / 2  # rank r stores r (out + into) - r^2 numbers in this gauge
        rank = max(8, round(half - math.sqrt(half**2 - share * dense)))
        error = (1 - rank / min(out, into)) ** 1.2 * (0.62 - 0.25 * min(structure, 1.0))
        return {
            "name": name,
            "format": "lowrank",
            "shape": [out, into],
            "modes": {"out": [out], "in": [into]},
            "ranks": [rank],
            "gauge": "interpolative",
            "params": rank * (out + into) - rank * rank + rank,
            "params_dense": dense,
            "rel_error": round(error, 5),
            "metric_error": round(error * (0.35 + 0.15 * self.noise.random()), 5),
            "discarded_weight": round((error * 0.4) ** 2, 7),
        }

    def dense_row(self, name: str, shape: tuple[int, int]) -> dict[str, Any]:
        """A matrix that the plan left as it was."""
        return {
            "name": name,
            "format": "dense",
            "shape": list(shape),
            "modes": None,
            "ranks": [],
            "gauge": "none",
            "params": shape[0] * shape[1],
            "params_dense": shape[0] * shape[1],
            "rel_error": 0.0,
            "metric_error": 0.0,
            "discarded_weight": 0.0,
        }

    def entropies(self, row: dict[str, Any], kind: str, layer: int) -> list[dict[str, Any]]:
        """Channel cut and the two site cuts of one matrix."""
        out, into = row["shape"]
        modes_out, modes_in = SITES[out], SITES[into]
        first = modes_out[0] * modes_in[0]
        last = modes_out[-1] * modes_in[-1]
        cuts = {
            "channel": (out, into, 1.0),
            "site1": (first, out * into // first, 0.25),
            "site2": (last, out * into // last, 0.3),
        }
        return [self.entropy(row, kind, layer, cut, *sizes) for cut, sizes in cuts.items()]

    def entropy(
        self,
        row: dict[str, Any],
        kind: str,
        layer: int,
        cut: str,
        rows: int,
        columns: int,
        part: float,
    ) -> dict[str, Any]:
        """One entry of entropy.per_matrix."""
        baseline = random_nats(rows, columns)
        gap = part * depth_curve(layer, STRUCTURE[kind]) * (1 + self.noise.gauss(0, 0.04))
        nats = baseline - max(0.01, gap)
        loss = 0.55 * part * (row["rel_error"] or 0.0)
        return {
            "name": row["name"],
            "cut": cut,
            "nats": round(nats, 5),
            "nats_converted": round(nats - loss, 5),
            "nats_random": round(baseline, 5),
            "max_nats": round(math.log(min(rows, columns)), 5),
            "renyi2": round(nats - 0.6 * gap, 5),
            "participation_ratio": round(math.exp(nats - 0.6 * gap), 3),
        }

    def spectrum(self, row: dict[str, Any], kind: str, layer: int) -> dict[str, Any]:
        """Singular values of one matrix over their root mean square, at a few ranks."""
        full = min(row["shape"])
        steps = sorted({1 + round((full - 1) * (i / (POINTS - 1)) ** 2) for i in range(POINTS)})
        structure = depth_curve(layer, STRUCTURE[kind])
        edge = 0.75 * math.sqrt(min(row["shape"]) / max(row["shape"]))
        kept = row["ranks"][0] if row["ranks"] else full
        dense = [self.sigma(step / full, step, structure, edge) for step in steps]
        converted = [s if step <= kept else 0.0 for s, step in zip(dense, steps, strict=True)]
        return {
            "name": row["name"],
            "shape": row["shape"],
            "rank": steps,
            "dense": dense,
            "converted": converted,
        }

    def sigma(self, place: float, step: int, structure: float, edge: float) -> float:
        """A bulk between the random edges plus a power-law head."""
        bulk = 1 + edge - 2 * edge * place**0.8
        head = 3.2 * structure * step**-0.55
        return float(f"{max(0.004, bulk * (1 - 0.4 * structure * place) + head):.4g}")


def texts() -> dict[str, Any]:
    """Quality on two texts: one like the calibration text, one far from it."""
    return {
        "python_topics_evaluation": {
            "sha256": "4f0c3a1be7a95d0f9d1a54b1f5ad4a6f7b7f0a0f6f9f4b8d2a4a4c0d9b3f7e21",
            "tokens": 4096,
            "dense": {"nll": 2.7386, "ppl": 15.464, "bits_per_byte": 0.9214},
            "converted": {"nll": 3.2213, "ppl": 25.061, "bits_per_byte": 1.0838},
            "kl": 0.5127,
            "top1_agreement": 0.7139,
            "leak": {"dense": 0.0, "converted": 3.1e-08},
        },
        "python_source": {
            "sha256": "a90d2f6e54b7c1d83e0c66f1b0a7d9c25be4f08a3d17c6b9e2f5408d1c7ab364",
            "tokens": 4096,
            "dense": {"nll": 2.2108, "ppl": 9.123, "bits_per_byte": 0.8432},
            "converted": {"nll": 2.9936, "ppl": 19.957, "bits_per_byte": 1.1417},
            "kl": 0.8035,
            "top1_agreement": 0.6402,
            "leak": {"dense": 0.0, "converted": 3.1e-08},
        },
    }


def cost() -> dict[str, Any]:
    """Seconds, memory and speed."""
    return {
        "seconds": {
            "load": 1.9,
            "calibrate": 48.2,
            "plan": 21.7,
            "convert": 63.4,
            "evaluate": 92.6,
            "lens": 17.3,
            "report": 2.2,
        },
        "peak_rss_bytes": 3_412_574_208,
        "peak_device_bytes": None,
        "decode_tokens_per_second": {"dense": 22.8, "converted": 19.6},
        "prefill_tokens_per_second": {"dense": 412.0, "converted": 455.0},
        "runtime": {
            "decode_tokens_per_second": {"dense": 33.9, "converted": 37.4},
            "prefill_tokens_per_second": {"dense": 470.0, "converted": 521.0},
        },
        "flops_per_token": {"dense": 269_029_632, "converted": 232_103_424},
    }


def provenance() -> dict[str, Any]:
    """What is needed to run it again."""
    return {
        "command": "python main.py --effort fast --out runs/demo",
        "source_fingerprint": "9be1c8c9a1d34e0f8a1b64c1f2a7c5d0e3b96f7788aa10c2d4e5f60718293a4b",
        "calibration": {
            "text": "python_topics_calibration",
            "sha256": "77d20f6c0b6ce9a1d1f3f4a5b6c7d8e9f00112233445566778899aabbccddeef",
            "tokens": 16384,
        },
        "seeds": {"calibration": 0, "plan": 0},
        "versions": {
            "qll": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
        },
        "machine": {"processor": "x86_64", "cores": 2, "threads": 2, "device": "cpu"},
        "git": "3d17709",
        "finished": "2026-11-21T22:41:07+00:00",
    }


def features() -> dict[str, Any]:
    """What became of the features of one autoencoder."""
    return {
        "hookpoint": "layers.9",
        "dense": {"fvu": 0.1312},
        "converted": {"fvu": 0.1583},
        "survival": {
            "kept": 3120,
            "blurred": 702,
            "lost": 96,
            "silenced": 11,
            "measured": 3929,
            "unmeasured": 679,
            "kept_share": {"unweighted": 0.7941, "by_energy": 0.9032},
        },
        "controls": {"floor": {"kept_share": {"unweighted": 0.9985}}},
        "causal": {"kept_share": 0.71},
        "page": "features/layers.9.html",
    }


def make() -> dict[str, Any]:
    """The sample report."""
    maker = Maker(seed=7)
    rows, entropies, spectra = [], [], []
    for layer in range(LAYERS):
        for kind in SHAPES:
            row = maker.matrix(f"model.layers.{layer}.{kind}", kind, layer)
            rows.append(row)
            entropies += maker.entropies(row, kind, layer)
            spectra.append(maker.spectrum(row, kind, layer))
    kept = sum(row["params"] for row in rows)
    block_params = sum(row["params_dense"] for row in rows)
    rows.append(maker.dense_row("model.embed_tokens", (49152, 576)))
    params = 134_515_008
    params_converted = params - block_params + kept
    return build_report(
        model={
            "name": "SmolLM2-135M-Instruct",
            "source_format": "gguf",
            "row_order": "half_split (stored as interleaved)",
            "params": params,
            "block_params": block_params,
            "d_model": 576,
            "d_ff": 1536,
            "n_layers": LAYERS,
            "n_heads": 9,
            "n_kv_heads": 3,
            "d_vocab": 49152,
        },
        compression={
            "keep": round(kept / block_params, 4),
            "keep_requested": 0.85,
            "metric": "kfac",
            "params_ratio": round(params_converted / params, 4),
            "bytes_ratio": round(params_converted / params, 4),
            "dtype": "bfloat16",
            "params": {"dense": params, "converted": params_converted},
            "bytes": {"dense": 2 * params, "converted": 2 * params_converted},
            "measured": MEASURED,
            "per_matrix": rows,
        },
        entropy={"per_matrix": entropies, "activations": [], "spectra": spectra},
        quality={"texts": texts()},
        cost=cost(),
        sae={"layers": {"9": features()}},
        warnings=[
            "model.layers.0.mlp.down_proj: second moments have condition 3e+09; ridge 1e-06 added",
            "model.layers.29.self_attn.v_proj: the budget left no rank below dense; kept dense",
        ],
        provenance=provenance(),
    )


if __name__ == "__main__":
    TARGET.write_text(json.dumps(make(), separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{TARGET.name}: {TARGET.stat().st_size} bytes")
