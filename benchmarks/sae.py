"""Sparse autoencoders against eai-sparsify and sae-lens: training, and encoding plus decoding.

    pip install --target DIR eai-sparsify sae-lens
    python benchmarks/sae.py --peers DIR --text anarchism.txt   # --quick: seconds, not kept

training   4,608 features of width 576, k = 32, on the same activations of SmolLM2's block 9 with as
           many tokens per step; tokens per second, and FVU on activations that no row saw.
           sparsify runs its own Trainer with its defaults, and once more with Adam.
coding     131,072 features of width 4,096, k = 192, random weights in bfloat16: encode and decode.

Every row is a process of its own (`sae_rows.py`), so peak memory is its own. Rows are written as
they come; `--only PATTERN` runs some again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs as a script

from benchmarks.main_job import ROOT, machine

RESULT = ROOT / "benchmarks" / "results" / "sae.json"
CACHE = ROOT / "benchmarks" / ".cache" / "sae"
ROWS = (
    *("training/qll", "training/sparsify", "training/sparsify_adam"),
    *("coding/qll", "coding/qll_bfloat16", "coding/sparsify", "coding/sae_lens"),
)
FULL = {
    "training": {"d_in": 576, "expansion": 8, "k": 32, "tokens": 393216, "batch_tokens": 2048},
    "coding": {"d_in": 4096, "d_sae": 131072, "k": 192, "tokens": 512},
}
QUICK = {
    "training": {"d_in": 32, "expansion": 4, "k": 4, "tokens": 8192, "batch_tokens": 512},
    "coding": {"d_in": 64, "d_sae": 1024, "k": 16, "tokens": 256},
}


def main() -> None:
    """Run the rows and write the result file."""
    arguments = parse()
    sizes = QUICK if arguments.quick else FULL
    results: dict[str, Any] = {"rows": {}}
    if RESULT.exists() and not arguments.quick:
        results = json.loads(RESULT.read_text())
    text = "Python's topics" if arguments.text is None else arguments.text.name
    results |= {"machine": machine(), "threads": arguments.threads, "sizes": sizes, "text": text}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) if arguments.quick else CACHE
        cache.mkdir(parents=True, exist_ok=True)
        for name in fnmatch.filter(ROWS, arguments.only):
            results["rows"][name] = row(name, sizes, cache, arguments)
            print(name, json.dumps(results["rows"][name]), flush=True)
            if not arguments.quick:
                RESULT.write_text(json.dumps(results, indent=1) + "\n")


def row(
    name: str, sizes: dict[str, Any], cache: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One row, in a fresh process whose peers come from --peers."""
    settings = {**sizes[name.split("/")[0]], "quick": arguments.quick, "threads": arguments.threads}
    settings |= {"text": str(arguments.text) if arguments.text else None}
    settings |= {"peers": str(arguments.peers) if arguments.peers else None}
    threads = str(arguments.threads)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
    # with Triton installed eai-sparsify would look for a GPU
    environment |= {"SPARSIFY_DISABLE_TRITON": "1"}
    command = [sys.executable, "-m", "benchmarks.sae_rows", name, str(cache), json.dumps(settings)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"failed: {name}")
    return json.loads(done.stdout.splitlines()[-1])


def parse() -> argparse.Namespace:
    """Where the peers are, which rows, and how large."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="folder with eai-sparsify and sae-lens")
    parser.add_argument("--only", default="*", help=f"pattern of rows: {', '.join(ROWS)}")
    parser.add_argument("--text", type=Path, help="what SmolLM2 reads; default: Python's topics")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="tiny sizes, result not kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
