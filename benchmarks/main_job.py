"""The main job, measured: `make demo` itself, then --keep 0.8 against its peers on WikiText-2.

    python benchmarks/main_job.py --calib wikitext2_raw_calib.txt --eval wikitext2_raw_eval.txt

Each row is one command line of the product, evaluated by it after save and reload, at the same
number of stored parameters: plain truncated SVD, activation-aware SVD (SVD-LLM's objective), the
same with interpolative storage, K-FAC, and the default (K-FAC, one budget, joint trees); then a
three-core MPO everywhere. All rows share one calibration. Rows are written as they come; `--only
NAME` runs one again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "main_job.json"
EVAL_TOKENS = 16384
CALIB_TOKENS = 16384
SVD = ("--format", "lowrank", "--allocation", "uniform")
ROWS = {
    "default": (),
    "svd": (*SVD, "--gauge", "none", "--metric", "plain"),
    "activation_svd": (*SVD, "--gauge", "none", "--metric", "activation"),
    "activation_svd_interpolative": (*SVD, "--metric", "activation"),
    "kfac_svd_interpolative": (*SVD, "--metric", "kfac"),
    "kfac_global": (
        "--format",
        "lowrank",
    ),
    "mpo_3_cores": ("--format", "mpo", "--sites", "3"),
}


def main() -> None:
    """Run the rows and write the result file."""
    arguments = parse()
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}
    if arguments.only in (None, "demo"):
        results["demo"] = demo()
        save(results)
    if arguments.only == "demo":
        return
    results |= {"calib": sha(arguments.calib), "eval": sha(arguments.eval)}
    results |= {"calib_tokens": CALIB_TOKENS, "eval_tokens": EVAL_TOKENS}
    with tempfile.TemporaryDirectory() as folder:
        names = [name for name in ROWS if arguments.only in (None, name)]
        moments = arguments.moments
        if names and moments is None:
            moments = calibrate(arguments, Path(folder))
        for name in names:
            results["rows"][name] = wikitext_row(arguments, ROWS[name], moments)
            save(results)


def demo() -> dict[str, Any]:
    """What `make demo` runs after installation, timed as a process."""
    with tempfile.TemporaryDirectory() as folder:
        return measured(["--effort", "fast", "--sae_dir", "embedded"], Path(folder) / "demo")


def calibrate(arguments: argparse.Namespace, folder: Path) -> Path:
    """The moments all rows share, measured once on the calibration half of WikiText-2."""
    words = ["calibrate", *calibration_flags(arguments), "--out", str(folder / "calibration")]
    subprocess.run([sys.executable, str(ROOT / "main.py"), *words], check=True)
    return folder / "calibration" / "work" / "moments"


def calibration_flags(arguments: argparse.Namespace) -> list[str]:
    """The text and size of the calibration."""
    words = ["--calib_text", str(arguments.calib), "--calib_tokens", str(CALIB_TOKENS)]
    return [*words, "--context", "1024"]


def wikitext_row(
    arguments: argparse.Namespace, flags: tuple[str, ...], moments: Path
) -> dict[str, Any]:
    """One conversion at --keep 0.8, calibrated and evaluated on the two halves of WikiText-2."""
    words = ["--effort", "fast", "--keep", "0.8", *calibration_flags(arguments)]
    words += ["--eval_text", str(arguments.eval), "--eval_tokens", str(EVAL_TOKENS)]
    words += ["--moments", str(moments), *flags]
    with tempfile.TemporaryDirectory() as folder:
        return measured(words, Path(folder) / "run")


def measured(words: list[str], out: Path) -> dict[str, Any]:
    """Run the main job once: wall seconds and peak memory of the process, numbers of its report."""
    command = [sys.executable, str(ROOT / "main.py"), *words, "--out", str(out)]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"failed: {' '.join(command)}")
    report = json.loads((out / "report.json").read_text())
    texts = {
        name: {
            "ppl_dense": text["dense"]["ppl"],
            "ppl": text["converted"]["ppl"],
            "ratio": text["converted"]["ppl"] / text["dense"]["ppl"],
            "kl": text["kl"],
            "top1_agreement": text["top1_agreement"],
            "tokens": text["tokens"],
        }
        for name, text in report["quality"]["texts"].items()
    }
    compression = report["compression"]
    shutil.rmtree(out)
    return {
        "command": "python main.py " + " ".join(shareable(words)),
        "wall_seconds": round(time.monotonic() - started, 1),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "machine": machine(),
        "seed": report["provenance"]["settings"]["seed"],
        "versions": report["provenance"]["versions"],
        "git": report["provenance"]["git"],
        **{key: compression[key] for key in ("keep", "params_ratio", "bytes_ratio", "dtype")},
        "texts": texts,
        "seconds": report["cost"]["seconds"],
        "warnings": report["warnings"],
    }


def shareable(words: list[str]) -> list[str]:
    """The command line without --moments, so that it runs anywhere, and texts by name alone."""
    if "--moments" in words:
        at = words.index("--moments")
        words = words[:at] + words[at + 2 :]
    return [Path(word).name if word.endswith(".txt") else word for word in words]


def machine() -> dict[str, Any]:
    """What the times depend on."""
    return {"platform": platform.platform(), "cpu": cpu_name(), "cores": os.cpu_count()}


def cpu_name() -> str:
    """The processor's own name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def sha(path: Path) -> dict[str, str]:
    """Name and sha256 of a text."""
    import hashlib

    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def save(results: dict[str, Any]) -> None:
    """Write the result file after every row."""
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """The two texts and which row to run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = ROOT.parent / "shared" / "data"
    parser.add_argument("--calib", type=Path, default=data / "wikitext2_raw_calib.txt")
    parser.add_argument("--eval", type=Path, default=data / "wikitext2_raw_eval.txt")
    parser.add_argument("--moments", type=Path, help="moments of an earlier calibration, if any")
    parser.add_argument("--only", choices=["demo", *ROWS])
    return parser.parse_args()


if __name__ == "__main__":
    main()
