"""The sections of docs/results.md on sparse autoencoders: speed, the embedded ones, and features
that are kept on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.features import row_names

EMBEDDED = Path(__file__).parents[1] / "qll" / "saes" / "smollm2-135m"
LABELS = {
    "qll": "**QLL**",
    "qll_bfloat16": '**QLL**, `precision="bfloat16"`',
    "sparsify": "eai-sparsify",
    "sparsify_adam": "eai-sparsify with Adam",
    "sae_lens": "sae-lens",
}
TARGETS = {"layers.9": 0.13, "layers.20": 0.18}  # FVU on held-out text
CURVE_POINTS = 8


def section(result: dict[str, Any]) -> str:
    """Training and coding beside eai-sparsify and sae-lens."""
    training, coding = result["sizes"]["training"], result["sizes"]["coding"]
    machine = result["machine"]
    lines = [
        "## Sparse autoencoders: speed",
        f"Machine: {machine['cpu']}, {result['threads']} threads, {machine['platform']}. Again: "
        "`python benchmarks/sae.py --peers DIR --only ROW`. Versions and commit are in each row.",
        "",
        f"Training {training['expansion'] * training['d_in']:,} features of width "
        f"{training['d_in']}, k = {training['k']}, once over the same activations of SmolLM2 "
        f"(`layers.9`, on {result['text']}), {training['batch_tokens']:,} tokens a step; FVU on "
        "activations that no row saw. sparsify's warm-up is shortened to the length of the run. "
        "Targets: no slower than "
        "sparsify (aim: 1.5 times), FVU within 2 %.",
        "",
        *table(of_kind(result["rows"], "training"), ("held-out FVU", "tokens"), training_cells),
        "",
        f"Encoding and decoding {coding['tokens']:,} random tokens with {coding['d_sae']:,} random "
        f"features of width {coding['d_in']:,} in bfloat16, k = {coding['k']}. Targets: no slower "
        "than the faster package, at most 60 % of its peak memory. The other packages compute in "
        "bfloat16, as these weights are stored; ours computes the chosen features in float32 "
        "unless bfloat16 is asked for. Error: of the reconstruction, against float64, over its "
        "norm.",
        "",
        *table(of_kind(result["rows"], "coding"), ("rounds", "error"), coding_cells),
    ]
    return "\n".join(lines)


def of_kind(rows: dict[str, Any], kind: str) -> dict[str, Any]:
    """The rows of one kind, by who ran them.

    >>> of_kind({"training/qll": 1, "coding/qll": 2}, "coding")
    {'qll': 2}
    """
    return {name.split("/")[1]: row for name, row in rows.items() if name.startswith(f"{kind}/")}


def table(rows: dict[str, Any], head: tuple[str, str], cells: Callable) -> list[str]:
    """A row for each package: tokens per second, times ours, peak memory, and the two of `cells`.

    >>> row = {"tokens_per_second": 1000.0, "peak_rss_bytes": 1e9}
    >>> table({"qll": row}, ("a", "b"), lambda row: ["1", "2"])[-1]
    '| **QLL** | 1,000.0 | 1.00 | 1.00 | 1 | 2 |'
    """
    columns = ("package", "tokens/s", "times ours", "peak GB", *head)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    own = rows.get("qll", {}).get("tokens_per_second")
    for who, row in rows.items():
        if "skipped" in row:
            lines.append(f"| {LABELS[who]} | {row['skipped']} | | | | |")
            continue
        shown = [LABELS[who], f"{row['tokens_per_second']:,.1f}", times(row, own)]
        shown += [f"{row['peak_rss_bytes'] / 1e9:.2f}", *cells(row)]
        lines.append(f"| {' | '.join(shown)} |")
    return lines


def training_cells(row: dict[str, Any]) -> list[str]:
    """Held-out FVU, and tokens it was trained on."""
    return [f"{row['fvu']:.4f}", f"{row['tokens']:,}"]


def coding_cells(row: dict[str, Any]) -> list[str]:
    """The slowest and fastest round, and the error against float64."""
    rounds = row["rounds"]
    return [f"{min(rounds):,.0f} to {max(rounds):,.0f}", f"{row['error']:.1e}"]


def times(row: dict[str, Any], own: float | None) -> str:
    """A row's rate over ours."""
    return "" if own is None else f"{row['tokens_per_second'] / own:.2f}"


