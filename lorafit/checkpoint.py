"""Checkpoints, and the random state that a resumed run needs.

Nothing is read back except as plain data (`weights_only`), since a pickle can run code; and nothing that is not the
file that was written: PyTorch leaves the checksums in its archives unread, so that a flipped bit would go on as a
weight. They are read here. The checkpoint before the newest one is kept, for the day on which that one is damaged.
"""

from __future__ import annotations

import random
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from lorafit.errors import InputError, reason
from lorafit.files import write_atomically

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
_PARTS = {"global_step": int, "state_dict": dict, "loops": dict, "optimizer_states": list, "random_state": dict}


def save_checkpoint(path: str | Path, state: dict[str, Any], keep: str | Path | None = None) -> None:
    """torch.save, atomically. keep: where the checkpoint goes that was at `path`. Raises OSError where the disk does
    not take it; then what was at `path` is there as it was."""

    def write(file: IO[bytes]) -> None:
        told = _Told(file)
        try:
            torch.save(state, told)  # type: ignore[arg-type]  # all that it asks of a file
        except Exception:
            if told.error is not None:  # PyTorch tells of a full disk as of a fault in its own writer
                raise told.error from None
            raise

    write_atomically(path, write, keep=keep)


class _Told:
    """A file that remembers why it could not be written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """torch.load of plain data and tensors. Raises InputError for a file that is damaged, or would run code."""
    return _load(path, map_location, lambda state: None)


def load_run(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """`load_checkpoint` of a run. Raises InputError also where it lacks a part of one."""
    return _load(path, map_location, _require_parts)


def _load(path: str | Path, map_location: Any, require: Callable[[object], None]) -> dict[str, Any]:
    try:
        _require_whole(Path(path))
        state: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        require(state)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # of many kinds, and PyTorch's own advice would have the file run its code
        raise InputError(f"{path} cannot be read as a checkpoint ({_said(error)}): remove it to begin anew") from error
    return state


class Unfit(InputError):
    """A checkpoint is whole, but what it holds cannot be gone on from."""


class _Damaged(Exception):
    """What is wrong with a file."""


def _said(error: Exception) -> str:
    """What is wrong; not PyTorch's words, which go on to how to trust the file."""
    return reason(error) if isinstance(error, _Damaged | OSError) else type(error).__name__


def _require_whole(path: Path) -> None:
    """Hold every part of the archive against its checksum."""
    if path.exists() and not path.is_file():
        raise _Damaged("it is no regular file")
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                raise _Damaged("it is compressed, which no checkpoint is")
            if sum(part.file_size for part in parts) > path.stat().st_size:
                raise _Damaged("it claims more than it holds")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, RuntimeError) as error:
        raise _Damaged("it is cut off or damaged") from error
    if damaged is not None:
        raise _Damaged("its checksums do not agree with what is in it")


def _require_parts(state: object) -> None:
    if not isinstance(state, dict):
        raise _Damaged("it holds no state of a run")
    for key, kind in _PARTS.items():
        if not isinstance(state.get(key), kind):
            raise _Damaged(f"{key!r} is missing, or is none")
    if isinstance(state["global_step"], bool) or not 0 <= state["global_step"] < 2**48:
        raise _Damaged("its step is impossible")
    try:
        progress = state["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
        taken = progress["optimizer"]["step"]["total"]["completed"]
    except (LookupError, TypeError):  # loops of another shape are told of when they are to be gone on with
        return
    if taken != state["global_step"]:
        raise _Damaged(f"it is said to be of step {state['global_step']}, and its loops are not")


@dataclass
class Found:
    """A checkpoint that can be gone on from. damaged: what is wrong with newer ones, by their path."""

    path: Path
    step: int  # how many optimizer steps it has taken
    run: Any  # what it says of the run that it belongs to
    damaged: dict[Path, str]
    validated: int | None = None  # the last step whose held-out loss it knows of; None where it does not say


def newest_checkpoint(folder: str | Path) -> Found | None:
    """The newest checkpoint in a folder that can be read: the last, else the one before it, else the best. None where
    there is none at all; InputError that names them all where none can be read."""
    damaged: dict[Path, str] = {}
    for name in (LAST, PREVIOUS, BEST):
        path = Path(folder) / name
        if not path.exists():
            continue
        try:
            state = load_run(path)
            return Found(path, int(state["global_step"]), state.get("run"), damaged, _validated_step(state))
        except InputError as error:
            damaged[path] = str(error)
    if damaged:
        raise InputError("\n".join(damaged.values()))
    return None


def _validated_step(state: dict[str, Any]) -> int | None:
    """What the callback that validates has noted; the file may be a stranger's."""
    states = state.get("callbacks")
    noted = (
        [part.get("validated_step") for part in states.values() if isinstance(part, dict)]
        if isinstance(states, dict)
        else []
    )
    return next((step for step in noted if isinstance(step, int)), None)


def require_like(found: object, own: object, what: str) -> None:
    """Raise Unfit where a piece of a checkpoint is not of the kind of `own`, which says how it should look:
    numbers where it has numbers, the same keys where it has keys. A None in `own` stands for anything plain."""
    good = True
    if isinstance(own, dict):
        good = isinstance(found, dict) and all(isinstance(key, str) for key in found)
        if good:
            assert isinstance(found, dict)
            like = own or dict.fromkeys(found, 0)  # what is still empty holds numbers
            if missing := sorted(set(like) - set(found)):
                raise Unfit(f"{what} lacks {missing[0]!r}")
            for key, value in like.items():
                require_like(found[key], value, f"{what}.{key}")
    elif isinstance(own, bool):
        good = isinstance(found, bool)
    elif isinstance(own, int | float):
        good = isinstance(found, int | float) and not isinstance(found, bool)
    elif isinstance(own, str | list | tuple):
        good = isinstance(found, str if isinstance(own, str) else list | tuple)
    if not good:
        raise Unfit(f"{what} is {type(found).__name__}, where {type(own).__name__} belongs")


def require_counts(found: object, what: str) -> None:
    """Raise Unfit unless a tree of dicts and lists holds nothing but whole numbers from zero on."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            require_counts(value, f"{what}.{key}")
    elif isinstance(found, list | tuple):
        for value in found:
            require_counts(value, what)
    elif not isinstance(found, int) or not 0 <= found < 2**48:
        raise Unfit(f"{what} is {str(found)[:40]!r}, where a count belongs")


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
    torch.set_rng_state(state["torch"].cpu().clone())  # which crashes for a tensor that begins within another's memory
    for number, item in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):  # it may have fewer now
        torch.cuda.set_rng_state(item.cpu().clone(), number)


def device_random_state(device: torch.device) -> torch.Tensor:
    """The state of the generators that this process draws dropout masks from, as bytes [n]: in a group of processes
    each has drawn as many as its own batches took."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_device_random_state(state: torch.Tensor, device: torch.device) -> None:
    """Put the generators back to a state of `device_random_state`."""
    own = len(torch.get_rng_state())
    torch.set_rng_state(state[:own].cpu().clone())  # for the same reason as above
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[own:].cpu().clone(), device)
