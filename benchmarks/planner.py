"""Predictions of `qll plan --shape` held against measured runs: benchmarks/results/planner.json.

    python benchmarks/planner.py                 # everything, about ten minutes of one core
    python benchmarks/planner.py --only activation

Rates of this machine are measured first, with one thread. Then the command line converts the first
blocks of SmolLM2-135M (bfloat16, one low-rank network per matrix) with one thread, and the seconds
of every stage are set beside what the closed forms say of the same shape at the measured rates. All
in processor time, since others may use the machine. Peak memory of a job is that of a process that
does nothing else. When benchmarks/results/llama3_8b_shape.json is there, its stages are predicted
too, by the wall clock, at rates of files and of products measured in the same hour: for one process
with all threads, as it was, and for a worker of one thread per core, as `plan --machine` prints it.
Run that part on the machine that made the file.

    python main.py plan --workers 2 --llama_dir STANDIN --moments MOMENTS --out DIR ...
    python benchmarks/planner.py --only predict --workers_run DIR

holds the stages of such a run of the same stand-in against what is said of workers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs as a script

from benchmarks.main_job import cpu_name, machine

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "planner.json"
WHOLE_RUN = ROOT / "benchmarks" / "results" / "llama3_8b_shape.json"
BLOCKS, KEEP, CALIB, EVAL = 6, 0.6, 2048, 1024
PASSES, REFINE_TOKENS = 2, 8192
# what a run is for -> its metric, its effort, and the stages that are compared
CASES = {
    "activation": ("activation", "fast", ("calibrate", "plan", "convert", "evaluate")),
    "kfac": ("kfac", "fast", ("calibrate", "plan", "convert", "evaluate")),
    "refine": ("activation", "balanced", ("refine",)),
}
CONTEXT = 1024
MEMORY_SHAPES = ((1024, 3584), (1536, 5376))
LATENTS, WIDTH, SAE_TOKENS, SAE_K = 131072, 4096, 512, 192
TEXTS = 2
FILE_BYTES = 1 << 30
# a job in a process of its own: the shape of a block comes in, the peak memory goes out
JOB = """
import json, resource, sys
from pathlib import Path
from qll.convert.planner import keep_candidates
from qll.load import open_source
from qll.calibrate import MomentStore
from qll.options import ConvertOptions
folder = Path(sys.argv[1])
moments = MomentStore(folder / "moments")
options = ConvertOptions(format="lowrank", metric=sys.argv[2], keep=0.6)
keep_candidates(open_source(folder / "checkpoint"), moments, options, 0, folder)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def main() -> None:
    """Measure what was asked for, predict everything that was ever measured, write."""
    arguments = parse()
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    # the whole run names a machine of its own, and predictions alone measure nothing
    if arguments.only not in ("whole", "predict"):
        results |= {"machine": machine() | {"threads": 1}, "seed": 0, "cpu": cpu_name()}
        results |= {"command": "python benchmarks/planner.py", "versions": versions()}
    for name, measured in MEASURED.items():
        if arguments.only in (None, name):
            measured(results)
            save(results)
    predict_again(results)
    if arguments.workers_run is not None:
        results["whole_run"] |= workers_run(arguments.workers_run, results["whole_run"])
    save(results)


def parse() -> argparse.Namespace:
    """Which part, and the folder of a run with workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*MEASURED, "predict"])
    parser.add_argument("--workers_run", type=Path, help="folder of a run with --workers")
    return parser.parse_args()


def measure_rates(results: dict[str, Any]) -> None:
    """Products of this machine on one thread."""
    from qll.scale.profile import measure

    results["rates"] = measure()


def measure_run(results: dict[str, Any], case: str) -> None:
    """The stages of one case of CASES."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = first_blocks(Path(folder) / "checkpoint")
        row = conversion(checkpoint, Path(folder) / "run", case)
    results.setdefault("runs", {})[case] = row


def measure_memory(results: dict[str, Any]) -> None:
    """Peak memory of a job at two shapes."""
    with tempfile.TemporaryDirectory() as folder:
        results["memory"] = [memory_row(Path(folder) / f"m{d}", d, f) for d, f in MEMORY_SHAPES]


def measure_survival(results: dict[str, Any]) -> None:
    """Survival at one place, at rates of the same hour: it may be long after the other parts."""
    from qll.scale.profile import measure

    results["survival"] = survival_row(measure())


def measure_whole(results: dict[str, Any]) -> None:
    """What the 8B-shape run, if there is one, is held against: rates and files of this hour."""
    from qll.scale.profile import measure

    if WHOLE_RUN.exists():
        rates = {"process": measure(threads=os.cpu_count()), "worker": measure()}
        run = json.loads(WHOLE_RUN.read_text())
        results["whole_run"] = {"machine": machine()} | whole_run(run, rates, file_rate())


MEASURED = {
    "rates": measure_rates,
    **{case: partial(measure_run, case=case) for case in CASES},
    "memory": measure_memory,
    "survival": measure_survival,
    "whole": measure_whole,
}


