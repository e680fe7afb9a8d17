"""What a run needs: counted from shapes, printed, and refused in one sentence when not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.llama_shapes import SHAPES
from qll import needs
from qll.config import ConvertOptions, MainConfig, TextOptions, TrainOptions
from qll.errors import DiskFullError, UsageError
from qll.load import TensorSpec
from qll.load.names import expected_specs
from qll.runfolder import Run


class Shapes:
    """A source of which only the shapes are known."""

    path, name, format, row_order = Path(), "shapes", "hf", "half_split"
    fingerprint, bytes_on_disk, files = "", 0, ()

    def __init__(self, shape):
        self.config = shape.config()

    def specs(self):
        shapes = expected_specs(self.config).items()
        return {name: TensorSpec(shape, torch.bfloat16) for name, shape in shapes}

    def read(self, name, rows=None):
        raise AssertionError("what a run needs follows from shapes alone")


def run_of(tmp_path: Path, shape: str = "llama3-8b", tokens: int = 128 * 2048, **options) -> Run:
    options = {"format": "lowrank", "metric": "activation"} | options
    config = MainConfig(
        out=tmp_path / "out",
        convert=ConvertOptions(**options),
        texts=TextOptions(calib_tokens=tokens, context=2048),
        train=TrainOptions(effort="fast"),
    )
    return Run(config, Shapes(SHAPES[shape]), None, torch.device("cpu"))


@pytest.mark.parametrize("metric", ["activation", "kfac"])
def test_a_laptop_is_enough_for_8b(tmp_path, metric):
    format = "lowrank" if metric == "activation" else "auto"
    memory = needs.memory_bytes(run_of(tmp_path, metric=metric, format=format), "convert")
    assert max(memory.values()) < 8e9
    assert min(memory.values()) > 1e9


def test_disk_holds_activations_of_every_block_only_for_gradients(tmp_path):
    forward = needs.disk_bytes(run_of(tmp_path))
    both = needs.disk_bytes(run_of(tmp_path, metric="kfac"))
    stream = 128 * 2048 * 4096
    assert forward["activations"] in (2 * stream * 2, 2 * stream * 4)  # bfloat16 where it is fast
    assert both["activations"] == 35 / 2 * forward["activations"]
    assert forward["checkpoint"] == 2 * 8_030_261_248


def test_moments_are_counted_as_they_are_stored(tmp_path, tiny_hf_folder):
    from qll.calibrate import collect
    from qll.load import open_source

    source = open_source(tiny_hf_folder)
    state = run_of(tmp_path, metric="kfac")
    state.source = source
    windows = torch.randint(0, 512, (1, 16))
    folder = collect(source, windows, tmp_path / "moments", gradients=True).folder
    size = (folder / "block.0000.safetensors").stat().st_size
    assert 4 * needs.moment_numbers(state) == pytest.approx(size, rel=0.05)


def test_too_little_disk_says_how_much_is_needed_and_where(tmp_path, monkeypatch):
    state = run_of(tmp_path)
    free = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr("qll.store.shutil.disk_usage", lambda _: free)
    with pytest.raises(DiskFullError, match=r"out: not enough disk space \(expected \d+\.\d+ GB"):
        needs.require_needs(state, "convert")


def test_too_little_memory_says_which_stage_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "free_bytes", lambda _: 10**9)
    monkeypatch.setattr(needs.store, "require_space", lambda *_: None)
    with pytest.raises(UsageError, match=r"stage .*too little memory.*expected about .* GB"):
        needs.require_needs(run_of(tmp_path), "convert")


def test_comparing_two_whole_models_is_what_needs_memory(tmp_path):
    memory = needs.memory_bytes(run_of(tmp_path), "report")
    assert max(memory, key=memory.get) == "evaluate"


def test_healing_counts_where_there_is_room_for_it(tmp_path, monkeypatch):
    def counted(**options):
        state = run_of(tmp_path, **options)
        config = replace(state.config, train=TrainOptions(effort="best"))
        return needs.memory_bytes(replace(state, config=config), "convert")

    monkeypatch.setattr(needs, "free_bytes", lambda _: 10**12)
    assert counted()["heal"] > 4 * 6 * 8.03e9
    # at keep 1 nothing is healed, but the scales of packed numbers are distilled
    assert {"heal", "tune"}.isdisjoint(counted(keep=1.0))
    assert "tune" in counted(keep=1.0, bits=4)
    monkeypatch.setattr(needs, "free_bytes", lambda _: 10**11)
    assert "heal" not in counted()


def test_it_is_printed_before_anything_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(needs, "free_bytes", lambda _: 10**12)
    monkeypatch.setattr(needs.store, "require_space", lambda *_: None)
    needs.require_needs(run_of(tmp_path, shape="tiny", tokens=2048), "convert")
    printed = capsys.readouterr().err
    assert "disk" in printed
    assert "memory" in printed
