"""report.json: put the results of a run together, and refuse a report that lacks something.

`build_report` takes what the rooms measured and returns plain JSON data with the keys every reader
of a report may rely on; `check_report` is the same check for a report read from a file. Numbers
that are not finite become null with a warning, because JSON has no NaN and a page must not show a
broken number as a small one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from types import NoneType
from typing import Any

from qll.errors import ReportError
from qll.store import read_json

SCHEMA_VERSION = 1

NUMBER = (int, float)
MAYBE_NUMBER = (int, float, NoneType)
EACH = "<each>"  # in a schema: whatever the keys are called, the values look like this
OPTIONAL = "?"  # at the end of a key: may be absent

BOTH = {"dense": MAYBE_NUMBER, "converted": MAYBE_NUMBER}  # of the dense, of the converted model

MATRIX = {
    "name": str,
    "format": str,
    "shape?": [int],
    "modes": (dict, list, NoneType),
    "ranks": [int],
    "params": int,
    "params_dense": int,
    "rel_error": MAYBE_NUMBER,
    "metric_error": MAYBE_NUMBER,
    "discarded_weight": MAYBE_NUMBER,
    "predicted_loss?": MAYBE_NUMBER,
}

MEASURED = {"kind": str, "first": int, "last": int, "predicted": NUMBER, "measured": MAYBE_NUMBER}

ENTROPY = {
    "name": str,
    "cut": str,
    "nats": MAYBE_NUMBER,
    "nats_random": MAYBE_NUMBER,
    "nats_converted?": MAYBE_NUMBER,
    "max_nats": MAYBE_NUMBER,
    "renyi2": MAYBE_NUMBER,
    "participation_ratio": MAYBE_NUMBER,
}

SPECTRUM = {
    "name": str,
    "shape": [int],
    "rank": [int],
    "dense": [NUMBER],
    "converted?": (list, NoneType),
}

TEXT = {
    "sha256": str,
    "tokens": int,
    "dense": {"ppl": MAYBE_NUMBER, "bits_per_byte": MAYBE_NUMBER},
    "converted": {"ppl": MAYBE_NUMBER, "bits_per_byte": MAYBE_NUMBER},
    "kl": MAYBE_NUMBER,
    "top1_agreement": MAYBE_NUMBER,
    "leak?": BOTH,
}

FEATURES = {
    "hookpoint": str,
    "dense": {"fvu": MAYBE_NUMBER},
    "converted": {"fvu": MAYBE_NUMBER},
    "survival": {
        **dict.fromkeys(("kept", "blurred", "lost", "silenced", "measured", "unmeasured"), int),
        "kept_share": {"unweighted": MAYBE_NUMBER, "by_energy": MAYBE_NUMBER},
    },
    "controls?": dict,
    "causal?": dict,
    "page?": str,
}

SCHEMA: dict[Any, Any] = {
    "schema_version": int,
    "model": {
        "name": str,
        "source_format": str,
        "row_order": str,
        "params": int,
        "block_params": int,
        "d_model": int,
        "n_layers": int,
    },
    "compression": {
        "keep": NUMBER,
        "keep_requested?": NUMBER,
        "block_bits_per_weight?": NUMBER,
        "bits_per_weight_requested?": NUMBER,
        "metric?": str,
        "params_ratio": NUMBER,
        "bytes_ratio": NUMBER,
        "dtype": str,
        "params?": BOTH,
        "bytes?": BOTH,
        "measured?": [MEASURED],
        "per_matrix": [MATRIX],
    },
    "entropy": {"per_matrix": [ENTROPY], "activations": list, "spectra?": [SPECTRUM]},
    "quality": {"texts": {EACH: TEXT}},
    "sae": {"layers": {EACH: FEATURES}},
    "cost": {
        "seconds": {EACH: NUMBER},
        "peak_rss_bytes": MAYBE_NUMBER,
        "peak_device_bytes": MAYBE_NUMBER,
        "decode_tokens_per_second": BOTH,
        "prefill_tokens_per_second": BOTH,
        "runtime?": {"decode_tokens_per_second": BOTH, "prefill_tokens_per_second": BOTH},
        "flops_per_token?": BOTH,
    },
    "provenance?": dict,
    "warnings": [str],
}


def build_report(
    *,
    model: Mapping[str, Any],
    compression: Mapping[str, Any],
    entropy: Mapping[str, Any],
    quality: Mapping[str, Any],
    cost: Mapping[str, Any],
    sae: Mapping[str, Any] | None = None,
    warnings: Iterable[str] = (),
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report of a run as JSON data: dicts, lists, str, int, float, bool and None only.

    Each argument becomes the key of its name; keys beyond the schema are kept. Optional ones the
    page knows: `compression.bytes` and `compression.params` {dense, converted},
    `compression.per_matrix[].{shape, gauge, group}`, `entropy.per_matrix[].nats_converted`,
    `entropy.spectra` (qll.lens.spectrum), `cost.flops_per_token` {dense, converted} and
    `provenance` {command, versions, seeds, machine, ...}. Raises ReportError when a key is missing
    or holds a value of the wrong kind.

    >>> build_report(model={}, compression={}, entropy={}, quality={}, cost={})
    Traceback (most recent call last):
    qll.errors.ReportError: report.model: key is missing (expected 'name', found no keys)
    """
    dropped: list[str] = []
    body = {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "compression": compression,
        "entropy": entropy,
        "quality": quality,
        "sae": sae or {"layers": {}},
        "cost": cost,
        "provenance": provenance or {},
    }
    report = _plain(body, "report", dropped)
    notes = [f"{place} is not a finite number; the report shows n/a" for place in dropped]
    report["warnings"] = [str(warning) for warning in warnings] + notes
    check_report(report)
    return report


