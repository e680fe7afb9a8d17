"""A run of `lm train` seen from outside: what its files say, live in a terminal.

Only files are read, so a run on another machine can be watched through a shared folder. The view
ends when the run does: complete, stopped, failed, or its process gone.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from qll.bytelm.runfiles import RunFiles
from qll.errors import MissingFileError

STALE_SECONDS = 60  # without a heartbeat for so long, a process that is not here counts as gone
VALIDATIONS = 5  # the last ones that are shown


@dataclass(frozen=True)
class Snapshot:
    """What the files of a run say at one moment; None where they say nothing yet."""

    name: str
    state: str
    share: float | None
    """Of the run that is done, 0 to 1."""
    train: dict[str, Any]
    """The last line of training."""
    validations: list[dict[str, Any]]
    steps: int | None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("complete", "stopped", "failed", "gone")


def snapshot(run: Path) -> Snapshot:
    """Read the files of `run`; raises MissingFileError when it is not a run of `lm train`.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "run.json").write_text("{}")
    >>> snapshot(folder).state
    'starting'
    """
    files = RunFiles(run)
    if not files.run.is_file():
        raise MissingFileError(
            "not a run", where=run, expected=files.run.name, hint="give the --out of `lm train`"
        )
    beat = files.beat() or {}
    lines = files.lines()
    trained = [line for line in lines if line.get("kind") == "train"]
    state = "complete" if files.complete else beat.get("state", "starting")
    if state in ("training", "validating") and _gone(beat):
        state = "gone"
    return Snapshot(
        name=run.name,
        state=state,
        share=1.0 if files.complete else beat.get("share"),
        train=trained[-1] if trained else {},
        validations=[line for line in lines if line.get("kind") == "validation"],
        steps=beat.get("steps"),
    )


def view(found: Snapshot) -> RenderableType:
    """A progress bar, the numbers of the last step, and the last validations."""
    table = Table.grid(padding=(0, 2))
    for name, value in facts(found).items():
        table.add_row(name, value)
    parts: list[RenderableType] = [table]
    if found.share is not None:
        parts.insert(0, ProgressBar(total=1.0, completed=found.share, width=60))
    if found.validations:
        parts.append(_validations(found.validations[-VALIDATIONS:]))
    return Group(*parts)


def facts(found: Snapshot) -> dict[str, str]:
    """Name and value of every line of the view; what is not known yet is left out.

    >>> list(facts(Snapshot("lm", "training", 0.25, {"step": 8, "loss": 1.5}, [], 32)).items())
    [('run', 'lm'), ('state', 'training, 25.0 %'), ('step', '8 of 32'), ('loss', '1.5000 nats')]
    """
    line, best = (
        found.train,
        min((line["bits_per_byte"] for line in found.validations), default=None),
    )
    share = "" if found.share is None else f", {100 * found.share:.1f} %"
    shown = {
        "run": found.name,
        "state": f"{found.state}{share}",
        "stage": line.get("stage"),
        "step": _of(line.get("step"), found.steps),
        "bytes": _format(line.get("bytes"), "{:,}"),
        "loss": _format(line.get("loss"), "{:.4f} nats"),
        "bits per byte": _format(line.get("bits_per_byte"), "{:.4f}"),
        "best validation": _format(best, "{:.4f} bits per byte"),
        "learning rate": _format(line.get("learning_rate"), "{:.2e}"),
        "gradient norm": _format(line.get("gradient_norm"), "{:.3f}"),
        "speed": _format(line.get("tokens_per_second"), "{:,.0f} tokens (bytes) / s"),
        "trained for": _clock(line.get("seconds")),
        "ETA": None if found.ended else _clock(line.get("eta_seconds")),
        "memory": _memory(line),
    }
    return {name: value for name, value in shown.items() if value}


def watch(run: Path, every: float) -> Snapshot:
    """Show `run` until it ends, or once when stdout is not a terminal; returns the last look."""
    console = Console(file=sys.stdout)
    found = snapshot(run)
    if not console.is_terminal:
        console.print(view(found))
        return found
    with Live(view(found), console=console, auto_refresh=False) as live:
        while not found.ended:
            time.sleep(every)
            found = snapshot(run)
            live.update(view(found), refresh=True)
    return found


def _validations(lines: list[dict[str, Any]]) -> Table:
    table = Table(title="validation", title_justify="left")
    for name in ("step", "bytes", "bits per byte"):
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(f"{line['step']:,}", f"{line['bytes']:,}", f"{line['bits_per_byte']:.4f}")
    return table


def _gone(beat: dict[str, Any]) -> bool:
    """Whether the process that wrote the heartbeat no longer runs, as far as can be seen here:
    of another machine nothing can."""
    process, written = beat.get("process"), beat.get("time", 0.0)
    if time.time() - written < STALE_SECONDS or not isinstance(process, int):
        return False
    if beat.get("host") != platform.node():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _of(value: int | None, total: int | None) -> str | None:
    if value is None:
        return None
    return f"{value:,}" if total is None else f"{value:,} of {total:,}"


def _format(value: int | float | None, shape: str) -> str | None:
    return None if value is None else shape.format(value)


def _clock(seconds: int | float | None) -> str | None:
    """Hours, minutes and seconds.

    >>> _clock(3725.4)
    '1:02:05'
    """
    if seconds is None:
        return None
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _memory(line: dict[str, Any]) -> str | None:
    if "rss_bytes" not in line:
        return None
    device = line.get("device_bytes", 0)
    on_device = f", {device / 1e9:.2f} GB on the device" if device else ""
    return f"{line['rss_bytes'] / 1e9:.2f} GB{on_device}"
