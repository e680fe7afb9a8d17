"""How fast converted models run, against the dense model in the same runtime and transformers.

    python benchmarks/speed.py --work runs/speed

Models are converted into --work first (`main.py convert --effort fast`, one calibration for all).
What is compared takes turns within a round; a ratio is the median over rounds of the ratio within
a round, and seconds are given as least and median. Sections are written as they come; `--only NAME`
measures one again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs as a script

import torch
import transformers
from transformers import LlamaForCausalLM

from benchmarks.main_job import machine
from benchmarks.speed_runs import (
    DECODED,
    PREFILL,
    PROMPT,
    SEED,
    block_model,
    check_run,
    decode_runs,
    fixed,
    forms,
    generated,
    prefill_runs,
    summary,
    timed,
)
from qll.evaluate.paired import Times, race, ratio
from qll.evaluate.roofline import machine_limits
from qll.load import open_source, open_tokenizer
from qll.model import load, load_dense
from qll.runtime import (
    Acceptance,
    Runtime,
    accelerate,
    best_length,
    device_costs,
    speculate,
    tokens,
)
from qll.runtime.work import work_of

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "speed.json"
# name -> share of the block linears, share of the embedding that is also the head, --singles
MODELS = {
    "keep_0.8": (0.8, 1.0, "lowrank"),
    "keep_0.6": (0.6, 1.0, "lowrank"),
    "keep_0.8_whole": (0.8, 1.0, "dense"),
    "keep_0.6_whole": (0.6, 1.0, "dense"),
    "keep_0.8_head": (0.8, 0.8, "lowrank"),
    "keep_0.6_head": (0.6, 0.6, "lowrank"),
    "keep_0.5": (0.5, 1.0, "lowrank"),
    "keep_0.3": (0.3, 1.0, "lowrank"),
}
COMPARED = (
    *("keep_0.8", "keep_0.6", "keep_0.8_whole", "keep_0.6_whole"),
    *("keep_0.8_head", "keep_0.6_head"),
)
DRAFTS = ("keep_0.8", "keep_0.5", "keep_0.3")
CALIB_TOKENS = 4096
STEPS = 4
BATCHES = (1, 2, 4, 8, 16, 32)
SPECULATED = 48
LENGTHS = (2, 4)
PROMPTS = (
    "The for statement in Python iterates over",
    "The capital of France is",
    "A tensor network is a way to write",
)


def main() -> None:
    """Measure the sections and write the result file after each."""
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings_off()
    sections: dict[str, Callable[[], Any]] = {
        "smollm2": lambda: {
            **smollm2(models(arguments, COMPARED), arguments.rounds),
            "predicted_loss": {name: predicted_loss(arguments.work, name) for name in COMPARED},
        },
        "transformers": lambda: through_transformers(models(arguments, COMPARED), arguments.rounds),
        "batches": lambda: batches(models(arguments, ("keep_0.8", "keep_0.6")), arguments.rounds),
        "same_text": lambda: same_text(models(arguments, ("keep_0.8", "keep_0.6"))),
        "speculation": lambda: speculation(models(arguments, DRAFTS), arguments.rounds),
        "llama3_8b_block": lambda: llama_block(arguments.rounds),
    }
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name, measure in sections.items():
        if arguments.only in (None, name):
            start = time.monotonic()
            found = measure()
            results |= {"machine": machine(), "versions": versions(), "seed": SEED}
            results |= {"threads": torch.get_num_threads(), "calib_tokens": CALIB_TOKENS}
            results[name] = found | {"wall_seconds": round(time.monotonic() - start, 1)}
            save(results)


def models(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, LlamaForCausalLM]:
    """The dense model and the converted ones of these names, in float32."""
    dense = load_dense(open_source(None))
    folders = {name: converted(arguments.work, name) for name in names}
    return {"dense": dense} | {
        name: load(folder, dtype=torch.float32, verify=False) for name, folder in folders.items()
    }


def converted(work: Path, name: str) -> Path:
    """The folder of a converted model, made now if it is not there."""
    moments = work / "calibration" / "work" / "moments"
    calibration = ("--calib_tokens", CALIB_TOKENS)
    if not moments.is_dir():
        qll("calibrate", *calibration, "--out", work / "calibration")
    folder = work / name / "model"
    if not (folder / "qll_manifest.json").is_file():
        keep, embeddings, singles = MODELS[name]
        words = ["--effort", "fast", "--keep", keep, "--keep_embeddings", embeddings]
        words += ["--singles", singles]
        qll("convert", *words, *calibration, "--moments", moments, "--out", work / name)
    return folder


def predicted_loss(work: Path, name: str) -> float:
    """What the plan of a model expects its blocks to lose, in nats per token."""
    entries = json.loads((work / name / "plan.json").read_text())["entries"]
    return sum(item["predicted_loss"] for item in entries if ".layers." in item["members"][0])


def qll(*words: object) -> None:
    """Run one command line of the product."""
    subprocess.run([sys.executable, str(ROOT / "main.py"), *map(str, words)], check=True)


def smollm2(found: dict[str, LlamaForCausalLM], rounds: int) -> dict[str, Any]:
    """Decode and prefill in our runtime, every model against the dense one."""
    runtimes = {name: Runtime.from_model(model) for name, model in found.items()}
    limits = machine_limits("cpu", torch.float32)
    # short turns: neighbours on the machine come and go within a second
    decode = race(decode_runs(runtimes, 1, STEPS), rounds * max(1, DECODED // STEPS))
    prefill = race(prefill_runs(runtimes), rounds)
    work = {name: work_of(runtime, 1, 1, PROMPT) for name, runtime in runtimes.items()}
    rows = {
        name: {
            "decode": summary(decode, name, STEPS),
            "prefill": summary(prefill, name, PREFILL),
            "bytes_per_token": work[name].bytes,
            "byte_limit": work["dense"].bytes / work[name].bytes,
            "share_of_bandwidth": work[name].bytes
            * STEPS
            / min(decode[name])
            / limits["bandwidth"],
            "forms": forms(runtimes[name]),
        }
        for name in runtimes
    }
    return {"limits": limits, "prompt": PROMPT, "prefill": PREFILL, "rows": rows}


def through_transformers(found: dict[str, LlamaForCausalLM], rounds: int) -> dict[str, Any]:
    """The same through transformers' generate; and its dense model against our runtime's."""
    runtime = Runtime.from_model(found["dense"])
    fast = {name: model if name == "dense" else accelerate(model) for name, model in found.items()}
    decode: Times = {name: [] for name in (*fast, "dense_in_qll")}
    for turn in range(rounds + 1):
        for name, model in fast.items():
            seconds = generated(model, PROMPT, DECODED)
            if turn:
                decode[name].append(seconds)
        seconds = timed(decode_runs({"dense": runtime}, 1)["dense"])
        if turn:
            decode["dense_in_qll"].append(seconds)
    runs = {
        name: (lambda model=model: generated(model, PREFILL, 0)) for name, model in fast.items()
    }
    runs["dense_in_qll"] = prefill_runs({"dense": runtime})["dense"]
    prefill = race(runs, rounds)
    rows = {
        name: {
            "decode": summary(decode, name, DECODED),
            "prefill": summary(prefill, name, PREFILL),
        }
        for name in decode
    }
    return {"rows": rows}


def batches(found: dict[str, LlamaForCausalLM], rounds: int) -> dict[str, Any]:
    """Decoding several texts at once: no batch may be slower than the dense model."""
    runtimes = {name: Runtime.from_model(model) for name, model in found.items()}
    rows: dict[str, Any] = {}
    for batch in BATCHES:
        times = race(decode_runs(runtimes, batch, steps=STEPS), max(3, rounds // 2))
        rows[str(batch)] = {name: summary(times, name, STEPS * batch) for name in runtimes}
    return {"rows": rows}


def same_text(found: dict[str, LlamaForCausalLM]) -> dict[str, Any]:
    """Whether factors as stored, factors written out and rebuilt matrices write the same text."""
    tokenizer = open_tokenizer(open_source(None))
    rows = {}
    for name, model in found.items():
        texts = {}
        for kind, place in (("stored", 0), ("rebuilt", -1)):
            runtime = Runtime.from_model(model, choice=fixed(place))
            texts[kind] = [written(runtime, tokenizer, prompt) for prompt in PROMPTS]
        rows[name] = {
            "equal": sum(a == b for a, b in zip(*texts.values(), strict=True)),
            "prompts": len(PROMPTS),
        }
    return {"new_tokens": SPECULATED, "rows": rows}


def speculation(found: dict[str, LlamaForCausalLM], rounds: int) -> dict[str, Any]:
    """The dense model with converted ones as drafts: acceptance, and speed against itself alone."""
    runtimes = {name: Runtime.from_model(model) for name, model in found.items()}
    tokenizer = open_tokenizer(open_source(None))
    dense, rounds = runtimes.pop("dense"), max(2, rounds // 3)
    prompt = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    rows = []
    for batch in (1, 4):
        ids = prompt.repeat(batch, 1)
        expected = torch.cat(list(tokens(dense, ids, SPECULATED)), 1)
        costs = step_costs(dense, runtimes, batch, rounds)
        for name, draft in runtimes.items():
            for length in LENGTHS:
                counts = Acceptance()

                def run(draft=draft, ids=ids, length=length, counts=counts) -> torch.Tensor:
                    made = speculate(dense, draft, ids, SPECULATED, length=length, counts=counts)
                    return torch.cat(list(made), 1)

                same = torch.equal(run(), expected)
                alone = lambda ids=ids: list(tokens(dense, ids, SPECULATED))  # noqa: E731
                times = race({"alone": alone, "speculative": run}, rounds)
                rows.append(
                    {
                        "draft": name,
                        "batch": batch,
                        "length": length,
                        "acceptance": counts.rate,
                        "same_text": same,
                        "speed": ratio(times, "speculative", "alone"),
                        "draft_cost": costs[name],
                        "check_cost": costs["check"],
                        "best": best_length(counts.rate, costs[name], costs["check"]),
                    }
                )
    return {"new_tokens": SPECULATED, "rows": rows}


def step_costs(
    dense: Runtime, drafts: dict[str, Runtime], batch: int, rounds: int
) -> dict[str, Any]:
    """A step of every draft, and checking 2, 3, .. tokens, in steps of the dense model."""
    runs = decode_runs({"dense": dense, **drafts}, batch, steps=STEPS)
    single = race(runs, rounds)
    checks = {str(count): check_run(dense, batch, count) for count in range(2, 7)}
    several = race({"1": check_run(dense, batch, 1), **checks}, rounds)
    found: dict[str, Any] = {name: min(single[name]) / min(single["dense"]) for name in drafts}
    found["check"] = [min(several[name]) / min(several["1"]) for name in checks]
    return found


def llama_block(rounds: int, shrink: int = 1) -> dict[str, Any]:
    """One block of the shape of Llama 3 8B, bfloat16, random numbers, all matrices at keep 0.6.

    shrink: divides all sizes, to try it out.
    """
    dense, low = block_model(None, shrink), block_model(0.6, shrink)
    runtimes = {"dense": Runtime.from_model(dense), "keep_0.6": Runtime.from_model(low)}
    limits = machine_limits("cpu", torch.bfloat16)
    decode = race(decode_runs(runtimes, 1), rounds)
    prefill = race(prefill_runs(runtimes, 128 // shrink), max(2, rounds // 3))
    rows = {}
    for name, runtime in runtimes.items():
        work = work_of(runtime, 1, 1, PROMPT)
        rate = work.bytes * DECODED / min(decode[name])
        rows[name] = {
            "decode": summary(decode, name, DECODED),
            "prefill": summary(prefill, name, 128 // shrink),
            "bytes_per_token": work.bytes,
            "bytes_per_second": rate,
            "share_of_bandwidth": rate / limits["bandwidth"],
            "forms": forms(runtime),
        }
    kernel = device_costs("cpu", torch.bfloat16).kernel
    return {"limits": limits, "kernel": kernel, "dtype": "bfloat16", "rows": rows}


def written(runtime: Runtime, tokenizer: Any, prompt: str) -> list[int]:
    """Greedy ids behind a prompt."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return [int(piece) for piece in tokens(runtime, ids, SPECULATED)]


def versions() -> dict[str, str]:
    """What the times depend on besides the machine."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def warnings_off() -> None:
    """transformers' advice does not belong between progress lines."""
    transformers.logging.set_verbosity_error()


def save(results: dict[str, Any]) -> None:
    """Write the result file after every section."""
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """Where models are converted, and what to measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "speed")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    names = ["smollm2", "transformers", "batches", "same_text", "speculation", "llama3_8b_block"]
    parser.add_argument("--only", choices=names)
    return parser.parse_args()


if __name__ == "__main__":
    main()