def predict_again(results: dict[str, Any]) -> None:
    """Put beside every measured part what the code as it is now says of it."""
    for name, row in results.get("runs", {}).items():
        results["runs"][name] = predicted_run(row, name, known(results["rates"]))
    if "survival" in results:
        results["survival"] = predicted_survival(results["survival"])
    if "whole_run" in results:
        seen, run = results["whole_run"], json.loads(WHOLE_RUN.read_text())
        rates = {name: known(found) for name, found in seen["rates"].items()}
        results["whole_run"] = seen | whole_run(run, rates, seen["file_rate"])


def first_blocks(folder: Path) -> Path:
    """The first blocks of SmolLM2 with its tokenizer, as a Hugging Face folder in bfloat16."""
    import torch
    from transformers import LlamaForCausalLM

    from qll.load import open_source, open_tokenizer
    from qll.model import load_dense

    source = open_source(None)
    dense = load_dense(source, torch.bfloat16, torch.device("cpu"))
    config = dense.config
    config.num_hidden_layers = BLOCKS
    small = LlamaForCausalLM(config).to(torch.bfloat16)
    small.load_state_dict(dense.state_dict(), strict=False)
    small.save_pretrained(folder)
    open_tokenizer(source).save_pretrained(folder)
    return folder


def conversion(checkpoint: Path, out: Path, case: str) -> dict[str, Any]:
    """One run of the command line: the processor time of its stages."""
    from qll.load.inspect import config_of
    from qll.scale.shapes import shape_of

    metric, effort, stages = CASES[case]
    flags = ["--effort", effort, "--format", "lowrank", "--metric", metric, "--keep", str(KEEP)]
    flags += ["--calib_tokens", str(CALIB), "--context", str(CONTEXT), "--eval_tokens", str(EVAL)]
    if effort != "fast":
        flags += ["--refine_passes", str(PASSES), "--refine_tokens", str(REFINE_TOKENS)]
    command = [sys.executable, str(ROOT / "main.py"), "--llama_dir", str(checkpoint), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "--out", str(out)], check=True, env=environment, stdout=subprocess.DEVNULL
    )
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    measured = {e["stage"]: e["cpu_seconds"] for e in events if e["event"] == "stage"}
    shape = shape_of(config_of(checkpoint)[1], f"SmolLM2-135M, {BLOCKS} blocks")
    return {
        "command": f"OMP_NUM_THREADS=1 python main.py {' '.join(flags)}",
        "shape": asdict(shape),
        "measured": {name: measured[name] for name in stages},
    }


def predicted_run(row: dict[str, Any], case: str, rates: Any) -> dict[str, Any]:
    """The row with its stages predicted by the code as it is now."""
    from qll.scale.planner import predict
    from qll.scale.shapes import Shape
    from qll.scale.stages import Settings

    metric, effort, _ = CASES[case]
    passes = 0 if effort == "fast" else PASSES
    settings = Settings(KEEP, metric, CALIB, CONTEXT, EVAL, TEXTS, REFINE_TOKENS, passes, 2)
    found = predict(Shape(**row["shape"]), one_core(rates), settings)
    predicted = {stage["name"]: stage["seconds"] for stage in found["stages"]}
    pairs = row["measured"].items()
    return row | {"stages": {name: compared(value, predicted[name]) for name, value in pairs}}