def embedded() -> str:
    """What the autoencoders in the package are worth, and the curve of their training."""
    training = json.loads((EMBEDDED / "training.json").read_text())
    points = [json.loads(line) for line in (EMBEDDED / "metrics.jsonl").read_text().splitlines()]
    settings = training["settings"]
    texts = ", ".join(f"`{text['name']}`" for text in training["texts"])
    places = training["hookpoints"]
    lines = [
        "## The embedded autoencoders",
        f"{settings['expansion']} times wide, k = {settings['k']}, {training['tokens']:,} tokens "
        f"of {texts}, each seen {settings['learning']['passes']} times, in "
        f"{training['seconds'] / 60:.0f} minutes on two cores (`make saes`; settings, hashes and "
        "curve: `qll/saes/smollm2-135m`). Measured on windows of the same texts that were held "
        f"out, attention sinks excluded, {settings['learning']['eval_tokens']:,} tokens; 95 % "
        "intervals over windows. Dead: silent for the last eighth of training; silent: not seen in "
        "those few held-out tokens, most of them merely rare.",
        "",
        "| place | FVU | target | CE score (target 0.92) | CE clean / with it / with zero "
        "| dead (target 2 %) | silent |",
        "|---|---|---|---|---|---|---|",
        *(embedded_line(place, found) for place, found in places.items()),
        "",
        "FVU of the tokens being trained on, over the tokens read:",
        "",
        *curve(points, list(places)),
    ]
    return "\n".join(lines)


def embedded_line(place: str, found: dict[str, Any]) -> str:
    """A row of the table of the embedded autoencoders."""
    fvu = found["kinds"]["ordinary"]["fvu"]
    low, high = found["fvu_interval"]
    down = found["downstream"]["ordinary"]
    prices = " / ".join(f"{down[name]:.3f}" for name in ("ce_clean", "ce_sae", "ce_zero"))
    shown = f"{fvu:.3f} ({low:.3f} to {high:.3f})"
    cells = [f"`{place}`", shown, str(TARGETS[place]), f"{down['ce_score']:.3f}", prices]
    silent = found["features"]["dead_share"]
    cells += [f"{100 * found['dead_share']:.2f} %", f"{100 * silent:.1f} %"]
    return f"| {' | '.join(cells)} |"


def curve(points: list[dict[str, Any]], places: list[str]) -> list[str]:
    """A table of FVU over tokens read, thinned to CURVE_POINTS columns on a logarithmic scale.

    >>> points = [{"hookpoint": "layers.9", "read": 1000, "fvu": 0.3}]
    >>> curve(points, ["layers.9"])[-1]
    '| `layers.9` | 0.300 |'
    """
    read = sorted({point["read"] for point in points})
    wanted = [read[-1] * 2.0 ** -(n / 2) for n in range(CURVE_POINTS)]
    chosen = sorted({min(read, key=lambda r: abs(r - aim)) for aim in wanted})
    by = {(point["hookpoint"], point["read"]): point["fvu"] for point in points}
    lines = ["| tokens | " + " | ".join(f"{r:,}" for r in chosen) + " |"]
    lines.append("|---" * (1 + len(chosen)) + "|")
    for place in places:
        lines.append(f"| `{place}` | " + " | ".join(f"{by[place, r]:.3f}" for r in chosen) + " |")
    return lines


