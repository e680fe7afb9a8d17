"""Does a conversion keep more features when it is told to, and what does that cost?

    python -m benchmarks.features --sae_dir saes --calib wikitext2_raw_calib.txt \
        --eval wikitext2_raw_eval.txt

At keep 0.9, 0.8 and 0.6, by closed forms alone (`--effort fast`): the ordinary K-FAC metric against
`--feature_weight 1`, and 4 at keep 0.8, at the same number of stored parameters, each evaluated by
the main job after save and reload. A row holds perplexity over dense on two texts and, for every
autoencoder, the shares of measured features and of effects kept, beside the bfloat16 floor. Moments
are measured once per weight. Rows are written as they come; `--only NAME` runs one again.

Writes benchmarks/results/features.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.main_job import machine, sha

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "features.json"
# weight of features -> shares of the parameters that are kept
ROWS = {0.0: (0.8, 0.6, 0.9), 1.0: (0.8, 0.6, 0.9), 4.0: (0.8,)}
CALIB_TOKENS = 16384
EVAL_TOKENS = 8192


def main() -> None:
    """Run the rows and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sae_dir", type=Path, required=True)
    parser.add_argument("--llama_dir", type=Path, help="checkpoint; default: the embedded one")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--labels", default="sampled", help="as main.py takes it; or text")
    parser.add_argument("--only", help="one row, for instance keep0.8_weight1")
    arguments = parser.parse_args()
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}
    results |= {
        "machine": machine(),
        "command": " ".join(["python -m benchmarks.features", *map(shareable, sys.argv[1:])]),
        "calib": sha(arguments.calib),
        "eval": sha(arguments.eval),
        "calib_tokens": CALIB_TOKENS,
        "eval_tokens": EVAL_TOKENS,
    }
    chosen = {name: row for name, row in row_names().items() if arguments.only in (None, name)}
    with tempfile.TemporaryDirectory() as folder:
        for weight in dict.fromkeys(weight for _, weight in chosen.values()):
            moments = calibrated(arguments, weight, Path(folder) / f"moments{weight:g}")
            for name, (keep, own) in chosen.items():
                if own == weight:
                    out = Path(folder) / name
                    results["rows"][name] = measured(arguments, keep, weight, moments, out)
                    RESULT.write_text(json.dumps(results, indent=1) + "\n")


def row_names() -> dict[str, tuple[float, float]]:
    """(keep, weight) of every row by its name.

    >>> row_names()["keep0.8_weight4"]
    (0.8, 4.0)
    """
    return {
        f"keep{keep}_weight{weight:g}": (keep, weight)
        for weight, keeps in ROWS.items()
        for keep in keeps
    }


def shareable(word: str) -> str:
    """A path by its last name, any other word as it is.

    >>> shareable("/data/texts/a.txt"), shareable("--only")
    ('a.txt', '--only')
    """
    return Path(word).name if "/" in word else word


def calibrated(arguments: argparse.Namespace, weight: float, out: Path) -> Path:
    """The moments of one weight, which its rows share."""
    qll("calibrate", arguments, weight, out)
    return out / "work" / "moments"


def measured(
    arguments: argparse.Namespace, keep: float, weight: float, moments: Path, out: Path
) -> dict[str, Any]:
    """One run of the main job, and what its report says."""
    qll("run", arguments, weight, out, "--keep", keep, "--moments", moments, "--effort", "fast")
    return row_of(json.loads((out / "report.json").read_text()), weight)


def row_of(report: dict[str, Any], weight: float) -> dict[str, Any]:
    """keep, perplexity over dense per text, and per place the shares kept.

    >>> survival = {"kept_share": {"unweighted": 0.5}, "measured": 9}
    >>> layer = {"hookpoint": "layers.9", "survival": survival, "causal": {"kept_share": 0.4},
    ...          "controls": {"floor": survival}}
    >>> text = {"dense": {"ppl": 10.0}, "converted": {"ppl": 15.0}}
    >>> settings = {"convert": {"labels": "sampled"}}
    >>> row = row_of({"compression": {"keep": 0.8, "params_ratio": 0.84},
    ...               "provenance": {"settings": settings},
    ...               "quality": {"texts": {"t": text}}, "sae": {"layers": {"9": layer}}}, 1.0)
    >>> row["ppl_ratio"], row["features"]["layers.9"]["kept"]
    ({'t': 1.5}, 0.5)
    """
    return {
        "feature_weight": weight,
        "labels": report["provenance"]["settings"]["convert"]["labels"],
        "keep": report["compression"]["keep"],
        "params_ratio": report["compression"]["params_ratio"],
        "ppl_ratio": {
            name: text["converted"]["ppl"] / text["dense"]["ppl"]
            for name, text in report["quality"]["texts"].items()
        },
        "features": {
            layer["hookpoint"]: {
                "measured": layer["survival"]["measured"],
                "kept": layer["survival"]["kept_share"]["unweighted"],
                "interval": layer["survival"].get("certainty", {}).get("kept_share_interval"),
                "floor": layer["controls"]["floor"]["kept_share"]["unweighted"],
                "effects_kept": layer["causal"].get("kept_share"),
            }
            for layer in report["sae"]["layers"].values()
        },
    }


def qll(verb: str, arguments: argparse.Namespace, weight: float, out: Path, *more: object) -> None:
    """`main.py VERB` with the texts and autoencoders of this benchmark."""
    words = [verb, "--sae_dir", arguments.sae_dir, "--feature_weight", weight, "--out", out]
    words += ["--labels", arguments.labels]
    words += ["--calib_text", arguments.calib, "--calib_tokens", CALIB_TOKENS]
    words += ["--eval_text", arguments.eval, "--eval_tokens", EVAL_TOKENS, *more]
    if arguments.llama_dir is not None:
        words += ["--llama_dir", arguments.llama_dir]
    command = [sys.executable, str(ROOT / "main.py"), *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
