"""Quality at equal parameters and at equal bytes, ours beside every peer: one cell after the other.

    python benchmarks/quality.py --third third.txt          all cells that are not there yet
    python benchmarks/quality.py --list                     the cells, and which are done
    python benchmarks/quality.py --only 'svd_llm/keep0.8/*' some of them
    python benchmarks/quality.py --headline                 the comparison of formats, from rows

A cell is one method at one size on one seed (benchmarks/quality_cells.py) and one row of
results/quality.json, written when it is done; cells that are there are skipped unless --again.
Peers (benchmarks/peers) replace the weights of the dense model; our rows run main.py as far as the
folder it saves, and that is scored. `benchmarks/third_text.py` makes the third text.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs as a script

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.main_job import ROOT, cpu_name, machine
from benchmarks.peers import Case, load_method
from benchmarks.quality_cells import (
    HEADLINE,
    HEADLINE_BASELINES,
    HEADLINE_CONTROL,
    HEADLINE_KEEP,
    SEEDS,
    Cell,
    all_cells,
)
from benchmarks.quality_texts import Texts
from qll import store
from qll.calibrate import MomentStore
from qll.convert.units import linear_shapes
from qll.evaluate import bytes_by_dtype, count_params
from qll.load import builtin_texts
from qll.model import load, load_dense
from qll.runfolder import total_seconds

RESULT = ROOT / "benchmarks" / "results" / "quality.json"
# of the main job in the command that a row prints; rows are scored on the tokens of every row
PRODUCT_EVAL_TOKENS = 2048
PACKAGES = ("torch", "transformers", "numpy", "scipy", "gguf", "tensorly", "tensorly-torch")


def main() -> None:
    """Run the cells that were asked for; exit 1 when one of them failed."""
    arguments = parse()
    cells = [cell for cell in all_cells() if fnmatch.fnmatch(cell.name, arguments.only)]
    if arguments.list:
        print_cells(cells, read(arguments.result))
        return
    if arguments.headline:
        update(arguments.result, headline(read(arguments.result)["rows"]))
        return
    texts = Texts(arguments)
    update(arguments.result, general(texts))
    failed = [cell.name for cell in cells if not attempt(cell, texts)]
    update(arguments.result, headline(read(arguments.result)["rows"]))
    if failed:
        raise SystemExit("failed: " + ", ".join(failed))


def attempt(cell: Cell, texts: Texts) -> bool:
    """Run a cell that is wanted and write its row; a failure is shown and the next one runs."""
    arguments = texts.arguments
    if cell.name in read(arguments.result)["rows"] and not arguments.again:
        return True
    print(cell.name, flush=True)
    started = time.monotonic()
    try:
        row = peer_row(cell, texts) if cell.flags is None else product_row(cell, texts)
    except Exception:
        traceback.print_exc()
        return False
    row = {
        "command": command(cell, arguments),
        **{key: getattr(cell, key) for key in ("method", "keep", "seed", "table")},
        **row,
        "git": commit(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "wall_seconds": round(time.monotonic() - started, 1),
    }
    update(arguments.result, {}, {cell.name: row})
    return True


def peer_row(cell: Cell, texts: Texts) -> dict[str, Any]:
    """The dense model with every block linear replaced, scored."""
    torch.manual_seed(cell.seed)
    case = Case(
        texts.source,
        lambda: texts.moments(cell.seed),
        texts.windows(cell.seed),
        cell.keep,
        cell.seed,
        texts.seed_folder(cell.seed),
    )
    method = load_method(cell.method)
    model = load_dense(texts.source)
    params, size = 0, 0
    for name, replacement in method(case):
        linear = model.get_submodule(name)
        assert linear.weight.shape == replacement.matrix.shape, name
        linear.weight = nn.Parameter(replacement.matrix.float(), requires_grad=False)
        params += replacement.params
        size += replacement.bytes
    return {**sizes(params, size, dense_params(texts)), "texts": texts.scores(model)}


def product_row(cell: Cell, texts: Texts) -> dict[str, Any]:
    """main.py as a process, the folder it saved scored after a reload."""
    if texts.arguments.from_run is not None:
        return finished_row(cell, texts, texts.arguments.from_run)
    flags = dict(zip(cell.flags[::2], cell.flags[1::2], strict=True))
    needs_gradients = flags.get("--metric", "kfac") == "kfac"
    labels = flags.get("--labels", "sampled") if needs_gradients else "text"
    moments = texts.moments(cell.seed, labels)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = product_words(cell, texts)
        words += ["--moments", str(moments.folder), "--out", str(out)]
        process = [sys.executable, str(ROOT / "main.py"), "convert", *words]
        subprocess.run(process, check=True, stdout=subprocess.DEVNULL)
        return finished_row(cell, texts, out)


def finished_row(cell: Cell, texts: Texts, out: Path) -> dict[str, Any]:
    """The row of a finished run, whose settings and calibration must be those of the cell."""
    run = json.loads((out / "run.json").read_text())
    settings = run["settings"]
    wanted, found = wanted_and_found(cell, settings)
    if found != wanted:
        raise SystemExit(f"{out} is not a run of {cell.name}: {found} instead of {wanted}")
    windows = texts.windows(cell.seed).long().numpy().tobytes()
    if calibrated_on(out, settings) != hashlib.sha256(windows).hexdigest():
        raise SystemExit(f"{out} was calibrated on other tokens than {cell.name}")
    model = load(out / "model")
    events = out / "events.jsonl"
    seconds, lines = total_seconds(events), store.read_lines(events)
    warnings = [line["message"] for line in lines if line.get("event") == "warning"]
    return {
        **block_sizes(model, texts),
        "texts": texts.scores(model),
        "product_command": "python main.py " + shlex.join(shareable(product_words(cell, texts))),
        "product_git": run["git"],
        "product_seconds": round(sum(seconds.values()), 1),
        "product_stages": seconds,
        "healing": store.read_manifest(out / "model")["training"].get("heal"),
        "warnings": list(dict.fromkeys(warnings)),
    }


def wanted_and_found(cell: Cell, settings: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """The flags of a cell, and what the `settings` of a run say of the same."""
    flags = dict(zip(cell.flags[::2], cell.flags[1::2], strict=True))
    wanted = {"--keep": f"{float(cell.keep)}", "--seed": f"{cell.seed}", **flags}
    given = settings | settings["convert"] | settings["train"]
    return wanted, {flag: f"{given.get(flag[2:])}" for flag in wanted}


def calibrated_on(out: Path, settings: dict[str, Any]) -> str:
    """The sha256 of the windows that a run was calibrated on, whether it made a report or not."""
    if (out / "report.json").is_file():
        report = json.loads((out / "report.json").read_text())
        return report["quality"]["calibration"]["windows_sha256"]
    folder = Path(settings["moments"] or out / "work" / "moments")
    return MomentStore(folder).summary["windows_sha256"]


def product_words(cell: Cell, texts: Texts) -> list[str]:
    """The flags of main.py for a cell, without --moments and --out."""
    arguments = texts.arguments
    files = texts.calibration_files()
    words = ["--keep", f"{cell.keep:g}", *cell.flags, "--seed", str(cell.seed)]
    words += ["--calib_text", *map(str, files)]
    words += ["--calib_tokens", str(arguments.calib_tokens * len(files))]
    words += ["--eval_text", str(arguments.eval), "--eval_tokens", str(PRODUCT_EVAL_TOKENS)]
    words += ["--context", str(arguments.context)]
    if arguments.llama_dir is not None:
        words += ["--llama_dir", str(arguments.llama_dir)]
    return words


def block_sizes(model: PreTrainedModel, texts: Texts) -> dict[str, Any]:
    """Sizes of the block linears of a saved model: of all its bytes, those the rest does not take.

    Embeddings, head and norms are counted at the dtype of the norms, as they are saved.
    """
    counts = count_params(model)
    width = model.model.norm.weight.element_size()
    size = sum(bytes_by_dtype(model).values()) - width * (counts.embeddings + counts.norms)
    return sizes(counts.blocks, size, dense_params(texts))


def dense_params(texts: Texts) -> int:
    """Parameters of the linears inside the blocks of the dense model."""
    shapes = linear_shapes(texts.source.config).values()
    return texts.source.config.num_hidden_layers * sum(out * into for out, into in shapes)


def sizes(params: int, size: int, dense: int) -> dict[str, Any]:
    """What the block linears take, beside the `dense` parameters they stand for."""
    return {
        "params": params,
        "params_ratio": params / dense,
        "bytes": size,
        "bits_per_weight": 8 * size / dense,
    }


def headline(rows: dict[str, Any]) -> dict[str, Any]:
    """`headline` and `headline_candidates`: every format whose seeds are all there, against the
    better, per seed and text, of the activation-whitened SVDs with interpolative storage.

    A candidate wins when its mean over seeds is lower on every text at no more parameters. The
    headline is the last winner in the order of HEADLINE, or else the candidate nearest to it. Of
    each the control is there too: one low-rank network per matrix in the same metric and budget, on
    the seeds that have been run.
    """
    candidates = [found for format in HEADLINE if (found := _against(format, rows)) is not None]
    if not candidates:
        return {}
    won = [candidate for candidate in candidates if candidate["won"]]
    best = won[-1] if won else min(candidates, key=lambda candidate: candidate["worst_ratio"])
    return {"headline": best, "headline_candidates": candidates}


def _against(format: str, rows: dict[str, Any]) -> dict[str, Any] | None:
    def named(method: str) -> list[dict[str, Any]] | None:
        names = [Cell(method, HEADLINE_KEEP, seed, "").name for seed in SEEDS]
        return [rows[name] for name in names] if all(name in rows for name in names) else None

    ours = named(f"headline_{format}")
    baselines = {name: found for name in HEADLINE_BASELINES if (found := named(name)) is not None}
    if ours is None or len(baselines) < len(HEADLINE_BASELINES):
        return None
    names = [Cell(HEADLINE_CONTROL, HEADLINE_KEEP, seed, "").name for seed in SEEDS]
    control = [rows[name] for name in names if name in rows]
    texts = {}
    for text in ours[0]["texts"]:
        theirs = {
            name: [row["texts"][text]["ppl"] for row in found] for name, found in baselines.items()
        }
        texts[text] = {
            "ours": [row["texts"][text]["ppl"] for row in ours],
            "whitened_interpolative": [min(ppls) for ppls in zip(*theirs.values(), strict=True)],
            "baselines": theirs,
            "low_rank": [row["texts"][text]["ppl"] for row in control],
        }
    params = max(row["params_ratio"] for row in ours)
    allowed = max(
        HEADLINE_KEEP, *(row["params_ratio"] for found in baselines.values() for row in found)
    )
    worst = max(sum(text["ours"]) / sum(text["whitened_interpolative"]) for text in texts.values())
    return {
        "format": format,
        "keep": HEADLINE_KEEP,
        "params_ratio": params,
        "worst_ratio": worst,
        "won": worst < 1 and params <= allowed,
        "texts": texts,
    }


def general(texts: Texts) -> dict[str, Any]:
    """What stands beside the rows: machine, versions, seeds, texts."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"machine": machine(), "versions": versions, "seeds": SEEDS, **texts.facts()}


