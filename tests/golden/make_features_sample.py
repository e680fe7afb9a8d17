"""Make features_sample.json: an invented page of one autoencoder, in the shape of a real one.

Numbers are seeded noise around plausible curves, texts are the licence of Python; tests of the page
use it so that they need no model. Run from the project's folder:

    python tests/golden/make_features_sample.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from qll.lens.critical import rank_at
from qll.lens.weight_table import KEEPS
from qll.report import page_value

TARGET = Path(__file__).with_name("features_sample.json")
TEXT = """The stack is used to store the frame of each call. When a function returns, its frame is
removed and the value is pushed on the stack of the caller. An exception unwinds the stack until a
handler is found; without one, the interpreter prints a traceback and exits. """
WIDTH, ROWS, TOKENS = 2304, 640, 3964
SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
}
MATRICES = [
    ("9.self_attn.o_proj", "write", (576, 576)),
    ("9.mlp.down_proj", "write", (576, 1536)),
    *((f"{block}.{path}", "read", shape) for block in (10, 11) for path, shape in SHAPES.items()),
]


def arrays(hand: torch.Generator) -> dict[str, torch.Tensor]:
    """Numbers by feature, as a study leaves them."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=hand)

    rank = noise(WIDTH)
    density = 10 ** (-3.6 + 2.8 * rank**3)
    measured = torch.arange(WIDTH) < ROWS
    density[:ROWS] = density[:ROWS].clamp(min=30 / TOKENS)
    r = 1 - 0.55 * noise(WIDTH) ** 3.2
    r[3], r[17] = 0.12, 0.0
    after = density * (0.75 + 0.5 * noise(WIDTH))
    after[17] = 0
    found = torch.where(r >= 0.9, 0, torch.where(r >= 0.5, 1, 2)).to(torch.int8)
    found[17] = 3
    spread = 0.02 + 0.05 * noise(WIDTH)
    ranks = torch.tensor([min(shape) for _, _, shape in MATRICES])
    bonds = (ranks[:, None] * (0.1 + 0.75 * noise(len(MATRICES), WIDTH) ** 0.7)).int()
    return {
        "r": r,
        "low": r - spread,
        "high": (r + spread).clamp(max=1),
        "jaccard": r**2,
        "direction": 0.9 + 0.2 * noise(WIDTH) * r,
        "gain": 0.85 + 0.2 * noise(WIDTH) * r,
        "density": density,
        "density_after": after,
        "peak": 2 + 20 * noise(WIDTH),
        "causal": torch.where(rank > 0.3, r**0.5 * 0.97, torch.nan),
        "class": torch.where(measured, found, -1).to(torch.int8),
        "damaged": measured & (r + 1.5 * spread < 0.9),
        "sure": measured & (r - 1.5 * spread > 0.9),
        "asked": torch.arange(WIDTH),
        "rho": 1 - 0.4 * noise(len(MATRICES), WIDTH) ** 2,
        "critical": bonds,
    }


def survival(r: torch.Tensor, classes: list[int], **more: Any) -> dict[str, Any]:
    edges = torch.linspace(0, 1, 101)
    kept = float((r >= 0.9).float().mean())
    return {
        **dict(zip(("kept", "blurred", "lost", "silenced"), classes, strict=True)),
        "unmeasured": WIDTH - ROWS,
        "measured": ROWS,
        "tokens": TOKENS,
        "kept_share": {"unweighted": kept, "by_fires": kept**0.8, "by_energy": kept**0.5},
        "r_quantiles": torch.quantile(r, edges).tolist(),
        "medians": {name: float(r.median()) ** power for name, power in
                    (("r", 1), ("jaccard", 3), ("firm_jaccard", 2), ("direction", 0.2))},
        "births_per_token": 24 * (1 - kept) / 3,
        "deaths_per_token": 24 * (1 - kept) / 3,
        **more,
    }  # fmt: skip


