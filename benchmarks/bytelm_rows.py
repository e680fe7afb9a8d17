"""What each kind of cell of the byte-model tables does; a row is a dict that goes into the file."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.bytelm_cells import BATCH, CONTEXT, GENERATION_LENGTHS, Cell
from benchmarks.bytelm_texts import Corpus, compressors
from benchmarks.main_job import ROOT
from qll.bytelm.coherence import phase_statistics
from qll.bytelm.compare import PROMPTS, continuations
from qll.bytelm.config import ModelConfig
from qll.bytelm.evaluate import bits_per_byte
from qll.bytelm.model import ByteModel
from qll.bytelm.patterns import stream_pattern
from qll.bytelm.ranks import state_ranks
from qll.bytelm.recall import multi_fact_recall, needle_recall
from qll.bytelm.runfiles import RunFiles
from qll.bytelm.sampling import SamplingOptions
from qll.bytelm.saved import load_model
from qll.bytelm.settings import LMTrainConfig, SizeSettings
from qll.bytelm.sizing import count_parameters

SCORED = 262_144  # held-out bytes that score a short run; long runs are scored on all of them
WIDTH_STEP = 8  # feed-forward channels between two candidates for equal parameters
MOST_WIDTH = 4096
SPEED_ROUNDS, SPEED_STEPS = 3, 60
GENERATED = 32  # bytes timed at each length
COMPILED_FROM = 8.0  # minutes of training in which a minute of compiling pays
LOOP = ROOT / "benchmarks" / "peers" / "byte_loop.py"


def config_of(settings: tuple[str, ...]) -> ModelConfig:
    """The model that `lm train --set SETTINGS` trains.

    >>> config_of(("stream.phase=rotation",)).stream.phase
    'rotation'
    """
    size = SizeSettings(set=settings)
    return LMTrainConfig(data=(Path("text"),), size=size).model_config()


def matched_width(settings: tuple[str, ...]) -> int:
    """Feed-forward channels with which these settings have the plain twin's parameters, nearly.

    The nearest multiple of 8, so that a tensor network has legs to split, or of what the groups of
    a dynamic width ask for.
    """
    target = count_parameters(config_of(()))
    groups = config_of(settings).weights.width_groups
    step = max(WIDTH_STEP, 2 * groups)

    def params(multiple: int) -> int:
        return count_parameters(config_of((*settings, f"d_ff={multiple * step}")))

    low, high = 1, MOST_WIDTH // step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if params(middle) <= target else (low, middle)
    return step * min((low, high), key=lambda multiple: abs(params(multiple) - target))


def train_words(cell: Cell, corpus: Corpus, rate: float) -> list[str]:
    """The words after `main.py` that train a cell, without --out."""
    steps = cell.steps(rate)
    settings = list(cell.settings)
    if cell.matched and settings:
        settings.append(f"d_ff={matched_width(cell.settings)}")
    words = ["lm", "train", "--data", str(corpus.training), "--validation", str(corpus.held_out)]
    words += ["--max_steps", str(steps), "--batch_size", str(BATCH), "--seq_length", str(CONTEXT)]
    words += ["--val_every", str(steps), "--val_max_chunks", "64", "--eval_bytes", "16384"]
    words += ["--seed", str(cell.seed), *cell.flags]
    if cell.minutes >= COMPILED_FROM:
        words.append("--compile")
    return [*words, "--set", *settings] if settings else words


def train(cell: Cell, corpus: Corpus, rate: float, cache: Path) -> dict[str, Any]:
    """Train a cell in a folder of its own, where it resumes, and score its last weights.

    The weights at the end, not the best ones by validation: nothing is chosen on held-out text.
    """
    out = cache / "runs" / cell.name / str(cell.steps(rate))
    words = train_words(cell, corpus, rate)
    command = [sys.executable, str(ROOT / "main.py"), *words, "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    files = RunFiles(out)
    result = json.loads(files.result.read_text())
    model = load_model(files.last)
    documents = corpus.held_out_documents if cell.table == "long" else corpus.sample(SCORED)
    score = bits_per_byte(model, documents, CONTEXT)
    row = {
        "bits_per_byte": score.bits_per_byte,
        "scored_bytes": score.bytes,
        "context": score.context,
        "stride": score.stride,
        "parameters": model.num_params(),
        **{key: result[key] for key in ("bytes", "steps", "seconds", "tokens_per_second")},
        "config": model.config.to_dict(),
    }
    return row | (long_measures(model, corpus) if cell.table == "long" else {})


def long_measures(model: ByteModel, corpus: Corpus) -> dict[str, Any]:
    """Everything a long run is asked beside its bits per byte."""
    ids = torch.tensor([list(document[:1024]) for document in corpus.sample(16384)])
    found: dict[str, Any] = {
        "wide_stride": bits_per_byte(model, corpus.sample(SCORED), CONTEXT, CONTEXT).bits_per_byte,
        "needle_recall": needle_recall(model, (0, 64, 256, 1024)),
        "multi_fact_recall": multi_fact_recall(model, (1, 4, 8), distance=32),
        "phases": list(map(asdict, phase_statistics(model, ids))),
        "visibility": stream_pattern(model, ids).visibility,
        "state_ranks": list(map(asdict, state_ranks(model, ids))),
    }
    if corpus.transfer is not None:
        document = corpus.transfer.read_bytes()
        found["transfer_bits_per_byte"] = bits_per_byte(model, [document], CONTEXT).bits_per_byte
    written = continuations(model, PROMPTS, 256, SamplingOptions())
    found["generation"] = {
        name: statistics.mean(item.values[name] for item in written) for name in written[0].values
    }
    found["samples"] = dict(zip(PROMPTS, (item.text for item in written), strict=True))
    return found


def loop(cell: Cell, corpus: Corpus, rate: float, cache: Path) -> dict[str, Any]:
    """The nanoGPT-style loop on the same bytes."""
    words = ["--data", str(corpus.training), "--held_out", str(corpus.held_out)]
    words += ["--steps", str(cell.steps(rate)), "--seed", str(cell.seed)]
    return _loop([*words, "--eval_bytes", str(SCORED)])


def throughput(cell: Cell, corpus: Corpus, rate: float, cache: Path) -> dict[str, Any]:
    """Bytes per second of our training and of the loop, by turns so that others disturb both."""
    rounds = []
    for number in range(SPEED_ROUNDS):
        out = cache / "runs" / cell.name / f"{number}-{time.time_ns()}"
        plain = Cell("train", cell.table, cell.label, number)
        words = train_words(plain, corpus, rate)
        words[words.index("--max_steps") + 1] = str(SPEED_STEPS)
        words[words.index("--val_every") + 1] = str(SPEED_STEPS)
        command = [sys.executable, str(ROOT / "main.py"), *words, "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        # the first line holds the start
        lines = RunFiles(out).lines("train")[1:]
        ours = statistics.median(line["tokens_per_second"] for line in lines)
        theirs = _loop(["--data", str(corpus.training), "--steps", str(SPEED_STEPS)])
        rounds.append(
            {
                "ours": ours,
                "loop": theirs["bytes_per_second"],
                "ratio": ours / theirs["bytes_per_second"],
                "load_average": os.getloadavg()[0],
            }
        )
    return {"ratio": statistics.median(entry["ratio"] for entry in rounds), "rounds": rounds}


def generation(cell: Cell, corpus: Corpus, rate: float, cache: Path) -> dict[str, Any]:
    """Bytes of state and CPU milliseconds per byte after so many bytes were read.

    Neither depends on the values of the weights, so they are random. Processor time on one thread
    does not count what other processes take.
    """
    torch.manual_seed(0)
    model = ByteModel(config_of(cell.settings)).eval()
    threads, found = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        for length in GENERATION_LENGTHS:
            found[str(length)] = _generation(model, length)
    finally:
        torch.set_num_threads(threads)
    return {"parameters": model.num_params(), "lengths": found}


@torch.inference_mode()
def _generation(model: ByteModel, length: int) -> dict[str, float]:
    ids = torch.randint(1, 256, (1, length))
    state = model.initial_state(1)
    for start in range(0, length, CONTEXT):
        _, state = model.step(ids[:, start : start + CONTEXT], state)
    size, times = state.num_bytes(), []
    for _ in range(GENERATED):
        started = time.process_time()
        _, state = model.step(ids[:, :1], state)
        times.append(time.process_time() - started)
    return {"state_bytes": size, "milliseconds_per_byte": 1000 * statistics.median(times)}


def compress(cell: Cell, corpus: Corpus, rate: float, cache: Path) -> dict[str, Any]:
    """What general compressors need."""
    return {"bits_per_byte": compressors(corpus)}


KINDS: dict[str, Callable[[Cell, Corpus, float, Path], dict[str, Any]]] = {
    "train": train,
    "loop": loop,
    "compressors": compress,
    "throughput": throughput,
    "generation": generation,
}


def _loop(words: list[str]) -> dict[str, Any]:
    result = subprocess.run([sys.executable, str(LOOP), *words], check=True, stdout=subprocess.PIPE)
    return json.loads(result.stdout)