def command(cell: Cell, arguments: argparse.Namespace) -> str:
    """The line that runs this cell again from the folder of the repository."""
    words = ["--only", cell.name, "--again", "--calib", *map(str, arguments.calib)]
    words += ["--eval", str(arguments.eval), "--third", str(arguments.third)]
    words += ["--calib_tokens", str(arguments.calib_tokens)]
    words += ["--eval_tokens", str(arguments.eval_tokens), "--context", str(arguments.context)]
    if arguments.llama_dir is not None:
        words += ["--llama_dir", str(arguments.llama_dir)]
    return "python benchmarks/quality.py " + shlex.join(shareable(words))


def shareable(words: list[str]) -> list[str]:
    """Paths of the repository and the data beside it from its folder on, others by name."""
    return [_shareable(Path(word)) if Path(word).exists() else word for word in words]


def _shareable(path: Path) -> str:
    whole, known = path.resolve(), (ROOT, ROOT.parent / "shared")
    inside = any(whole.is_relative_to(folder) for folder in known)
    return os.path.relpath(whole, ROOT) if inside else path.name


def commit() -> str:
    """The commit of the code that ran, with a plus when files had changed."""
    words = ["git", "-C", str(ROOT)]
    head = subprocess.run([*words, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*words, "status", "--porcelain", "--untracked-files=no", "--", "*.py"],
        capture_output=True,
        text=True,
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def read(path: Path) -> dict[str, Any]:
    """The result file, or an empty one."""
    return json.loads(path.read_text()) if path.exists() else {"rows": {}}


def update(path: Path, facts: dict[str, Any], rows: dict[str, Any] | None = None) -> None:
    """Put `facts` and `rows` into the file as it is by now, in the order of the cells."""
    result = read(path) | facts
    known = result.pop("rows") | (rows or {})
    order = {cell.name: place for place, cell in enumerate(all_cells())}
    names = sorted(known, key=lambda name: (order.get(name, len(order)), name))
    result["rows"] = {name: known[name] for name in names}
    store.write_json(path, result)


def print_cells(cells: list[Cell], result: dict[str, Any]) -> None:
    """One line a cell."""
    for cell in cells:
        row = result["rows"].get(cell.name)
        texts = [] if row is None else row["texts"].items()
        state = ", ".join(f"{name} {text['ratio']:.3f}" for name, text in texts) or "not run"
        print(f"{cell.name:45} {state}")


def parse() -> argparse.Namespace:
    """Texts, sizes, and which cells."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = ROOT.parent / "shared" / "data"
    calib = [str(data / "wikitext2_raw_calib.txt"), "python_topics_calibration"]
    parser.add_argument(
        "--calib", nargs="+", default=calib, help=f"files, or of {sorted(builtin_texts())}"
    )
    parser.add_argument("--eval", type=Path, default=data / "wikitext2_raw_eval.txt")
    parser.add_argument("--third", type=Path, default=ROOT / "benchmarks/.cache/anarchism.txt")
    parser.add_argument("--calib_tokens", type=int, default=16384, help="of each text")
    parser.add_argument("--eval_tokens", type=int, default=16384, help="of each text")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--llama_dir", type=Path, help="default: the embedded model")
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / ".cache")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--only", default="*", metavar="GLOB", help="cells by name")
    parser.add_argument("--again", action="store_true", help="also cells that are done")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument(
        "--from_run", type=Path, help="score this finished run, for one --only cell"
    )
    parser.add_argument("--headline", action="store_true", help="compare formats and stop")
    return parser.parse_args()


if __name__ == "__main__":
    main()
