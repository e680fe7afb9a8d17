"""`qll sae train` on a tiny checkpoint: what it leaves, that it resumes, that others read it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from qll.cli import main
from qll.lens import load_sae
from qll.load import builtin_texts
from qll.load.sae import open_sae
from tests.e2e.conftest import ROOT

SMALL = (
    *("--expansion", "2", "--k", "8", "--context", "64", "--batch_tokens", "256"),
    *("--buffer_tokens", "1024", "--precision", "float32", "--seed", "3", "--eval_tokens", "256"),
)
PLACES = ("--hookpoints", "layers.0", "layers.1.mlp")


@pytest.fixture(scope="module", autouse=True)
def text(tiny_checkpoint):
    """Enough of a text, so that not all of the default one is cut into tokens again and again."""
    path = tiny_checkpoint.parent / "text.txt"
    path.write_text(builtin_texts()["python_topics_calibration"].text[:60_000])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums over tokens are cut differently by another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words(tiny_checkpoint, out, *more: str) -> list[str]:
    places = ["--llama_dir", str(tiny_checkpoint), "--out", str(out)]
    named = [] if "--text" in more else ["--text", str(tiny_checkpoint.parent / "text.txt")]
    return ["sae", "train", *places, *named, *SMALL, *more]


@pytest.fixture(scope="module")
def whole(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("sae") / "out"
    assert main(words(tiny_checkpoint, out, *PLACES, "--tokens", "16384")) == 0
    return out


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_folder_says_what_was_trained_and_how_good_it_is(whole, capsys):
    result = json.loads((whole / "training.json").read_text())
    assert set(result["hookpoints"]) == {"layers.0", "layers.1.mlp"}
    assert result["tokens"] == 16384
    assert result["texts"][0]["sha256"]
    for found in result["hookpoints"].values():
        assert found["fvu"] < 0.9
        assert found["l0"] <= 8
        assert {"ce_score", "dead"} <= set(found)
    assert not (whole / "checkpoint.safetensors").exists()
    assert load_sae(whole, "layers.1.mlp").spec.d_sae == 128


def test_the_curve_falls_and_has_every_number(whole):
    curve = [line for line in lines(whole) if line["hookpoint"] == "layers.0"]
    assert [line["read"] for line in curve] == list(range(1024, 16385, 1024))
    assert curve[-1]["fvu"] < 0.8 * curve[0]["fvu"]
    assert {"l0", "dead_share", "tokens_per_second"} <= set(curve[0])


def test_a_finished_folder_is_left_alone_and_a_foreign_one_refused(whole, tiny_checkpoint, capsys):
    before = (whole / "layers.0" / "sae.safetensors").read_bytes()
    assert main(words(tiny_checkpoint, whole, *PLACES, "--tokens", "16384")) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert main(words(tiny_checkpoint, whole, *PLACES, "--tokens", "4096")) == 2
    assert "expected tokens=16384, found tokens=4096" in capsys.readouterr().err
    assert (whole / "layers.0" / "sae.safetensors").read_bytes() == before


def test_killed_it_resumes_to_the_same_bytes(whole, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    flags = words(tiny_checkpoint, out, *PLACES, "--tokens", "16384")
    command = [sys.executable, str(ROOT / "main.py"), *flags]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PATH": ""}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    checkpoint = out / "checkpoint.safetensors"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    process.stderr.close()
    assert not (out / "training.json").exists()
    assert len(lines(out)) < len(lines(whole))
    # a line of a buffer that the checkpoint does not know: it will be trained on again
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"hookpoint": "layers.0", "read": 16384}) + "\n")
    assert main(flags) == 0
    for name in ("layers.0", "layers.1.mlp"):
        for file in ("sae.safetensors", "cfg.json"):
            assert (out / name / file).read_bytes() == (whole / name / file).read_bytes()
    changing = {"tokens_per_second"}
    kept = [{key: line[key] for key in line.keys() - changing} for line in lines(out)]
    assert kept == [{key: line[key] for key in line.keys() - changing} for line in lines(whole)]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("multitopk", ("--dtype", "bfloat16")),
        ("jumprelu", ()),
        ("transcoder", ("--skip",)),
    ],
)
def test_every_kind_trains_and_opens(kind, more, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    flags = ("--kind", kind, "--tokens", "4096", *more)
    assert main(words(tiny_checkpoint, out, *flags)) == 0
    curve = lines(out)
    assert curve[-1]["fvu"] < curve[0]["fvu"]
    sae = open_sae(out)
    # the middle of two blocks, as no place was named
    assert sae.spec.writes == ("layers.1.mlp" if kind == "transcoder" else "layers.1")
    assert sae.spec.transcodes == (kind == "transcoder")
    assert sae.spec.activation == ("jumprelu" if kind == "jumprelu" else "topk")
    assert ("W_skip" in sae.vectors) == (kind == "transcoder")
    assert sae.encoder.dtype == (torch.bfloat16 if kind == "multitopk" else torch.float32)
    assert sae.spec.facts.get("multi_topk", False) == (kind == "multitopk")


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--hookpoints", "layers.7"), 2, "no such block"),
        (("--hookpoints", "layers.0.input_layernorm.normalized"), 2, "names modules"),
        (("--hookpoints", "layers.0.nonsense"), 2, "layers.0.nonsense"),
        (("--hookpoints", "layers.1", "--k", "999"), 2, "more than there are"),
        (("--context", "200000"), 2, "--tokens"),
        (("--skip",), 2, "only a transcoder"),
        (("--text", "absent.txt"), 2, "no such file"),
        (("--kind", "transcoder", "--hookpoints", "layers.0.mlp.gate_proj"), 2, "one width"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_half_written(
    more, code, message, tiny_checkpoint, tmp_path, capsys
):
    out = tmp_path / "out"
    assert main(words(tiny_checkpoint, out, "--tokens", "4096", *more)) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (out / "run.json").exists()
    assert not list(out.rglob("*.safetensors"))


def test_eai_sparsify_computes_the_same(whole, monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # it would ask for a GPU
    sparsify = pytest.importorskip("sparsify", exc_type=ImportError)
    x = torch.randn(32, 64) * load_file(whole / "layers.0" / "sae.safetensors")["b_dec"].norm()
    ours = load_sae(whole, "layers.0")
    theirs = sparsify.SparseCoder.load_from_disk(whole / "layers.0")
    with torch.no_grad():
        torch.testing.assert_close(ours.reconstruct(x), theirs(x).sae_out, rtol=1e-5, atol=1e-4)
