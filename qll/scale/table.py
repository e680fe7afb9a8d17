"""A prediction as tables to book machines by."""

from __future__ import annotations

from typing import Any


def text_table(found: dict[str, Any]) -> str:
    """What `qll plan --shape` prints.

    >>> duration(5000.0), size(2.147e9), number(1.2e15)
    ('1.4 h', '2.15 GB', '1.2 P')
    """
    model, machine = found["model"], found["machine"]
    settings = found["settings"]
    nodes = f"{machine['nodes']} nodes, " if machine["nodes"] > 1 else ""
    lines = [
        f"{model['name']}: {number(model['params'], 3)} parameters, {size(model['bytes'])}; "
        f"at keep {settings['keep']:g} {number(model['params_converted'], 3)}, "
        f"{size(model['bytes_converted'])} ({model['params_ratio']:.3f})",
        f"{machine['name']}: {nodes}{machine['workers']} workers of one thread, "
        f"{size(machine['memory_of_a_node'])} a node",
        f"low rank, {settings['metric']} metric, {settings['calib_tokens']:,} calibration tokens",
        "",
        f"{'stage':10s} {'FLOPs':>9s} {'time':>9s} {'workers':>8s} {'memory of one':>14s}",
    ]
    for stage in found["stages"]:
        lines.append(
            f"{stage['name']:10s} {number(stage['flops']):>9s} {duration(stage['seconds']):>9s} "
            f"{stage['workers']:8d} {size(stage['memory']):>14s}"
        )
    total = sum(stage["flops"] for stage in found["stages"])
    lines += [
        f"{'in all':10s} {number(total):>9s} {duration(found['seconds']):>9s}",
        "",
        *_booking(found),
    ]
    if "survival" in found:
        lines += ["", *_survival(found["survival"], machine["memory_of_a_node"])]
    return "\n".join([*lines, "", *_draft(found["draft"])])


def _booking(found: dict[str, Any]) -> list[str]:
    """What has to be there."""
    machine, short = found["machine"], []
    for stage in found["stages"]:
        if stage["memory"] > machine["memory_of_a_node"]:
            short.append(f"{stage['name']} ({size(stage['memory'])})")
    lines = [
        f"node hours   {found['node_seconds'] / 3600:.2f}",
        f"disk         {size(found['disk'])} free beside the checkpoint",
        f"memory       {size(found['memory_of_a_worker'])} for each worker, "
        f"{size(found['memory_of_a_node'])} on the largest node",
    ]
    if found["network"]:
        lines.append(f"network      {size(found['network'])} between workers and storage")
    if short:
        lines.append(
            f"DOES NOT FIT {', '.join(short)}: more than a node has; evaluation can be left out "
            "(--eval_tokens 0, and the verb `convert`)"
        )
    return lines


def _survival(found: dict[str, Any], memory: float) -> list[str]:
    fits = "" if found["memory"] <= memory else ", more than a node has"
    return [
        f"which features survive, {found['places']} places with {found['latents']:,} latents, "
        f"{found['tokens']:,} tokens:",
        f"  {duration(found['seconds_per_place'])} a place, {duration(found['seconds'])} in all "
        f"(beside passes through the models), {size(found['memory'])} of memory{fits}, "
        f"{size(found['disk'])} of files",
    ]


def _draft(found: dict[str, Any]) -> list[str]:
    gains = ", ".join(
        f"{gain['speedup']:.2f}x at {acceptance}" for acceptance, gain in found["gains"].items()
    )
    return [
        f"as a draft of the dense model a token costs {found['cost']:.2f} of the dense one's: it "
        f"pays when more than {found['pays_above']:.0%} of its tokens are accepted",
        f"  ({gains})",
    ]


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, whichever reads best."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.3 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def size(count: float | int) -> str:
    """Bytes with a decimal prefix."""
    return number(count, 3) + "B"


def number(count: float | int, digits: int = 2) -> str:
    """A count with a decimal prefix."""
    for prefix, value in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= value:
            return f"{float(f'{count / value:.{digits}g}'):g} {prefix}"
    return f"{count:.0f} "
