"""One whole conversion at the shape of Llama 3 8B: seconds per stage, peak memory, bytes.

    python benchmarks/llama3_8b.py --work /data/llama3_8b             all 32 blocks, hours
    python benchmarks/llama3_8b.py --work /data/llama3_8b --blocks 8  a stand-in of 8 blocks
    python benchmarks/llama3_8b.py --work /data/llama3_8b --blocks 1 --metric kfac --format auto \
        --context 2048 --result benchmarks/results/llama3_8b_kfac.json

Makes a stand-in with `make_llama` in WORK (or takes --model), runs `main.py convert` on it as a
process while its memory is sampled, then `main.py verify`. A run that was stopped goes on where it
was when the same command is given again; the seconds of all attempts count. Writes
benchmarks/results/llama3_8b_shape.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs as a script

from benchmarks import make_llama
from benchmarks.llama_shapes import SHAPES
from benchmarks.main_job import machine
from qll import store
from qll.calibrate.moments import SUMMARY_NAME
from qll.runfolder import total_seconds

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "llama3_8b_shape.json"
TOKENS, CONTEXT, KEEP = 4096, 512, 0.8
SAMPLE_SECONDS = 0.25


def main() -> None:
    """Convert, verify, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with room for 70 GB")
    parser.add_argument("--model", type=Path, help="a stand-in that is there already")
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--blocks", type=int, help="fewer blocks than the original")
    parser.add_argument("--metric", default="activation")
    parser.add_argument("--format", default="lowrank")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the calibration")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of a window")
    parser.add_argument("--calib", type=Path, help="a text; default: Python's documentation")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape].with_blocks(arguments.blocks)
    source = arguments.model or arguments.work / f"{arguments.shape}-{shape.n_layers}"
    if not (source / "config.json").is_file() and not (source / "params.json").is_file():
        store.remove(source)
        make_llama.make(shape, "hf", source)
    windows = f"{arguments.tokens}x{arguments.context}"
    kind = f"{arguments.metric}-{arguments.format}-{windows}"
    out = arguments.work / f"converted-{shape.n_layers}-{kind}"
    attempts = out.with_suffix(".attempts.jsonl")
    store.make_folder(arguments.work)
    measured(conversion(source, out, arguments), attempts, "convert")
    measured(["verify", "--model", str(out / "model")], attempts, "verify")
    store.write_json(arguments.result, result(arguments, shape, source, out, attempts))
    print(arguments.result)


def conversion(source: Path, out: Path, arguments: argparse.Namespace) -> list[str]:
    """The words of the conversion after `main.py`."""
    words = ["convert", "--llama_dir", str(source), "--out", str(out), "--keep", str(KEEP)]
    words += ["--format", arguments.format, "--metric", arguments.metric, "--effort", "fast"]
    words += ["--calib_text", str(arguments.calib)] if arguments.calib else []
    return [*words, "--calib_tokens", str(arguments.tokens), "--context", str(arguments.context)]


def measured(words: list[str], attempts: Path, name: str) -> None:
    """Run main.py and note its seconds and peaks; raises SystemExit when it fails."""
    if any(line["name"] == name and line["status"] == 0 for line in store.read_lines(attempts)):
        return
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, str(ROOT / "main.py"), *words])
    peak = 0
    while process.poll() is None:
        peak = max(peak, own_memory(process.pid))
        time.sleep(SAMPLE_SECONDS)
    line = {"name": name, "status": process.returncode, "peak": peak}
    store.append_line(attempts, line | {"seconds": round(time.monotonic() - started, 1)})
    if process.returncode != 0:
        raise SystemExit(f"failed: main.py {' '.join(words)}")


def own_memory(process: int) -> int:
    """Bytes of memory that are the process's own; mapped files, which are cache, are not counted.

    >>> own_memory(os.getpid()) > 0
    True
    """
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:  # it ended
        return 0
    found = [line.split() for line in text.splitlines() if line.startswith(("RssAnon", "RssShmem"))]
    return sum(int(words[1]) << 10 for words in found)


def result(
    arguments: argparse.Namespace, shape: Any, source: Path, out: Path, attempts: Path
) -> dict[str, Any]:
    """What is committed."""
    lines = store.read_lines(attempts)
    manifest = store.read_manifest(out / "model")
    plan = store.read_json(out / "plan.json")
    errors = [row["metric_error"] for row in manifest["matrices"] if "layers" in row["name"]]
    whole = SHAPES[arguments.shape].n_layers
    return {
        "shape": arguments.shape,
        "blocks": shape.n_layers,
        "blocks_of_the_original": whole,
        "note": None
        if shape.n_layers == whole
        else f"a stand-in of {shape.n_layers} of {whole} blocks, embedding and head whole",
        "wall_seconds": round(sum(line["seconds"] for line in lines if line["name"] == "convert")),
        "peak_rss_bytes": max(line["peak"] for line in lines if line["name"] == "convert"),
        "peak_rss_counts": "anonymous pages, sampled; mapped files are page cache",
        "bytes_in": weight_bytes(source),
        "bytes_out": weight_bytes(out / "model"),
        "stages": total_seconds(out / "events.jsonl"),
        "verify": {
            key: next(
                line[key] for line in lines if line["name"] == "verify" and not line["status"]
            )
            for key in ("seconds", "peak")
        },
        "attempts": sum(line["name"] == "convert" for line in lines),
        "block_params_ratio": round(plan["block_params"] / (plan["budget"] / KEEP), 4),
        "metric_error": {"mean": round(sum(errors) / len(errors), 4), "max": max(errors)},
        "planner": planned(arguments, shape.n_layers),
        "settings": {
            "keep": KEEP,
            "format": arguments.format,
            "gauge": "interpolative",
            "metric": arguments.metric,
            "calib_text": arguments.calib.name if arguments.calib else None,
            "calib_tokens": calibration_tokens(out),
            "context": arguments.context,
        },
        "machine": machine(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "torch": version("torch"),
        "command": f"python benchmarks/llama3_8b.py --blocks {shape.n_layers} --metric "
        f"{arguments.metric} --format {arguments.format} --tokens {arguments.tokens} "
        f"--context {arguments.context}"
        + (f" --calib {arguments.calib.name}" if arguments.calib else "")
        # as it would be kept: another run's file is not to be written over
        + (
            f" --result benchmarks/results/{arguments.result.name}"
            if arguments.result.name != RESULT.name
            else ""
        ),
    }


def calibration_tokens(out: Path) -> int | None:
    """The tokens a run was calibrated on, or None when its metric needed none."""
    summary = out / "work" / "moments" / SUMMARY_NAME
    return store.read_json(summary)["tokens"] if summary.is_file() else None


def planned(arguments: argparse.Namespace, blocks: int) -> dict[str, Any] | None:
    """What `main.py plan --shape` says about this run, or None when it is not to be had."""
    words = ["plan", "--shape", arguments.shape, "--keep", str(KEEP), "--machine", "cpu2"]
    words += ["--metric", arguments.metric, "--calib_tokens", str(arguments.tokens), "--json"]
    found = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *words], capture_output=True, text=True, check=False
    )
    try:
        return {"blocks_run": blocks, "whole_model": json.loads(found.stdout)}
    except json.JSONDecodeError:
        return None


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.pth")]
    return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    main()
