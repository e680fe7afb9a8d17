"""A text outside both calibration domains: the prose of Debian's package `anarchism` (an FAQ).

    apt-get download anarchism && python benchmarks/third_text.py anarchism_*.deb --out third.txt

The paragraphs of its sections A to J in file order: tags stripped, entities unescaped, white space
collapsed, those of more than 80 characters joined by blank lines. Prints the sha256.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

LEAST_CHARACTERS = 80


def main() -> None:
    """Unpack the package and write its prose."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the .deb file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / ".cache/anarchism.txt")
    arguments = parser.parse_args()
    text = prose(arguments.package)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, "utf-8")
    print(hashlib.sha256(text.encode()).hexdigest(), arguments.out)


def prose(package: Path) -> str:
    """The longer paragraphs of the package's pages, in file order."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg", "-x", str(package), folder], check=True)
        pages = sorted(Path(folder).rglob("sec[A-J]*.html"), key=lambda page: page.name)
        texts = (page.read_text("utf-8", errors="replace") for page in pages)
        return "\n\n".join(part for page in texts for part in paragraphs(page))


def paragraphs(page: str) -> Iterator[str]:
    """The longer paragraphs of an HTML page as plain text.

    >>> list(paragraphs("<p>a &amp; <b>b</b></p><P class=x>" + "long  " * 20 + "</p>"))[0][:9]
    'long long'
    """
    for inside in re.findall(r"<p\b[^>]*>(.*?)</p>", page, flags=re.DOTALL | re.IGNORECASE):
        text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", inside)).split())
        if len(text) > LEAST_CHARACTERS:
            yield text


if __name__ == "__main__":
    main()
