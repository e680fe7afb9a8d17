"""The conversion that benchmarks/llama3_8b.py runs, on a stand-in small enough for a test: streamed
from and to disk, resumed, verified, and equal to what is held in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks import llama3_8b, make_llama
from benchmarks.llama_shapes import SHAPES
from qll.calibrate import collect, streams
from qll.load import ReadAhead, open_source
from tests.e2e.conftest import run_qll


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standin") / "tiny"
    make_llama.make(SHAPES["tiny"], "hf", folder)
    return folder


def test_the_benchmark_measures_a_whole_conversion(standin, tmp_path, monkeypatch):
    result = tmp_path / "result.json"
    words = ["--work", str(tmp_path), "--model", str(standin), "--shape", "tiny"]
    monkeypatch.setattr(sys, "argv", ["llama3_8b.py", *words, "--result", str(result)])
    monkeypatch.setattr(llama3_8b, "TOKENS", 512)
    monkeypatch.setattr(llama3_8b, "CONTEXT", 128)
    llama3_8b.main()
    found = json.loads(result.read_text())
    keys = {"blocks", "wall_seconds", "peak_rss_bytes", "bytes_in", "bytes_out", "stages"}
    assert keys | {"planner"} <= set(found)
    assert {"calibrate", "plan", "convert", "write"} <= set(found["stages"])
    assert found["blocks"] == 2
    header = found["bytes_in"] - make_llama.size_of(SHAPES["tiny"])
    assert 0 < header < 10_000
    assert found["bytes_out"] < found["bytes_in"]
    assert found["block_params_ratio"] <= 0.8
    assert found["peak_rss_bytes"] > 1e8
    # once more: what is there is not done again
    llama3_8b.main()
    assert json.loads(result.read_text())["attempts"] == 1


@pytest.mark.parametrize("gradients", [False, True])
def test_streams_on_disk_give_the_moments_of_streams_in_memory(
    standin, tmp_path, monkeypatch, gradients
):
    source = ReadAhead(open_source(standin))
    windows = torch.randint(0, 128000, (3, 64), generator=torch.Generator().manual_seed(0))
    held = collect(source, windows, tmp_path / "memory", gradients=gradients)
    # where a model is rounded other labels are drawn from it: those of the text are the same
    same = {"gradients": gradients, "labels": "text"}
    wide = collect(source, windows, tmp_path / "wide", **same)
    monkeypatch.setattr(streams, "MEMORY_LIMIT", 0)
    mapped = collect(source, windows, tmp_path / "disk", gradients=gradients)
    narrow = collect(source, windows, tmp_path / "narrow", precision=torch.bfloat16, **same)
    for block in range(2):
        for name, moment in held.block(block).items():
            for kind in ("input", "grad") if gradients else ("input",):
                expected = getattr(moment, kind)
                found = getattr(mapped.block(block)[name], kind)
                assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * expected.abs().max())
                expected = getattr(wide.block(block)[name], kind)
                rounded = getattr(narrow.block(block)[name], kind)
                # products in bfloat16 on 192 tokens
                assert (rounded - expected).norm() < 0.1 * expected.norm()


def test_a_checkpoint_that_changes_under_the_run_is_refused(standin, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(standin, copy)
    script = (
        "import sys, os; from qll import pipeline, runplan; real = pipeline.calibrate\n"
        "def changing(state):\n"
        "    path = state.config.llama_dir / 'model.safetensors'\n"
        "    with open(path, 'r+b') as file: file.seek(-2, 2); file.write(b'zz')\n"
        "    return real(state)\n"
        "pipeline.calibrate = changing\n"
        "from qll.cli import main; sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["convert", "--llama_dir", str(copy), "--out", str(tmp_path / "out")]
    words += ["--format", "lowrank", "--metric", "activation", "--effort", "fast"]
    words += ["--calib_tokens", "256", "--context", "128"]
    found = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False
    )
    assert found.returncode == 3
    assert "changed while it was being converted" in found.stderr
    assert "Traceback" not in found.stderr
    again = run_qll(*words)
    assert again.returncode == 2
    assert "belongs to another run" in again.stderr