def features(result: dict[str, Any]) -> str:
    """Perplexity and features kept, with the ordinary metric and with `--feature_weight`."""
    rows = sorted(
        result["rows"].values(), key=lambda row: (-round(row["keep"], 1), row["feature_weight"])
    )
    texts, places = list(rows[0]["ppl_ratio"]), list(rows[0]["features"])
    head = ["keep", "feature weight", *(f"ppl / dense, {text}" for text in texts)]
    head += [f"{place} {what}" for place in places for what in ("kept", "effects kept")]
    machine = result["machine"]
    lines = [
        "## Keeping features on purpose",
        f"`--feature_weight W` at equal stored parameters, `--effort fast --labels "
        f"{'/'.join(sorted({row['labels'] for row in rows}))}`: "
        f"{result['calib_tokens']:,} calibration tokens of `{result['calib']['name']}`, survival "
        f"on {result['eval_tokens']:,} of `{result['eval']['name']}`, embedded autoencoders. "
        "Kept is the unweighted share of measured features whose activations correlate by at least "
        "0.9, its 95 % interval in brackets; after rounding to bfloat16 alone it is "
        f"{floors(rows)}. One seed, {machine['cpu']}. Again: `{result['command']}`.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *(feature_line(row, texts, places) for row in rows),
        "",
        "What the weight changes against the row of weight 0 at the same size: "
        + "; ".join(price(row, without(row, rows)) for row in rows if row["feature_weight"])
        + ".",
    ]
    if missing := sorted(set(row_names()) - set(result["rows"])):
        lines += ["", f"Not run: {', '.join(missing)}."]
    return "\n".join(lines)


def without(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the same size whose conversion was told nothing of features."""
    size = round(row["keep"], 1)
    return next(
        other for other in rows if not other["feature_weight"] and round(other["keep"], 1) == size
    )


def price(row: dict[str, Any], plain: dict[str, Any]) -> str:
    """Features won or lost, in points of a hundred, beside the factor on perplexity.

    >>> place = {"kept": 0.5, "effects_kept": None}
    >>> plain = {"keep": 0.8, "ppl_ratio": {"t": 1.25}, "features": {"l": place}}
    >>> price(plain | {"feature_weight": 1, "features": {"l": place | {"kept": 0.6}}}, plain)
    'keep 0.8, weight 1: kept +10.0, perplexity x 1.000'
    """
    shown = []
    for word, key in (("kept", "kept"), ("effects kept", "effects_kept")):
        pairs = [(row["features"][p][key], plain["features"][p][key]) for p in row["features"]]
        if all(value is not None for pair in pairs for value in pair):
            changes = ", ".join(f"{100 * (new - old):+.1f}" for new, old in pairs)
            shown.append(f"{word} {changes}")
    factors = [row["ppl_ratio"][text] / plain["ppl_ratio"][text] for text in row["ppl_ratio"]]
    shown.append("perplexity " + " and ".join(f"x {factor:.3f}" for factor in factors))
    return f"keep {row['keep']:.1f}, weight {row['feature_weight']:g}: {', '.join(shown)}"


def floors(rows: list[dict[str, Any]]) -> str:
    """The least share that rounding keeps, per place."""
    places = rows[0]["features"]
    least = {place: min(row["features"][place]["floor"] for row in rows) for place in places}
    return ", ".join(f"{100 * share:.1f} % at `{place}`" for place, share in least.items())


def feature_line(row: dict[str, Any], texts: list[str], places: list[str]) -> str:
    """One conversion."""
    cells = [f"{row['keep']:.1f}", f"{row['feature_weight']:g}"]
    cells += [f"{row['ppl_ratio'][text]:.3f}" for text in texts]
    for place in places:
        found = row["features"][place]
        kept = f"{100 * found['kept']:.1f} %"
        if found["interval"]:
            kept += f" ({100 * found['interval'][0]:.1f} to {100 * found['interval'][1]:.1f})"
        effects = found["effects_kept"]
        cells += [kept, "" if effects is None else f"{100 * effects:.1f} %"]
    return f"| {' | '.join(cells)} |"