def read_report(path: Path) -> dict[str, Any]:
    """The report in `path`; raises IntegrityError or ReportError, naming the file."""
    report = read_json(path)
    try:
        check_report(report)
    except ReportError as error:
        raise ReportError(f"not a report of this version: {error}", where=path) from None
    return report


def check_report(report: Any) -> None:
    """Raise ReportError unless `report` has every key of the schema with the right kind of value.

    >>> check_report({"schema_version": "one"})
    Traceback (most recent call last):
    qll.errors.ReportError: report.schema_version: wrong kind of value (expected int, found str)
    """
    check_schema(report, SCHEMA, "report")
    if report["schema_version"] != SCHEMA_VERSION:
        raise ReportError(
            "this version of the schema is not known",
            where="report.schema_version",
            expected=SCHEMA_VERSION,
            found=report["schema_version"],
            hint="read it with the version of qll that wrote it",
        )


def check_schema(value: Any, schema: Any, place: str) -> None:
    """Raise ReportError, naming the place, unless `value` is made as `schema` says.

    >>> check_schema({"a": [1, "2"]}, {"a": [int]}, "here")
    Traceback (most recent call last):
    qll.errors.ReportError: here.a[1]: wrong kind of value (expected int, found str)
    """
    if isinstance(schema, dict):
        _check_kind(value, (dict,), place)
        for key, inner in schema.items():
            if key is EACH:
                for name, item in value.items():
                    check_schema(item, inner, f"{place}[{name!r}]")
            elif key.removesuffix(OPTIONAL) in value:
                name = key.removesuffix(OPTIONAL)
                check_schema(value[name], inner, f"{place}.{name}")
            elif not key.endswith(OPTIONAL):
                found = ", ".join(map(repr, list(value)[:12])) or "no keys"
                raise ReportError("key is missing", where=place, expected=repr(key), found=found)
    elif isinstance(schema, list):
        _check_kind(value, (list,), place)
        for position, item in enumerate(value):
            check_schema(item, schema[0], f"{place}[{position}]")
    else:
        _check_kind(value, schema if isinstance(schema, tuple) else (schema,), place)


def _check_kind(value: Any, kinds: tuple[type, ...], place: str) -> None:
    wrong_bool = isinstance(value, bool) and bool not in kinds  # bool is an int to isinstance
    if wrong_bool or not isinstance(value, kinds):
        names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
        found = "null" if value is None else type(value).__name__
        raise ReportError("wrong kind of value", where=place, expected=names, found=found)


def plain(value: Any, place: str) -> Any:
    """`value` as JSON data; numbers that are not finite become None.

    >>> plain({"a": float("nan"), "b": (1, 2)}, "here")
    {'a': None, 'b': [1, 2]}
    """
    return _plain(value, place, [])


def _plain(value: Any, place: str, dropped: list[str]) -> Any:
    """`value` as JSON data; places of numbers that are not finite are added to `dropped`."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        dropped.append(place)
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{place}.{key}", dropped) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}[{i}]", dropped) for i, item in enumerate(value)]
    if isinstance(value, PurePath):
        return str(value)
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", 0) == 0:
        return _plain(value.item(), place, dropped)  # a 0-d tensor or a numpy number
    raise ReportError(
        "not JSON data",
        where=place,
        expected="str, number, bool, null, list or dict",
        found=type(value).__name__,
    )
