"""Files that survive kill -9: atomic writes, sha256 manifests, a journal, a lock.

The only module that renames or deletes. Every write is temp file -> fsync -> rename -> fsync of
the folder, with the mode the user's umask asks for (safetensors alone would leave 0600). A
manifest is written last: a folder without one is not finished.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qll.errors import DiskFullError, IntegrityError, LockedError, MissingFileError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

TEMP_SUFFIX = ".qll-tmp"
LOCK_NAME = ".qll.lock"
MANIFEST_NAME = "qll_manifest.json"
OWN_SHA256 = "manifest_sha256"
_held: set[Path] = set()  # locks of this process


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` atomically.

    Raises DiskFullError or OutputError; on either, the old file is untouched.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> write_bytes(folder / "a.bin", b"xyz"); (folder / "a.bin").read_bytes()
    b'xyz'
    """
    with _replacing(path) as temp, open(temp, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Replace `path` atomically by what `pieces` give, which need never be in memory together."""
    with _replacing(path) as temp, open(temp, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Replace `path` by UTF-8 `text` atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Replace `path` by a safetensors file of `tensors` atomically."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with _replacing(path) as temp:
        save_file(contiguous, temp, metadata=dict(metadata or {"format": "pt"}))
        with open(temp, "rb") as file:
            os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """The JSON value in `path`; raises MissingFileError, or IntegrityError when it is not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise MissingFileError(
            "cannot be read", where=path, found=error.strerror, hint="check the path"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IntegrityError(
            "not a JSON file", where=path, found=str(error), hint="delete it and run again"
        ) from None


def sha256(path: Path, chunk: int = 1 << 22) -> str:
    """Hex sha256 of the bytes of `path`, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(chunk):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest of `folder`: size and sha256 of every file, plus `facts`; commits it.

    The manifest carries the sha256 of its own values too: bits rot there as well.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST_NAME, LOCK_NAME)
    }
    values = {**facts, "files": files}
    write_json(folder / MANIFEST_NAME, {**values, OWN_SHA256: _sha256_of_values(values)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`; raises IntegrityError when there is none or it has changed."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise IntegrityError(
            "no manifest, so the folder was never finished",
            where=folder,
            expected=MANIFEST_NAME,
            hint="run the conversion again with the same --out to resume it",
        )
    manifest = read_json(path)
    own = manifest.pop(OWN_SHA256, None) if isinstance(manifest, dict) else None
    if own is None or own != _sha256_of_values(manifest):
        raise IntegrityError(
            "manifest has changed since it was written",
            where=path,
            expected=f"the sha256 of its values under {OWN_SHA256}",
            found=str(own)[:16],
            hint="convert or copy the folder again",
        )
    return manifest


def verify_manifest(folder: Path) -> dict[str, Any]:
    """Check every file of `folder` against its manifest and return the manifest.

    Raises IntegrityError naming the first file that is missing, resized or changed.
    """
    manifest = read_manifest(folder)
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError("file of the manifest is missing", where=path)
        if path.stat().st_size != facts["bytes"]:
            raise IntegrityError(
                "file has another size than its manifest says",
                where=path,
                expected=f"{facts['bytes']} bytes",
                found=f"{path.stat().st_size} bytes",
                hint="convert or copy the folder again",
            )
        if (found := sha256(path)) != facts["sha256"]:
            raise IntegrityError(
                "file has changed since it was written",
                where=path,
                expected=f"sha256 {facts['sha256'][:16]}",
                found=found[:16],
                hint="convert or copy the folder again",
            )
    return manifest


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append `value` as one JSON line and fsync it: one event or journal entry.

    A last line torn by a kill is closed first, so that it cannot swallow the new one.
    """
    line = _line(value)
    try:
        with open(path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _output_error(path, error) from error


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Replace `path` by one JSON line for each of `values`, atomically."""
    write_pieces(path, map(_line, values))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole JSON lines of `path`; a torn last line (killed mid-write) is left out."""
    if not path.exists():
        return []
    values = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            values.append(json.loads(line))
    return values


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; raises LockedError while a living process holds it."""
    make_folder(folder)
    path = folder / LOCK_NAME
    _remove_stale_lock(path)
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        raise LockedError(
            "another run is writing here",
            where=folder,
            found=f"process {' on '.join(path.read_text().split()) or 'unknown'}",
            hint=f"wait for it, choose another --out, or delete {path} if it is gone",
        ) from None
    except OSError as error:
        raise _output_error(path, error) from error
    os.write(handle, f"{os.getpid()} {platform.node()}".encode())
    os.close(handle)
    _held.add(path.absolute())
    try:
        yield
    finally:
        _held.discard(path.absolute())
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents, and prove that it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"probe{TEMP_SUFFIX}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise _output_error(folder, error) from error


def clean(folder: Path) -> None:
    """Delete temporary files that a killed run left in `folder`."""
    for path in folder.rglob(f"*{TEMP_SUFFIX}*"):
        path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a file or a folder of ours; absent is fine."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def require_space(folder: Path, needed: int) -> None:
    """Raise DiskFullError unless `needed` bytes are free where `folder` lies (or will lie)."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DiskFullError(
            "not enough disk space",
            where=folder,
            expected=f"{needed / 1e9:.2f} GB free",
            found=f"{free / 1e9:.2f} GB",
            hint="choose another --out or free some space",
        )


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success it replaces `path`, on failure it is gone."""
    temp = path.with_name(f".{path.name}.{os.getpid()}{TEMP_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temp
        os.chmod(temp, 0o666 & ~_umask())
        os.replace(temp, path)
        _sync_folder(path.parent)
    except OSError as error:
        temp.unlink(missing_ok=True)
        raise _output_error(path, error) from error
    except BaseException as error:
        temp.unlink(missing_ok=True)
        # safetensors reports a full disk in its own exception type
        if "os error 28" in str(error):
            raise _disk_full(path) from error
        raise


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode() + b"\n"


def _sha256_of_values(values: Mapping[str, Any]) -> str:
    """Hex sha256 of `values` as JSON, the same before writing and after reading."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _output_error(path: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(path)
    return OutputError(
        "cannot write here",
        where=path,
        found=error.strerror or str(error),
        hint="choose an --out folder you may write to",
    )


def _disk_full(path: Path) -> DiskFullError:
    return DiskFullError(
        "the disk is full",
        where=path,
        found=f"{shutil.disk_usage(path.parent).free} bytes free",
        hint="free some space and run the same command again to resume",
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_stale_lock(path: Path) -> None:
    """Drop a lock whose process no longer runs (it was killed); one of another machine stays."""
    try:
        number, *host = path.read_text().split()
        process = int(number)
    except (OSError, ValueError):
        return
    if host and host[0] != platform.node():
        return
    if process == os.getpid():
        # in a container that was started again this process has the number of the one before
        if path.absolute() not in _held:
            path.unlink(missing_ok=True)
        return
    # a process of another user is alive too: the signal to it is refused
    with contextlib.suppress(PermissionError):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
