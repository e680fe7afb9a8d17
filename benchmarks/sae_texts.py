"""The texts that the embedded autoencoders are trained on, out of two Debian packages and Python.

    apt-get download anarchism wordnet-base
    python benchmarks/sae_texts.py --anarchism anarchism_*.deb --wordnet wordnet-base_*.deb

Writes anarchism.txt (see third_text.py), wordnet.txt (every synset as "words: gloss", eight of a
lexicographer's file to a paragraph) and python_topics.txt (the calibration half of Python's
reference; the other half stays unseen). Prints each one's sha256.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs as a script

from benchmarks.third_text import prose
from qll.load import builtin_texts

PER_PARAGRAPH = 8


def main() -> None:
    """Write the three texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--anarchism", type=Path, required=True, help="the .deb file")
    parser.add_argument("--wordnet", type=Path, required=True, help="the .deb file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / ".cache")
    arguments = parser.parse_args()
    texts = {
        "anarchism": prose(arguments.anarchism),
        "wordnet": glosses(arguments.wordnet),
        "python_topics": builtin_texts()["python_topics_calibration"].text,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (arguments.out / f"{name}.txt").write_text(text, "utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()
        print(f"{digest} {len(text):,} characters {arguments.out / name}.txt")


def glosses(package: Path) -> str:
    """Every synset of WordNet's data files, as prose."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg", "-x", str(package), folder], check=True)
        files = sorted(Path(folder).rglob("data.*"))
        found = [list(synsets(path.read_text("utf-8").splitlines())) for path in files]
    parts = [part for part in found for part in paragraphs(part)]
    return "\n\n".join(parts)


def synsets(lines: Iterable[str]) -> Iterator[str]:
    """The synsets of a data file: wndb(5WN) has the words in hexadecimal number, then a gloss.

    >>> list(synsets(["  1 a licence", "00001740 03 n 01 Some_thing 0 003 @ x | a gloss; here  "]))
    ['Some thing: a gloss; here.']
    """
    for line in lines:
        if line.startswith(" "):
            continue
        fields, _, gloss = line.partition(" | ")
        words = fields.split()
        count = int(words[3], 16)
        names = ", ".join(words[4 : 4 + 2 * count : 2]).replace("_", " ")
        yield f"{names}: {gloss.strip()}."


def paragraphs(lines: list[str]) -> list[str]:
    """Lines joined by spaces, a few at a time.

    >>> len(paragraphs(["x"] * 17))
    3
    """
    starts = range(0, len(lines), PER_PARAGRAPH)
    return [" ".join(lines[start : start + PER_PARAGRAPH]) for start in starts]


if __name__ == "__main__":
    main()
