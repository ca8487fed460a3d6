"""Writing files that matter, and the random state that a resumed run needs.

A file is written under a temporary name in its own folder, flushed to the disk and renamed: a kill at any moment
leaves the file that was there or the new one, never half of it. Nothing is read back except as plain data
(`weights_only`), since a pickle can run code.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write` with a file that becomes `path` once it is complete and on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, 0o644)  # mkstemp makes files that only their owner reads
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


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


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically. Numbers that JSON lacks (NaN, infinity) become null."""
    text = json.dumps(_json_numbers(value), indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _json_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_numbers(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """torch.save, atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """torch.load of plain data and tensors; anything that would run code is refused."""
    return torch.load(path, map_location=map_location, weights_only=True)


def random_state() -> dict[str, Any]:
    """The state of every generator a training step may draw from, as plain values and tensors."""
    state: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = state
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every generator back to a state of `random_state`."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([item.cpu() for item in state["cuda"]])
