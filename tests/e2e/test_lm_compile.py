"""`lm train --compile` in a process of its own: the same steps as without, and the same model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = """--max_steps 6 --log_every 1 --model_dim 32 --num_layers 2 --num_heads 2 --seq_length 32
    --batch_size 4 --val_every 3 --eval_bytes 512 --precision float32
    --set mixer.pattern=interference,attention mixer.conv=2"""


def test_compiled_blocks_take_the_same_steps(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Two waves meet, and where they agree the water is twice as high. " * 400)
    found = []
    for flags in ([], ["--compile"]):
        out = tmp_path / f"run{len(flags)}"
        words = ["lm", "train", "--data", str(text), "--out", str(out), *flags, *WORDS.split()]
        command = [sys.executable, str(ROOT / "main.py"), *words]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if flags and shutil.which("g++") is None:
            assert run.returncode == 2
            assert "no working C++ compiler" in run.stderr
            return
        assert run.returncode == 0, run.stderr
        assert "Warning" not in run.stderr
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found.append([(line["kind"], line["step"], line["bits_per_byte"]) for line in lines])
    plain, compiled = found
    assert len(plain) == 8
    assert [line[:2] for line in plain] == [line[:2] for line in compiled]
    assert [line[2] for line in compiled] == pytest.approx([line[2] for line in plain], rel=1e-4)
