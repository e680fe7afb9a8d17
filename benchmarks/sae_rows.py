"""The rows of `sae.py`, each called in a process of its own: NAME CACHE SETTINGS; prints JSON.

What rows share is made by the first that needs it and kept in CACHE: activations, random weights.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qll import store
from qll.lens import load_sae
from qll.load import builtin_texts, open_source, open_tokenizer, read_text
from qll.load.sae import open_sae
from qll.load.sae_file import LatentMatrix, SAESpec, StoredSAE
from qll.load.sae_write import write_saelens, write_sparsify
from qll.model import load_dense
from qll.runfolder import environment
from qll.saetrain import Buffer, Coder, CoderShape, Learner, LearningOptions, Stream, Trainer
from qll.train import choose_precision, keep_freed_memory

PLACE = "layers.9"
CONTEXT = 512
HELD_OUT = 16  # one part in so many is never trained on
ROUNDS = 15  # of encoding and decoding; the median counts
CHECKED = 16  # tokens whose reconstruction is computed again in float64
SEQUENCE = 64  # tokens that sparsify's trainer takes as one


def main() -> None:
    """Run one row and print what it measured."""
    name, cache, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(settings["threads"])
    if settings["peers"] is not None:
        # last, so that what they brought along does not take the place of our torch and the like
        sys.path.append(settings["peers"])
    kind, _, who = name.partition("/")
    package = {"sparsify": "eai-sparsify", "sparsify_adam": "eai-sparsify", "sae_lens": "sae-lens"}
    facts: dict[str, Any] = {key: environment()[key] for key in ("versions", "git")}
    if who in package:
        try:
            facts["versions"] |= {package[who]: importlib.metadata.version(package[who])}
        except importlib.metadata.PackageNotFoundError:
            print(json.dumps({"skipped": f"{package[who]} is not installed"}))
            return
    found = (train if kind == "training" else code)(who, cache, settings)
    print(json.dumps({**found, **facts}))


def peak_rss() -> int:
    """The most memory this process has held so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(who: str, cache: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train on the cached activations; FVU on the part held out."""
    x = activations(cache, settings)
    held = len(x) // HELD_OUT
    trained, measured = x[:-held].float(), x[-held:].float()
    trained = trained[: len(trained) // SEQUENCE * SEQUENCE]
    with tempfile.TemporaryDirectory() as folder:
        before, cpu = time.monotonic(), time.process_time()
        train_with(who, trained, Path(folder), settings)
        seconds, cpu = time.monotonic() - before, time.process_time() - cpu
        sae = load_sae(folder, PLACE)
    error = sae.reconstruct(measured) - measured
    variance = (measured - measured.mean(dim=0)).double().square().sum()
    return {
        "tokens_per_second": len(trained) / seconds,
        "cpu_seconds": round(cpu, 2),
        "fvu": (error.double().square().sum() / variance).item(),
        "tokens": len(trained),
        "peak_rss_bytes": peak_rss(),
    }


def train_with(who: str, x: Tensor, folder: Path, settings: dict[str, Any]) -> None:
    """Leave an autoencoder of `x` in folder/PLACE."""
    d_in, expansion, k = (settings[key] for key in ("d_in", "expansion", "k"))
    if who == "qll":
        keep_freed_memory()
        options = LearningOptions(batch_tokens=settings["batch_tokens"], passes=1)
        shape = CoderShape(PLACE, "topk", d_in, d_in, expansion * d_in, k)
        precision = choose_precision("auto", x.device)
        learner = Learner(Coder(shape, 0), options, len(x) // 8, precision)
        parts = x.split(options.buffer_tokens)
        sizes = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
        buffers = (Buffer(n, {PLACE: part}, sizes[n]) for n, part in enumerate(parts))
        Trainer([learner], folder / "run", len(x)).run(buffers)
        write_sparsify(learner.coder.stored(torch.float32), folder / PLACE)
        return
    from sparsify import SparseCoderConfig, TrainConfig
    from sparsify import Trainer as TheirTrainer

    config = TrainConfig(
        SparseCoderConfig(expansion_factor=expansion, k=k),
        batch_size=settings["batch_tokens"] // SEQUENCE,
        optimizer="adam" if who.endswith("adam") else "signum",
        # its default warms up over 1,000 steps, which is more than there are
        lr_warmup_steps=len(x) // settings["batch_tokens"] // 25,
        hookpoints=["place"],
        save_every=10**9,
        log_to_wandb=False,
        save_dir=str(folder),
        run_name="run",
    )
    ids = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).view(-1, SEQUENCE)
    TheirTrainer(config, [{"input_ids": row} for row in ids], Replayed(x)).fit()
    (folder / "run" / "place").rename(folder / PLACE)


class Replayed(nn.Module):
    """Stands for a model: token ids are rows of a table of activations, which pass its module."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x, self.place, self.device = x, nn.Identity(), x.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.int64)}

    @property
    def base_model(self) -> nn.Module:
        """Where hookpoints are looked up."""
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        """The activations of these rows."""
        return self.place(self.x[input_ids])


def activations(cache: Path, settings: dict[str, Any]) -> Tensor:
    """Ordinary tokens of SmolLM2 at PLACE, shuffled, in bfloat16; random ones if --quick."""
    path, tokens = cache / "activations.safetensors", settings["tokens"]
    if not path.exists():
        generator = torch.Generator().manual_seed(0)
        if settings["quick"]:
            directions = torch.randn(64, settings["d_in"], generator=generator)
            fires = torch.rand(tokens, 64, generator=generator) < 0.05
            found = fires.float() @ directions
        else:
            found = read_activations(tokens, settings["text"])
        order = torch.randperm(len(found), generator=generator)
        store.write_tensors(path, {"x": found[order].bfloat16()})
    return load_file(path)["x"]


def read_activations(tokens: int, text: str | None) -> Tensor:
    """What passes PLACE on windows from everywhere in a text."""
    source = open_source(None)
    tokenizer = open_tokenizer(source)
    chosen = builtin_texts()["python_topics_calibration"] if text is None else read_text(text)
    ids = torch.tensor(tokenizer(chosen.text)["input_ids"])
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    model, special = load_dense(source), tokenizer.all_special_ids
    precision = choose_precision("auto", model.device)
    tokens = min(tokens, windows.numel())
    stream = Stream(model, windows, [PLACE], tokens, 65536, special, precision)
    return torch.cat([buffer.values[PLACE].bfloat16() for buffer in stream.buffers()])


def code(who: str, cache: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Encode and decode the same random tokens with the same weights."""
    d_in, tokens = settings["d_in"], settings["tokens"]
    folder = random_weights(cache, settings, "saelens" if who == "sae_lens" else "sparsify")
    x = torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(1))
    before = time.monotonic()
    run = coder_of(who, folder)
    loaded = time.monotonic() - before
    with torch.no_grad():
        run(x[:8])  # what is made at first use
        rounds = []
        for _ in range(ROUNDS):
            before, cpu = time.monotonic(), time.process_time()
            made = run(x)
            rounds.append((time.monotonic() - before, time.process_time() - cpu))
        seconds, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
    peak = peak_rss()  # before the check, which takes memory of its own
    exact = in_float64(cache, settings, x[:CHECKED])
    return {
        "tokens_per_second": tokens / seconds,
        "rounds": [round(tokens / taken, 1) for taken, _ in rounds],
        "cpu_seconds": round(cpu, 2),
        "load_seconds": round(loaded, 2),
        "error": ((made[:CHECKED].double() - exact).norm() / exact.norm()).item(),
        "tokens": tokens,
        "peak_rss_bytes": peak,
    }


def coder_of(who: str, folder: Path) -> Callable[[Tensor], Tensor]:
    """encode and decode of one package."""
    if who.startswith("qll"):
        precision = "bfloat16" if who == "qll_bfloat16" else "float32"
        return load_sae(folder, PLACE, precision=precision).reconstruct
    if who == "sae_lens":
        from sae_lens import SAE

        other = SAE.load_from_disk(folder)
        return lambda x: other.decode(other.encode(x.to(other.dtype)))
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder / PLACE)

    def both(x: Tensor) -> Tensor:
        found = coder.encode(x.to(coder.dtype))
        return coder.decode(found.top_acts, found.top_indices)

    return both


def in_float64(cache: Path, settings: dict[str, Any], x: Tensor) -> Tensor:
    """What the stored weights make of x: all pre-activations, the k largest, their sum."""
    stored, x = open_sae(random_weights(cache, settings, "sparsify"), PLACE), x.double()
    blocks = stored.encoder.blocks(1024)
    before = torch.cat([x @ block.double().T for _, block in blocks], dim=1)
    values, chosen = before.topk(settings["k"], dim=1)
    rows = [stored.decoder.rows(features).double() for features in chosen]
    return torch.stack([f.relu() @ part for f, part in zip(values, rows, strict=True)])


def random_weights(cache: Path, settings: dict[str, Any], layout: str) -> Path:
    """A folder with a random autoencoder in bfloat16, in the layout of a package."""
    folder = cache / layout
    if (folder / PLACE / "cfg.json").exists() or (folder / "cfg.json").exists():
        return folder
    d_in, d_sae = settings["d_in"], settings["d_sae"]
    generator = torch.Generator().manual_seed(0)

    def matrix() -> LatentMatrix:
        filled = torch.empty(d_sae, d_in, dtype=torch.bfloat16)
        for part in filled.split(1024):
            part.copy_(torch.randn(part.shape, generator=generator) / d_in**0.5)
        return LatentMatrix(filled)

    vectors = {"b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(d_in)}
    spec = SAESpec(PLACE, d_in, d_sae, d_in, "topk", k=settings["k"])
    stored = StoredSAE(spec, matrix(), matrix(), vectors)
    if layout == "saelens":
        write_saelens(stored, folder)
    else:
        write_sparsify(stored, folder / PLACE)
    return folder


if __name__ == "__main__":
    main()