def memory_row(folder: Path, d_model: int, d_ff: int) -> dict[str, Any]:
    """Peak memory of the job that plans a block of that shape, and its closed form."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from qll.calibrate import collect
    from qll.load import open_source
    from qll.scale.memory import job_bytes
    from qll.scale.shapes import shape_of

    heads = d_model // 64
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "checkpoint")
    windows = torch.randint(256, (2, 64))
    collect(open_source(folder / "checkpoint"), windows, folder / "moments", gradients=True)
    command = [sys.executable, "-c", JOB, str(folder), "kfac"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    predicted = job_bytes(shape_of(config), "kfac")
    return {"d_model": d_model, "d_ff": d_ff} | compared(float(run.stdout), predicted)


def survival_row(rates: Any) -> dict[str, Any]:
    """One place of Llama 3 8B with 131,072 latents: random weights and states, everything `study`
    does there but passes through the models."""
    import torch

    from qll.lens.compare import EncodedTriple, survive
    from qll.lens.measure import check_place, fit
    from qll.lens.readings import Encoded, Readings
    from qll.lens.sae import SAE
    from qll.load.sae_file import LatentMatrix, SAESpec, StoredSAE

    torch.manual_seed(0)
    torch.set_num_threads(1)
    weights = torch.empty(LATENTS, WIDTH, dtype=torch.bfloat16).normal_(std=WIDTH**-0.5)
    spec = SAESpec("layers.1", WIDTH, LATENTS, WIDTH, "topk", k=SAE_K)
    biases = {"b_enc": torch.zeros(LATENTS), "b_dec": torch.zeros(WIDTH)}
    sae = SAE(StoredSAE(spec, LatentMatrix(weights), LatentMatrix(weights.clone()), biases))
    # what the measures ask a model for
    model = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(num_hidden_layers=3))
    ids, x = torch.zeros(1, SAE_TOKENS, dtype=torch.int64), torch.randn(1, SAE_TOKENS, WIDTH)

    def encoded(scale: float) -> Encoded:
        values = {f"layers.{n}": x + scale * torch.randn(x.shape) for n in range(3)}
        return Encoded(Readings(model, ids, (), values), sae)

    three = EncodedTriple(encoded(0.0), encoded(0.1), encoded(0.01))
    started = time.process_time()
    survival, others, _ = survive(three)
    for found in (survival, *others.values()):
        found.summary()
    check_place(three.dense, fit(three.dense)["fvu"])
    fit(three.converted)
    spent = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = {
        "tokens": SAE_TOKENS,
        "rates": {kind: rates[kind] for kind in ("coarse", "bytes")},
        "seconds": {"measured": spent},
        "memory": {"measured": float(peak)},
    }
    return predicted_survival(row)


def predicted_survival(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its seconds and memory predicted by the code as it is now."""
    from qll.scale.shapes import SHAPES
    from qll.scale.survival import Autoencoders, predict_survival

    saes = Autoencoders(places=1, width=LATENTS // WIDTH, k=SAE_K, tokens=row["tokens"])
    found = predict_survival(SHAPES["llama3-8b"], one_core(known(row["rates"])), saes)
    return row | {
        "seconds": compared(row["seconds"]["measured"], found["seconds_per_place"]),
        "memory": compared(row["memory"]["measured"], found["memory"]),
    }


def file_rate() -> float:
    """Bytes a second, written and read, of a file that is written, read back and summed up."""
    import torch
    from safetensors.torch import load_file

    from qll import store

    tensors = {"weight": torch.zeros(FILE_BYTES // 4)}
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        path = Path(folder) / "rate.safetensors"
        started = time.monotonic()
        store.write_tensors(path, tensors)
        load_file(path)
        store.sha256(path)
        return 2 * FILE_BYTES / (time.monotonic() - started)


def whole_run(run: dict[str, Any], rates: dict[str, Any], disk: float) -> dict[str, Any]:
    """The stages of the 8B-shape run beside the planner's.

    rates: of one "process" with all threads, which the run was, and of a "worker" with one, of
    which `plan --machine` puts one on every core. disk: `file_rate`.
    """
    from qll.scale.machines import Machine, machine_of

    whole = Machine("one process", 1, 1, rates["process"], memory=1e12, disk=disk)
    cores = machine_of("cpu2").cores
    split = Machine("workers", 1, cores, rates["worker"], memory=1e12, disk=disk)
    predicted = stages_of(run, whole)
    return {
        "rates": rates,
        "file_rate": disk,
        "blocks": run["blocks"],
        "seconds": compared_seconds(run, predicted),
        "seconds_of_workers": compared_seconds(run, stages_of(run, split)),
        "memory": compared(
            float(run["peak_rss_bytes"]), max(predicted[name]["memory"] for name in run["stages"])
        ),
    }


def workers_run(folder: Path, whole: dict[str, Any]) -> dict[str, Any]:
    """The stages of a run with --workers on the same stand-in, beside what is said of workers."""
    from qll.runfolder import total_seconds

    words = json.loads((folder / "run.json").read_text())["command"].split()
    command = " ".join(Path(word).name if "/" in word else word for word in words)
    measured = total_seconds(folder / "events.jsonl")
    said = whole["seconds_of_workers"]
    seconds = {
        name: compared(value, said[name]["predicted"])
        for name, value in measured.items()
        if name in ("plan", "convert")  # what workers share
    }
    return {"workers_run": {"command": command, "seconds": seconds}}


def stages_of(run: dict[str, Any], machine: Any) -> dict[str, dict[str, Any]]:
    """What the planner says of every stage of the 8B-shape run on `machine`."""
    from dataclasses import replace

    from qll.scale.planner import predict
    from qll.scale.shapes import SHAPES
    from qll.scale.stages import Settings

    shape = replace(SHAPES["llama3-8b"], n_layers=int(run["blocks"]))
    chosen = {name: run["settings"][name] for name in ("keep", "metric", "calib_tokens", "context")}
    found = predict(shape, machine, Settings(**chosen, eval_tokens=0))
    return {stage["name"]: stage for stage in found["stages"]}


def compared_seconds(run: dict[str, Any], predicted: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every stage of the run beside the predicted ones."""
    return {
        name: compared(float(value), predicted[name]["seconds"])
        for name, value in run["stages"].items()
    }


def one_core(rates: Any) -> Any:
    """A machine of one worker at these rates whose disk costs nothing, as in processor time."""
    from qll.scale.machines import Machine

    return Machine("one core", 1, 1, rates, memory=1e12, disk=1e15)


def compared(measured: float, predicted: float) -> dict[str, float]:
    """Both, and predicted over measured."""
    return {"measured": measured, "predicted": predicted, "ratio": predicted / measured}


def known(rates: Any) -> Any:
    """Rates with sizes as integers, which JSON has as words."""
    return {kind: {int(n): value for n, value in sizes.items()} for kind, sizes in rates.items()}


def versions() -> dict[str, str]:
    """Packages that the seconds depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "numpy", "scipy")}


def save(results: dict[str, Any]) -> None:
    """Write the result file after every part."""
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
