"""Writing files that matter.

A file is written under a temporary name in its own folder, flushed to the disk and renamed: a kill at any moment
leaves the file that was there or the new one, never half of it. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from lorafit.errors import InputError
from lorafit.redact import redact_values

_DRAFT = ".draft"  # how the names of files end that are being written


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object], keep: str | Path | None = None) -> None:
    """Call `write` with a file that becomes `path` once it is complete and on the disk. keep: where the file goes that
    was at `path`; at every moment one of the two is there, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=_DRAFT)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, 0o644)  # mkstemp makes files that only their owner reads
        if keep is not None and path.exists():
            _keep(path, Path(keep))
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def _keep(path: Path, kept: Path) -> None:
    """Give what is at `path` the name `kept` as well, or instead where a file can have one name only."""
    second = kept.with_name(f".{kept.name}{_DRAFT}")
    try:
        second.unlink(missing_ok=True)
        os.link(path, second)
        os.replace(second, kept)
    except OSError:
        os.replace(path, kept)


def clear_drafts(folder: str | Path) -> None:
    """Remove what writers left in a folder that were killed. Only for who is alone at work there."""
    for path in Path(folder).glob(f".*{_DRAFT}"):
        if path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def replace_folder(draft: Path, folder: Path) -> None:
    """Put the complete folder `draft` where `folder` is. What only `folder` holds is kept."""
    if not folder.exists():
        draft.rename(folder)
        return
    _exchange(draft, folder)
    for path in draft.iterdir():
        if not (folder / path.name).exists():
            path.rename(folder / path.name)
    shutil.rmtree(draft)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders: in a single step where the system has one (Linux), else one rename after the other."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange = -100, 2
    if renameat2 and renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return
    aside = Path(tempfile.mkdtemp(dir=other.parent, prefix=f".{other.name}-old-")) / other.name
    other.rename(aside)
    try:
        one.rename(other)
    except BaseException:
        aside.rename(other)
        raise
    aside.rename(one)
    aside.parent.rmdir()


def require_regular(path: str | Path) -> None:
    """Raise InputError where something else than a file lies at `path`: a pipe or a device, whose reader would wait
    for ever, or a folder. Where nothing lies there, whoever opens it says so."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        kind = next((name for test, name in kinds if test(mode)), "a device")
        raise InputError(f"{str(path)!r} is {kind}: a plain file is expected there")


def require_own_files(folder: str | Path, depth: int = 1) -> None:
    """Raise InputError where something in a folder, or in those `depth` levels below it, is neither a plain file nor a
    folder, or is a link that leads out of it: a reader would wait for ever, or read what is not the folder's.

    The cache of the hub keeps its files beside its snapshots, as links into `blobs`: those stay in their repository.
    """
    root = Path(folder).resolve()
    homes = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    below = [(Path(folder), depth)]
    while below:
        place, levels = below.pop()
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"{str(place)!r} cannot be read ({error.strerror})") from error
        for entry in entries:
            path = Path(entry.path)
            if entry.is_symlink():
                target = Path(os.path.realpath(path))
                if not any(target.is_relative_to(home) for home in homes):
                    raise InputError(
                        f"{str(path)!r} is a link out of the folder, to {str(target)!r}, and is not followed: put the "
                        "file itself there"
                    )
            if not os.path.isdir(path):
                require_regular(path)
            elif levels and not entry.name.startswith("."):
                below.append((path, levels - 1))


def copy_atomically(path: Path, place: Path) -> None:
    """Copy a file by `write_atomically`. Raises OSError."""
    with path.open("rb") as source:
        write_atomically(place, lambda target: shutil.copyfileobj(source, target))


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically, secrets as ***. NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(redact_values(_json_numbers(value)), indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _json_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_numbers(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
