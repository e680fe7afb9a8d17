"""One output folder: whose it is, what it cost, what was warned about.

run.json says which settings and source the folder belongs to; events.jsonl gets one line per
matrix, stage and warning, so that a resumed run knows what the earlier attempts took.
"""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qll import store
from qll.config import MainConfig, to_json
from qll.convert import load_plan
from qll.errors import ForeignRunError, IntegrityError
from qll.load import Source, Stamps, require_unchanged

logger = logging.getLogger("qll.runfolder")

PACKAGES = ("torch", "transformers", "safetensors", "gguf", "numpy", "scipy", "opt_einsum")
# settings that do not change what a run computes
UNBINDING = ("out", "dry_run", "scale")


@dataclass
class Run:
    """One output folder: its settings, its inputs once opened, and what was warned about."""

    config: MainConfig
    source: Source
    tokenizer: Any
    device: torch.device
    stamps: Stamps = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """The output folder."""
        return self.config.out

    @property
    def work(self) -> Path:
        """Intermediate files, deleted when the run is complete."""
        return self.config.out / "work"

    @property
    def model(self) -> Path:
        """The converted checkpoint."""
        return self.config.out / "model"

    @property
    def results(self) -> Path:
        """What evaluation measured, until the report has it."""
        return self.work / "results.json"

    @property
    def entropy(self) -> Path:
        """What the lens measured, until the report has it."""
        return self.work / "entropy.json"

    @property
    def features(self) -> Path:
        """What autoencoders measured, until the report has it."""
        return self.work / "sae.json"

    @property
    def events(self) -> Path:
        """One JSON line per thing that happened."""
        return self.config.out / "events.jsonl"


def claim(state: Run) -> None:
    """Write run.json, or check that the one there is of the same settings and source."""
    resolved = {**_binding(state.config), "fingerprint": state.source.fingerprint}
    claim_folder(state.out, resolved)


def claim_folder(out: Path, resolved: dict[str, Any]) -> None:
    """Write run.json with the settings `resolved`, or check that the one there has the same.

    Raises ForeignRunError, naming the settings that differ.
    """
    path = out / "run.json"
    if path.exists():
        before = settings_of(path)
        if differing := [
            key for key in _flat(resolved) if _flat(before).get(key) != _flat(resolved)[key]
        ]:
            raise ForeignRunError(
                "the folder belongs to another run",
                where=out,
                expected=", ".join(f"{key}={_flat(before).get(key)}" for key in differing),
                found=", ".join(f"{key}={_flat(resolved)[key]}" for key in differing),
                hint="choose another --out, or delete the folder to start over",
            )
        store.clean(out)
        return
    if any(out.glob("*.json")) or (out / "model").exists():
        raise ForeignRunError(
            "the folder holds files of something else",
            where=out,
            hint="choose an --out that does not exist yet",
        )
    store.write_json(path, {"settings": resolved, **environment()})


def settings_of(path: Path) -> dict[str, Any]:
    """The settings in a run.json; raises IntegrityError when it holds none."""
    value = store.read_json(path)
    settings = value.get("settings") if isinstance(value, dict) else None
    if not isinstance(settings, dict) or "fingerprint" not in settings:
        raise IntegrityError(
            "not the settings of a run",
            where=path,
            hint="choose another --out, or delete the folder to start over",
        )
    return settings


def is_done(config: MainConfig, until: str) -> bool:
    """Whether an earlier run with these very settings has finished, with the plan that is there."""
    path, report = config.out / "run.json", config.out / "report.json"
    if until != "report" or not (path.exists() and report.exists()):
        return False
    before = dict(settings_of(path))
    before.pop("fingerprint")
    if before != _binding(config):
        return False
    if config.plan is not None and load_plan(config.plan) != load_plan(config.out / "plan.json"):
        return False
    manifest = store.read_manifest(config.out / "model")
    return manifest["plan_sha256"] == store.sha256(config.out / "plan.json")


def _binding(config: MainConfig) -> dict[str, Any]:
    """The settings that decide what a run computes, as JSON."""
    return {key: value for key, value in to_json(config).items() if key not in UNBINDING}


def timed(state: Run, stage: str, function, *arguments):
    """Call a stage and add its seconds to the events, whether it finishes or is interrupted.

    Raises SourceChangedError when the checkpoint changed meanwhile.
    """
    print(f"[{stage}]", file=sys.stderr)
    store.append_line(state.events, {"event": "started", "stage": stage})
    started, computed = time.monotonic(), time.process_time()
    try:
        result = function(state, *arguments)
        require_unchanged(state.stamps)
        return result
    finally:
        seconds = time.monotonic() - started
        state.seconds[stage] = seconds
        # of this process only; on a busy machine the better number
        facts = {"seconds": seconds, "cpu_seconds": time.process_time() - computed}
        store.append_line(state.events, {"event": "stage", "stage": stage, **facts})


def total_seconds(events: Path) -> dict[str, float]:
    """Seconds per stage in the events of a run, summed over it and the runs it resumed.

    Of an attempt that was killed nobody knows how long it took: `recording` warns of those.
    """
    total: dict[str, float] = {}
    for line in store.read_lines(events):
        if line.get("event") == "stage":
            total[line["stage"]] = total.get(line["stage"], 0.0) + line["seconds"]
    return {stage: round(seconds, 2) for stage, seconds in total.items()}


def killed_stages(state: Run) -> list[str]:
    """Stages that an earlier attempt started and neither finished nor left by an error."""
    open_stages: dict[str, int] = {}
    for line in store.read_lines(state.events):
        if line.get("event") in ("started", "stage"):
            step = 1 if line["event"] == "started" else -1
            open_stages[line["stage"]] = open_stages.get(line["stage"], 0) + step
    return [stage for stage, count in open_stages.items() if count > 0]


@contextmanager
def recording(state: Run) -> Iterator[None]:
    """Collect every warning of the rooms into the events and the report."""

    def hear(message: str) -> None:
        if message not in state.warnings:
            state.warnings.append(message)
            note_warning(state.events, message)

    earlier = [
        line["message"] for line in store.read_lines(state.events) if line.get("event") == "warning"
    ]
    state.warnings.extend(dict.fromkeys(earlier))
    with hearing(hear):
        for stage in killed_stages(state):
            logger.warning("an attempt was killed during %s: its seconds are not counted", stage)
        yield


def note_warning(events: Path, message: str) -> None:
    """Add a warning to the events."""
    store.append_line(events, {"event": "warning", "message": message})


@contextmanager
def hearing(hear: Callable[[str], None]) -> Iterator[None]:
    """Call `hear` with every warning of the rooms."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            hear(record.getMessage())

    handler, root = Listener(level=logging.WARNING), logging.getLogger("qll")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def environment() -> dict[str, Any]:
    """What a number depends on besides the settings: versions, threads, commit, command."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in PACKAGES},
        "git": _git_commit(),
    }


def _flat(value: dict[str, Any]) -> dict[str, Any]:
    """Nested settings under dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= {f"{key}.{inner}": value for inner, value in _flat(item).items()}
        else:
            flat[key] = item
    return flat


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None
