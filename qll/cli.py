"""The command line: parse, call, print. `--help` answers without importing torch.

stdout carries results, stderr progress. Exit codes: 0 ok, 2 usage, 3 bad input or output,
4 interrupted but resumable.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from qll.bytelm import seed_flags
from qll.bytelm.settings import LMEvalConfig, LMTrainConfig
from qll.bytelm.verb_settings import LmCompareConfig, LmGenerateConfig, LmMonitorConfig
from qll.config import (
    BenchConfig,
    EvalConfig,
    ExportConfig,
    GenerateConfig,
    InspectConfig,
    LensConfig,
    MainConfig,
    PlannerConfig,
    ReportConfig,
    VerifyConfig,
    main_config_from_json,
)
from qll.errors import QLLError, UsageError
from qll.flags import flag_of, spell
from qll.saetrain.settings import SAETrainConfig


@dataclass(frozen=True)
class Verb:
    """A subcommand: its settings and what it does with them."""

    config: type
    action: Callable[[Any], None]
    help: str
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other spellings of its flags."""
    without_effect: Mapping[str, str] = field(default_factory=dict)
    """Flags with a value that are taken and, with a warning that says why, left out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    # progress of other libraries would mix with ours
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # oneDNN compiles a product for every shape and keeps 1,024 of them; a converted model has a
    # rank of its own in every matrix, and one training step more shapes than that
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    try:
        name = words.pop(0) if words and not words[0].startswith("-") else "run"
        if words and not words[0].startswith("-") and f"{name} {words[0]}" in VERBS:
            name = f"{name} {words.pop(0)}"
        if name == "plan" and any(flag_of(word) in ("--shape", "--machine") for word in words):
            name = "plan --machine"
        if name not in VERBS:
            raise UsageError(
                "no such verb", found=name, expected=", ".join(VERBS), hint="see --help"
            )
        verb = VERBS[name]
        verb.action(_parse(verb, name, words))
    except QLLError as error:
        return _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to resume", 4, debug)
    except SystemExit as stop:
        return int(stop.code or 0)
    except BrokenPipeError:
        return 0
    return 0


def run(config: MainConfig) -> None:
    """The main job; prints the table of the report."""
    from qll import pipeline
    from qll.report import text_table

    if config.dry_run:
        print(pipeline.dry_run(config))
        return
    out = pipeline.run(config)
    value = json.loads((out / "report.json").read_text("utf-8"))
    print(text_table(value))
    print(f"report: {out / 'report.html'}")


def calibrate(config: MainConfig) -> None:
    """Measure the moments alone, for --moments of later runs."""
    from qll import pipeline

    print(pipeline.run(config, until="calibrate") / "work" / "moments")


def plan(config: MainConfig) -> None:
    """Calibrate and print which network each matrix would get; plan.json can be edited."""
    from qll import pipeline
    from qll.convert import load_plan
    from qll.report import plan_text

    out = pipeline.run(config, until="plan")
    print(plan_text(load_plan(out / "plan.json")))
    print(f"plan: {out / 'plan.json'} (edit it, then run `convert` with the same flags)")


def foresee(config: PlannerConfig) -> None:
    """Print what a conversion would need on a machine; nothing is read but a config."""
    from qll.scale.foresee import foresee
    from qll.scale.table import text_table

    found = foresee(config)
    print(json.dumps(found, indent=1) if config.json else text_table(found))


def convert(config: MainConfig) -> None:
    """Calibrate, plan and convert, without evaluation."""
    from qll import pipeline

    print(pipeline.run(config, until="convert") / "model")


def inspect(config: InspectConfig) -> None:
    """Print what a checkpoint is made of."""
    from qll.load.inspect import inspect_path, render

    description = inspect_path(config.llama_dir)
    print(json.dumps(description, indent=1) if config.json else render(description))


def evaluate(config: EvalConfig) -> None:
    """Print the quality of a converted folder as JSON."""
    from qll import pipeline

    print(json.dumps(pipeline.evaluate_folder(config), indent=1))


def generate(config: GenerateConfig) -> None:
    """Stream a continuation of the prompt."""
    from qll.rungenerate import generate_text

    for piece in generate_text(config):
        print(piece, end="", flush=True)
    print()


def bench(config: BenchConfig) -> None:
    """Print rates and limits of a dense and a converted model on this machine."""
    from qll.runbench import bench_folder, bench_table

    value = bench_folder(config)
    print(json.dumps(value, indent=1) if config.json else bench_table(value))


def lens(config: LensConfig) -> None:
    """Study autoencoders on a dense and a converted model; prints a table of what survived."""
    from qll import pipeline
    from qll.report import features_table

    out = pipeline.look_at_folder(config)
    value = json.loads((out / "lens.json").read_text("utf-8"))
    print(features_table(value["layers"]))
    for entry in value["layers"].values():
        print(f"page: {out / entry['page']}")


def verify(config: VerifyConfig) -> None:
    """Check a converted folder and say so."""
    from qll.model import verify_folder

    verify_folder(config.model)
    print(f"{config.model}: every file, key and the logits fingerprint match the manifest")


def export(config: ExportConfig) -> None:
    """Write a converted folder in a layout others can open."""
    from qll.model import export_dense, export_two_linear

    writer = export_dense if config.layout == "dense" else export_two_linear
    writer(config.model, config.out)
    print(config.out)


def report(config: ReportConfig) -> None:
    """Draw report.html again from report.json, and the pages of autoencoders from theirs."""
    from qll import store
    from qll.report import read_features, read_report, render, render_features, text_table

    value = read_report(config.run / "report.json")
    for path in sorted((config.run / "features").glob("*.json")):
        store.write_text(path.with_suffix(".html"), render_features(read_features(path)))
    store.write_text(config.run / "report.html", render(value))
    print(text_table(value))
    print(f"report: {config.run / 'report.html'}")


def sae_train(config: SAETrainConfig) -> None:
    """Train autoencoders and print what they reach on held-out text."""
    from qll import saejob

    result = saejob.train(config)
    print(f"{'hookpoint':24s} {'dead':>7s} {'FVU':>7s} {'L0':>7s} {'CE score':>9s}")
    for name, found in result["hookpoints"].items():
        measured = "not measured"
        if "fvu" in found:
            measured = f"{found['fvu']:7.4f} {found['l0']:7.1f} {found['ce_score']:9.4f}"
        print(f"{name:24s} {found['dead_share']:7.2%} {measured}")
    print(f"autoencoders: {config.out} (use with --sae_dir)")


def lm_train(config: LMTrainConfig) -> None:
    """Train a byte model and print what it reached on held-out text."""
    from qll import lmjob

    found = lmjob.train(config)
    held_out = found["held_out"]
    print(f"parameters        {found['parameters']:,}")
    print(f"bytes trained on  {found['bytes']:,} in {found['seconds']:,.0f} s")
    print(
        f"bits per byte     {held_out['bits_per_byte']:.4f} on {held_out['bytes']:,} of "
        f"{held_out['of_bytes']:,} held-out bytes"
    )
    print(f"model: {config.out / 'model'} (use with lm generate --model {config.out})")


def lm_eval(config: LMEvalConfig) -> None:
    """Print the bits per byte of a byte model as JSON."""
    from qll import lmjob

    print(json.dumps(lmjob.evaluate(config), indent=1))


def lm_generate(config: LmGenerateConfig) -> None:
    """Print a continuation: as it is written, or the best of several."""
    from qll.bytelm import writing
    from qll.pipeline import choose_device

    for piece in writing.write(config, choose_device(config.device)):
        print(piece, end="", flush=True)
    print()


def lm_monitor(config: LmMonitorConfig) -> None:
    """Show a run until it ends."""
    from qll.bytelm.monitor import watch

    watch(config.run, config.every)


def lm_compare(config: LmCompareConfig) -> None:
    """Print the paired tables of several models."""
    from qll.bytelm import writing
    from qll.pipeline import choose_device

    print(writing.compare(config, choose_device(config.device)))


VERBS = {
    "run": Verb(MainConfig, run, "the main job (also without a verb)"),
    "inspect": Verb(InspectConfig, inspect, "dimensions, connectivity, parameters, bytes"),
    "calibrate": Verb(MainConfig, calibrate, "second moments on a text, for --moments"),
    "plan": Verb(MainConfig, plan, "calibrate and choose format and ranks per matrix"),
    "plan --machine": Verb(
        PlannerConfig, foresee, "time, memory and disk of a model of any --shape"
    ),
    "convert": Verb(MainConfig, convert, "calibrate, plan and convert"),
    "eval": Verb(EvalConfig, evaluate, "perplexity, bits per byte, KL, agreement"),
    "generate": Verb(GenerateConfig, generate, "continue a prompt"),
    "bench": Verb(BenchConfig, bench, "tokens per second, and the limits of this machine"),
    "lens": Verb(LensConfig, lens, "which features of autoencoders survive, with pages"),
    "verify": Verb(VerifyConfig, verify, "check a converted folder against its manifest"),
    "export": Verb(ExportConfig, export, "write a plain Llama, or factors as pairs of linears"),
    "report": Verb(ReportConfig, report, "draw the page and the table again"),
    "sae train": Verb(SAETrainConfig, sae_train, "train sparse autoencoders on activations"),
    "lm train": Verb(
        LMTrainConfig,
        lm_train,
        "train a byte model on texts",
        seed_flags.TRAIN,
        seed_flags.WITHOUT_EFFECT_IN_TRAIN,
    ),
    "lm eval": Verb(LMEvalConfig, lm_eval, "bits per byte of a byte model"),
    "lm generate": Verb(
        LmGenerateConfig,
        lm_generate,
        "continue a prompt with a byte model",
        without_effect=seed_flags.WITHOUT_EFFECT_IN_GENERATE,
    ),
    "lm monitor": Verb(LmMonitorConfig, lm_monitor, "watch a run of `lm train`"),
    "lm compare": Verb(LmCompareConfig, lm_compare, "byte models side by side on prompts"),
}


def _parse(verb: Verb, name: str, words: list[str]) -> Any:
    """The verb's settings: defaults, then --config FILE, then flags."""
    default, words = _default(verb, words)
    spelled, ignored = spell(words, verb.config, verb.aliases, verb.without_effect)
    for flag, why in ignored.items():
        print(f"warning: {flag} has no effect: {why}", file=sys.stderr)
    program = "main.py" if name == "run" else f"main.py {name}"
    description = verb.config.__doc__
    if name == "run":
        lines = [f"  {key:14s} {item.help}" for key, item in VERBS.items()]
        description = "\n".join([description, "", "Verbs (main.py VERB --help):", *lines])
    return tyro.cli(
        verb.config,
        prog=program,
        description=description,
        # help is given whatever else stands there
        args=["--help"] if "--help" in words else spelled,
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
    )


def _default(verb: Verb, words: list[str]) -> tuple[Any, list[str]]:
    """The settings of --config FILE (a run.json, or its "settings"), and the words left."""
    if verb.config is not MainConfig:
        return None, words
    path, rest = None, []
    iterator = iter(words)
    for word in iterator:
        if word == "--config":
            path = next(iterator, None)
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
        else:
            rest.append(word)
            continue
        if not path:
            raise UsageError("needs a file", where="--config", hint="give a run.json")
    if path is None:
        return MainConfig(), rest
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError("cannot read the settings", where=path, found=str(error)) from None
    settings = dict(value.get("settings", value))
    settings.pop("fingerprint", None)
    return main_config_from_json(settings, Path(path)), rest


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"qll: {message}", file=sys.stderr)
    return code
