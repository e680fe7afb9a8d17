"""The byte model: what each quantum-inspired part is worth, one cell after the other.

    apt-get download anarchism
    python benchmarks/bytelm.py --package anarchism_*.deb          all cells that are not there yet
    python benchmarks/bytelm.py --list                             the cells, and which are done
    python benchmarks/bytelm.py --only 'ablation/*/seed0'          some of them
    python benchmarks/bytelm.py --summary                          conclusions from the rows there

A cell (benchmarks/bytelm_cells.py) is one row of results/bytelm.json, written when it is done; one
that is there with the same command is skipped unless --again. Budgets are bytes: --minutes and
--long_minutes become bytes by --rate, so a busy machine changes times and no result. Training runs
`main.py lm train` in --cache, where a cell that was killed resumes.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import platform
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs as a script

from benchmarks.bytelm_cells import (
    BATCH,
    CONTEXT,
    LONG_MINUTES,
    MINUTES,
    REFERENCE_RATE,
    Cell,
    all_cells,
)
from benchmarks.bytelm_rows import KINDS, train_words
from benchmarks.bytelm_summary import summary
from benchmarks.bytelm_texts import Corpus, unpack
from benchmarks.main_job import ROOT, machine
from benchmarks.quality import commit, shareable
from qll import store

RESULT = ROOT / "benchmarks" / "results" / "bytelm.json"
PACKAGES = ("torch", "numpy", "scipy", "safetensors")


def main() -> None:
    """Run the cells that were asked for; exit 1 when one of them failed."""
    arguments = parse()
    cells = all_cells(arguments.minutes, arguments.long_minutes)
    cells = [cell for cell in cells if fnmatch.fnmatch(cell.name, arguments.only)]
    if arguments.list:
        print_cells(cells, arguments)
        return
    if arguments.summary:
        update(arguments.result, {})
        return
    corpus = unpack(package(arguments), arguments.cache, arguments.transfer)
    update(arguments.result, general(corpus, arguments))
    failed = [cell.name for cell in cells if not attempt(cell, corpus, arguments)]
    if failed:
        raise SystemExit("failed: " + ", ".join(failed))


def attempt(cell: Cell, corpus: Corpus, arguments: argparse.Namespace) -> bool:
    """Run a cell that is wanted and write its row; a failure is shown and the next one runs."""
    facts = {"command": command(cell, arguments)}
    if cell.kind == "train":
        words = shareable(train_words(cell, corpus, arguments.rate))
        facts["product_command"] = "qll " + shlex.join(words)
    known = read(arguments.result)["rows"].get(cell.name, {})
    if facts.items() <= known.items() and not arguments.again:
        return True
    budget = cell.steps(arguments.rate) * BATCH * CONTEXT
    print(cell.name, f"{budget:,} bytes" if budget else "", flush=True)
    started = time.monotonic()
    try:
        found = KINDS[cell.kind](cell, corpus, arguments.rate, arguments.cache)
    except Exception:
        traceback.print_exc()
        return False
    row = {
        **facts,
        **{key: getattr(cell, key) for key in ("label", "table", "seed", "settings", "flags")},
        **found,
        "git": commit(),
        "wall_seconds": round(time.monotonic() - started, 1),
    }
    update(arguments.result, {}, {cell.name: row})
    return True


def general(corpus: Corpus, arguments: argparse.Namespace) -> dict[str, Any]:
    """What stands beside the rows: machine, versions, texts, budgets."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions},
        "texts": corpus.facts(),
        "budget": {
            "bytes_per_second": arguments.rate,
            "minutes": arguments.minutes,
            "bytes": Cell("", "", "", 0, arguments.minutes).steps(arguments.rate) * BATCH * CONTEXT,
            "long_minutes": arguments.long_minutes,
            "long_bytes": Cell("", "", "", 0, arguments.long_minutes).steps(arguments.rate)
            * BATCH
            * CONTEXT,
        },
    }


def command(cell: Cell, arguments: argparse.Namespace) -> str:
    """The line that runs this cell again."""
    words = ["--only", cell.name, "--again"]
    for name in ("minutes", "long_minutes", "rate"):
        words += [f"--{name}", f"{getattr(arguments, name):g}"]
    return "python benchmarks/bytelm.py " + shlex.join(words)


def package(arguments: argparse.Namespace) -> Path:
    """The .deb file; exits with how to get it when it is not there."""
    found = [arguments.package] if arguments.package else sorted(_cached_packages())
    if not found or not found[-1].is_file():
        raise SystemExit("no anarchism_*.deb: run `apt-get download anarchism`, give --package")
    return found[-1]


def _cached_packages() -> list[Path]:
    return list((ROOT / "benchmarks" / ".cache").glob("anarchism_*.deb"))


def read(path: Path) -> dict[str, Any]:
    """The result file, or an empty one."""
    return json.loads(path.read_text()) if path.exists() else {"rows": {}}


def update(path: Path, facts: dict[str, Any], rows: dict[str, Any] | None = None) -> None:
    """Put `facts` and `rows` into the file as it is by now, and conclude from all rows again."""
    result = read(path) | facts
    known = result.pop("rows") | (rows or {})
    order = {cell.name: place for place, cell in enumerate(all_cells())}
    names = sorted(known, key=lambda name: (order.get(name, len(order)), name))
    result |= summary(known)
    result["rows"] = {name: known[name] for name in names}
    store.write_json(path, result)


def print_cells(cells: list[Cell], arguments: argparse.Namespace) -> None:
    """One line a cell: its name, its budget in bytes, its result."""
    rows = read(arguments.result)["rows"]
    for cell in cells:
        row = rows.get(cell.name, {})
        bits = row.get("bits_per_byte")
        state = f"{bits:.4f}" if isinstance(bits, float) else "done" if row else "not run"
        budget = cell.steps(arguments.rate) * BATCH * CONTEXT
        print(f"{cell.name:60} {budget:>12,} {state}")


def parse() -> argparse.Namespace:
    """Texts, budgets, and which cells."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = ROOT.parent / "shared" / "data" / "wikitext2_raw_eval.txt"
    parser.add_argument("--package", type=Path, help="Debian's anarchism_*.deb")
    parser.add_argument(
        "--transfer", type=Path, default=data if data.exists() else None, help="another text"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of a short run")
    parser.add_argument("--long_minutes", type=float, default=LONG_MINUTES)
    parser.add_argument(
        "--rate", type=float, default=REFERENCE_RATE, help="bytes that a second stands for"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / ".cache" / "bytelm")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--only", default="*", metavar="GLOB", help="cells by name")
    parser.add_argument("--again", action="store_true", help="also cells that are done")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("--summary", action="store_true", help="conclude again and stop")
    return parser.parse_args()


if __name__ == "__main__":
    main()
