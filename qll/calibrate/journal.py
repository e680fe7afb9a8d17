"""Which files of a long job are finished, and of which job: what a resumed run may trust.

`job.json` is the job; each line of `journal.jsonl` is a finished file with its size and facts. A
file counts as finished only while it is there with that size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qll import store
from qll.errors import ForeignRunError

JOB_NAME = "job.json"
JOURNAL_NAME = "journal.jsonl"


class Journal:
    """The finished files of the `job` in `folder`.

    Raises ForeignRunError when the folder belongs to another job.

    >>> import tempfile, torch; folder = Path(tempfile.mkdtemp())
    >>> Journal(folder, {"text": "a"}).write("x.safetensors", {"x": torch.ones(2)}, {"norm": 1.5})
    >>> Journal(folder, {"text": "a"}).facts("x.safetensors")["norm"]
    1.5
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self.folder, self.job = folder, dict(job)
        store.make_folder(folder)
        store.clean(folder)
        if not (folder / JOB_NAME).is_file():
            store.remove(folder / JOURNAL_NAME)
            store.write_json(folder / JOB_NAME, self.job)
        elif (found := store.read_json(folder / JOB_NAME)) != self.job:
            raise _foreign(folder, found, self.job)
        lines = store.read_lines(folder / JOURNAL_NAME)
        self._files = {line["file"]: line for line in lines if "file" in line}

    @property
    def intact(self) -> bool:
        """Whether every listed file is still there."""
        return all(self.facts(name) is not None for name in self._files)

    def facts(self, name: str) -> dict[str, Any] | None:
        """What was noted about the finished file `name`, or None when it is not finished."""
        path, line = self.folder / name, self._files.get(name)
        if line is None or not path.is_file() or path.stat().st_size != line["bytes"]:
            return None
        return line

    def write(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write `tensors` to the file `name`, then list it as finished, with `facts`."""
        path = self.folder / name
        store.write_tensors(path, tensors)
        line = {"file": name, "bytes": path.stat().st_size, **facts}
        store.append_line(self.folder / JOURNAL_NAME, line)
        self._files[name] = line


def _foreign(folder: Path, found: Mapping[str, Any], job: Mapping[str, Any]) -> ForeignRunError:
    differing = [key for key in sorted({*found, *job}) if found.get(key) != job.get(key)]
    return ForeignRunError(
        "the folder holds the work of another job",
        where=folder,
        expected={key: job.get(key) for key in differing},
        found={key: found.get(key) for key in differing},
        hint="choose another --out or delete the folder",
    )
