"""What every attack test needs: seeded damage, and a process whose memory is watched."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from qll.errors import CheckpointError
from qll.load import open_source

EXTREMES = (0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
# Opens each path of argv after a good one; prints class, seconds and peak memory above the good one
WATCHED = """
import json, sys, time
from pathlib import Path
from qll.errors import QLLError
from qll.load import open_source
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
good, *paths = sys.argv[1:]
source = open_source(good)
[source.read(name) for name in source.specs()]
results = {}
for path in paths:
    Path("/proc/self/clear_refs").write_text("5")
    before, start = peak(), time.perf_counter()
    try:
        source = open_source(path)
        source.fingerprint
        source.read("model.norm.weight")
        found = "opened"
    except QLLError as error:
        found = type(error).__name__
    seconds = time.perf_counter() - start
    results[path] = (found, seconds, peak() - before, peak())
print(json.dumps(results))
"""


def watched(good: Path, *paths: Path) -> dict[Path, tuple[str, float, float, float]]:
    """For each path: what opening it raised ("opened" if nothing), seconds, MB grown, MB in all."""
    command = [sys.executable, "-c", WATCHED, str(good), *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return {Path(path): tuple(result) for path, result in json.loads(run.stdout).items()}


def mutations(data: bytes, count: int, seed: int, header: int) -> Iterator[bytes]:
    """`count` damaged copies: bytes flipped, numbers replaced, pieces cut, doubled or swapped.

    header: most damage is done to the first `header` bytes, where the claims are.
    """
    hand = random.Random(seed)
    for _ in range(count):
        copy = bytearray(data)
        for _ in range(hand.choice((1, 1, 1, 2, 5))):
            _damage(copy, hand, min(header, len(copy)) if hand.random() < 0.9 else len(copy))
        yield bytes(copy)


def _damage(copy: bytearray, hand: random.Random, limit: int) -> None:
    place = hand.randrange(max(1, limit))
    kind = hand.randrange(6)
    if kind == 0 and copy:
        copy[place] ^= 1 << hand.randrange(8)
    elif kind == 1 and copy:
        copy[place] = hand.randrange(256)
    elif kind == 2:
        width = hand.choice((4, 8))
        number = hand.choice(EXTREMES) % (1 << 8 * width)
        copy[place : place + width] = number.to_bytes(width, "little")
    elif kind == 3:
        del copy[place:]
    elif kind == 4:
        del copy[place : place + hand.randrange(1, 64)]
    else:
        copy[place:place] = copy[place : place + hand.randrange(1, 64)]


def survive(cases: Iterator[bytes], write: Callable[[bytes], Path], seconds: float) -> Counter:
    """Open and read every case, counting outcomes; all but success or CheckpointError escapes."""
    outcomes: Counter = Counter()
    for case in cases:
        path, start = write(case), time.perf_counter()
        try:
            source = open_source(path)
            for name in source.specs():
                source.read(name)
            outcomes["opened"] += 1
        except CheckpointError as error:
            outcomes[type(error).__name__ if str(error).isprintable() else "unprintable"] += 1
        assert time.perf_counter() - start < seconds
    assert not outcomes["unprintable"]
    return outcomes