def entry(features: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The autoencoder's entry of report.json."""
    r, kinds = features["r"][:ROWS], features["class"][:ROWS]
    strata = [{"level": level, "features": 320 + 100 * level, "kept_share": 0.9 + 0.04 * level}
              for level in (-3, -2, -1)]  # fmt: skip
    quarters = [{"level": level, "features": ROWS // 4, "kept_share": 0.5 + 0.09 * level}
                for level in (1, 2, 3, 4)]  # fmt: skip
    sure = {"damaged": int(features["damaged"].sum()), "kept": int(features["sure"].sum())}
    sure["undecided"] = ROWS - sum(sure.values())
    sure |= {"kept_share_interval": [0.57, 0.64], "documents": 16, "false_discovery_rate": 0.05}
    counts = [int((kinds == number).sum()) for number in range(4)]
    order = r.argsort().tolist()
    ranks = [min(shape) for _, _, shape in MATRICES]
    bonds = features["critical"].double()
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    limits = [torch.tensor([rank_at(keep, *shape) for _, _, shape in MATRICES]) for keep in KEEPS]
    kept = [bonds <= limit[:, None] for limit in limits]
    return {
        "text": "python_topics_evaluation",
        "hookpoint": "layers.9",
        "place_fvu": {"layers.8": 0.31, "layers.9": 0.151, "layers.10": 0.29},
        "dense": {"fvu": 0.151, "l0": 24.0, "ce_score": 0.931, "dead": 41},
        "converted": {"fvu": 0.184, "l0": 24.0, "ce_score": 0.902, "dead": 58},
        "survival": survival(r, counts, certainty=sure, by_density=strata, by_peak=quarters),
        "controls": {
            "floor": survival(1 - (1 - r) * 0.04, [ROWS, 0, 0, 0]),
            "matched_noise": survival(1 - (1 - r) * 0.55, [600, 40, 0, 0]),
            "shuffled": survival((r - 0.9) * 0.2, [0, 0, ROWS, 0]),
        },
        "ledger": {"changed": 0.41, "born": 0.17, "died": 0.19, "dark": 0.38, "cross": -0.15},
        "causal": {"edits": 1536, "features": 702, "quartiles": [0.81, 0.93, 0.98],
                   "kept_share": 0.62, "lost_share": 0.04, "length_ratio": 0.97},
        "weights": {
            "metric": "kfac",
            "features": WIDTH,
            "matrices": [
                {
                    "matrix": f"model.layers.{name}",
                    "side": side,
                    "rank": rank,
                    "rho": torch.quantile(rho.double(), quartiles).tolist(),
                    "kept_share": float((rho >= 0.9).float().mean()),
                    "critical": torch.quantile(bond, quartiles).tolist(),
                }
                for (name, side, _), rank, rho, bond in zip(
                    MATRICES, ranks, features["rho"], bonds, strict=True
                )
            ],
            "over_keep": {
                "keep": list(KEEPS),
                "kept_share": [float(one.float().mean()) for one in kept],
                "every": [float(one.all(0).float().mean()) for one in kept],
            },
        },
        "remarkable": {"damaged": order[:40], "robust": order[:-41:-1], "active": [5, 6]},
        "page": "features/layers.9.html",
    }  # fmt: skip


def examples(features: list[int]) -> dict[int, list[dict[str, Any]]]:
    """Three contexts of 23 words each."""
    chance, found = random.Random(0), {}
    words = [(" " if number else "") + word for number, word in enumerate(TEXT.split())]
    for feature in features:
        found[feature] = []
        for _ in range(3):
            start, peak = chance.randrange(len(words) - 23), chance.uniform(3, 20)
            before = [0.0] * 23
            for place in (16, 15, chance.randrange(23)):
                before[place] = peak * chance.uniform(0.3, 1)
            after = [value * chance.uniform(0.2, 1.1) for value in before]
            found[feature].append({"tokens": words[start : start + 23], "before": before,
                                   "after": after, "window": 0, "start": start})  # fmt: skip
    return found


def main() -> None:
    """Write the sample."""
    features = arrays(torch.Generator().manual_seed(0))
    made = entry(features)
    shown = sorted({number for found in made["remarkable"].values() for number in found})
    value = page_value("SmolLM2-135M-Instruct", made, features, examples(shown))
    for found in value["examples"].values():
        for example in found:
            example["before"], example["after"] = (
                [round(number, 3) for number in example[name]] for name in ("before", "after")
            )
    TARGET.write_text(json.dumps(value, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
