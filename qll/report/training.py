"""What was trained after the closed forms, in words."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from qll.report import units


def training_words(report: Mapping[str, Any]) -> list[str]:
    """One phrase per kind of training; [] when nothing was trained.

    >>> lines = [{"error_before": 0.5, "error_after": 0.4, "best_pass": 4}]
    >>> training_words({"compression": {"training": {"refine": lines}}})
    ['1 of 1 blocks refined: held-out error 0.5000 to 0.4000 (median)']
    >>> left_out = {"kl_before": 0.15, "kl_after": 0.15, "kept": False, "tokens": 0, "steps": 0}
    >>> training_words({"compression": {"training": {"heal": left_out}}})
    ['healing left out: held-out KL 0.1500 rose at every rate']
    """
    training = report["compression"].get("training") or {}
    words = []
    if blocks := training.get("refine"):
        better = sum(block["best_pass"] > 0 for block in blocks)
        before, after = (
            units.number(median(block[key] for block in blocks))
            for key in ("error_before", "error_after")
        )
        words.append(
            f"{better} of {len(blocks)} blocks refined: held-out error {before} to {after} (median)"
        )
    if heal := training.get("heal"):
        before, after = (units.number(heal[key]) for key in ("kl_before", "kl_after"))
        done = "healed" if heal["kept"] else "healing undone"
        words.append(
            f"{done} on {heal['tokens']:,} tokens: held-out KL {before} to {after} nats per token"
            if heal["steps"]
            else f"healing left out: held-out KL {before} rose at every rate"
        )
    if tune := training.get("tune"):
        before, after = (units.number(tune[key]) for key in ("kl_before", "kl_after"))
        done = "scales tuned" if tune["kept"] else "tuning of scales undone"
        words.append(
            f"{done} on {tune['tokens']:,} tokens: held-out KL {before} to {after} nats per token"
        )
    return words
