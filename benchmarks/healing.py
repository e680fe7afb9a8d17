"""What healing does to a refined model, by learning rate and length: held-out KL before and after.

    python main.py --keep 0.8 --effort balanced --refine_passes 4 --out runs/refined ...
    python benchmarks/healing.py --run runs/refined --rates 1e-5 2e-5 4e-5 --tokens 98304 262144

Every row starts from the saved model again and trains on the run's own calibration texts. The
windows that `heal` holds out of them decide; no evaluation text is read. Rows are added to
results/healing.json as they come; those that are there are skipped.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs as a script

import torch

from benchmarks.main_job import machine
from qll import store
from qll.load import builtin_texts, mixed_windows, open_source, open_tokenizer, read_text
from qll.model import load, load_dense
from qll.options import TrainOptions
from qll.train import HealSettings, choose_precision, heal

RESULT = Path(__file__).parent / "results" / "healing.json"
CONTEXT = 512


def main() -> None:
    """Measure every rate at every length."""
    arguments = parse()
    results = store.read_json(RESULT) if RESULT.exists() else {"rows": {}}
    run = described(arguments.run)
    for tokens, rate in itertools.product(arguments.tokens, arguments.rates):
        name = f"keep{run['keep']:g}/passes{run['refine_passes']}/tokens{tokens}/rate{rate:g}"
        if name not in results["rows"]:
            print(name, flush=True)
            row = measured(arguments, run["seed"], rate, tokens)
            results["rows"][name] = {**run, "rate": rate, **row}
            results |= {"machine": machine(), "torch": torch.__version__, "context": CONTEXT}
            store.write_json(RESULT, results)


def described(run: Path) -> dict[str, Any]:
    """What a finished run was told, from its report."""
    settings = store.read_json(run / "report.json")["provenance"]["settings"]
    train = TrainOptions(**settings["train"])
    return {
        "keep": settings["convert"]["keep"],
        "refine_passes": train.passes,
        "refine_tokens": train.refine_tokens,
        "seed": settings["seed"],
    }


def measured(arguments: argparse.Namespace, seed: int, rate: float, tokens: int) -> dict[str, Any]:
    """Held-out KL of the saved model before and after, windows of each text and seconds."""
    device = torch.device("cpu")
    source = open_source(arguments.llama_dir)
    builtin = builtin_texts()
    texts = [builtin[word] if word in builtin else read_text(word) for word in arguments.calib]
    weights = (1.0,) * len(texts)
    windows = mixed_windows(texts, weights, open_tokenizer(source), tokens, CONTEXT, seed)
    dense = load_dense(source, torch.float32, device)
    converted = load(arguments.run / "model", device=device, dtype=torch.float32, verify=False)
    settings = HealSettings(tokens, (rate,), precision=choose_precision("auto", device), seed=seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        facts = heal(dense, converted, windows, Path(work), settings)
    return {**facts, "windows": len(windows), "seconds": round(time.monotonic() - started, 1)}


def parse() -> argparse.Namespace:
    """Which run, on which texts, how fast and how long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a finished, refined run")
    parser.add_argument("--llama_dir", type=Path, help="its checkpoint; default: the embedded one")
    parser.add_argument("--calib", nargs="+", required=True, help="files, or texts Python ships")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-5, 2e-5, 4e-5, 8e-5])
    parser.add_argument("--tokens", nargs="+", type=int, default=[98304, 262144])
    return parser.parse_args()


if __name__ == "__main__":
    main()
