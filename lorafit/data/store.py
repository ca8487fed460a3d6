"""Tokenized examples: a few flat arrays in memory or on the disk, instead of an object for each.

A million examples of five hundred tokens are 2.5 GB as arrays and forty as lists of Python's ints. What was tokenized
once is kept under a key of everything it depends on, and opened again as a memory map: the next start costs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lorafit.cache import forget_oldest
from lorafit.data.tokens import IGNORE, Encoded, Sequence

CACHE_LIMIT = 20 << 30  # bytes; the entries that were not used for longest go first
_ARRAYS = ("ids", "trained", "offsets", "keys", "origin", "number")
_PLACE = re.compile(r"(.*?)([1-9][0-9]{0,17}|0?)", re.DOTALL)  # "train.jsonl:17" -> "train.jsonl:", "17"


class Sequences:
    """Encoded examples, each by its number. ids [tokens] int32 and trained [tokens] bool lie end to end; example i is
    ids[offsets[i] : offsets[i + 1]]. keys [examples] uint64: `Example.key`, equal for duplicates. Its row stands at
    `origins[origin[i]]` followed by `number[i]`."""

    def __init__(
        self,
        ids: np.ndarray,
        trained: np.ndarray,
        offsets: np.ndarray,
        keys: np.ndarray,
        origin: np.ndarray,
        number: np.ndarray,
        origins: list[str],
    ) -> None:
        self.ids, self.trained, self.offsets, self.keys = ids, trained, offsets, keys
        self.origin, self.number, self.origins = origin, number, origins

    def place(self, index: int) -> str:
        """Where the row of an example stands."""
        number = int(self.number[index])
        return self.origins[int(self.origin[index])] + (str(number) if number >= 0 else "")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Sequence:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start, end = self.offsets[index], self.offsets[index + 1]
        ids = self.ids[start:end].astype(np.int64)
        return {"input_ids": ids, "labels": np.where(self.trained[start:end], ids, IGNORE)}

    def __iter__(self) -> Iterator[Sequence]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each."""
        return np.diff(self.offsets)

    @property
    def supervised(self) -> np.ndarray:
        """The number of trained tokens of each."""
        totals = np.concatenate(([0], np.cumsum(self.trained, dtype=np.int64)))
        return totals[self.offsets[1:]] - totals[self.offsets[:-1]]

    def select(self, chosen: np.ndarray) -> Sequences:
        """Those at the numbers `chosen`, in that order, copied."""
        chosen = np.asarray(chosen, dtype=np.int64)
        lengths = self.lengths[chosen]
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        where = np.repeat(self.offsets[chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Sequences(
            self.ids[where],
            self.trained[where],
            offsets,
            self.keys[chosen],
            self.origin[chosen],
            self.number[chosen],
            self.origins,
        )


class Builder:
    """Collects examples into Sequences."""

    def __init__(self) -> None:
        self._ids, self._trained = array("i"), bytearray()
        self._offsets, self._keys = array("q", [0]), array("Q")
        self._origin, self._number = array("i"), array("q")
        self._origins: dict[str, int] = {}

    def add(self, encoded: Encoded, key: int, where: str) -> None:
        """Append one example."""
        self._ids.frombytes(np.ascontiguousarray(encoded.ids, dtype=np.int32).tobytes())
        self._trained += encoded.trained.tobytes()
        self._offsets.append(len(self._ids))
        self._keys.append(key)
        found = _PLACE.fullmatch(where)
        before, number = found.groups() if found else (where, "")
        self._origin.append(self._origins.setdefault(before, len(self._origins)))
        self._number.append(int(number) if number else -1)

    def __len__(self) -> int:
        return len(self._keys)

    def sequences(self) -> Sequences:
        """What was added, as arrays."""
        arrays: dict[str, Any] = {
            "ids": np.array(self._ids, dtype=np.int32),
            "trained": np.frombuffer(bytes(self._trained), dtype=bool),
            "offsets": np.array(self._offsets, dtype=np.int64),
            "keys": np.array(self._keys, dtype=np.uint64),
            "origin": np.array(self._origin, dtype=np.int32),
            "number": np.array(self._number, dtype=np.int64),
        }
        return Sequences(**arrays, origins=list(self._origins))


# ------------------------------------------------------------------------------------------------ on the disk


def sha256(file: Path) -> str:
    """The hash of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def save(folder: Path, parts: dict[str, Sequences], meta: dict[str, Any]) -> None:
    """Write an entry; it is there whole or not at all. A disk that is full or not ours is no reason to stop."""
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".draft-"))
        try:
            for part, sequences in parts.items():
                for name in _ARRAYS:
                    np.save(draft / f"{part}-{name}.npy", getattr(sequences, name), allow_pickle=False)
            origins = {part: sequences.origins for part, sequences in parts.items()}
            (draft / "meta.json").write_text(json.dumps({"origins": origins, "meta": meta}))
            (draft / "sums.json").write_text(json.dumps(_sums(draft)))
            shutil.rmtree(folder, ignore_errors=True)  # what is there could not be read
            os.rename(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        forget_oldest(folder.parent, keep=folder, limit=CACHE_LIMIT)


def load(folder: Path, parts: tuple[str, ...]) -> tuple[dict[str, Sequences], dict[str, Any]] | None:
    """(parts, meta) of an entry as memory maps, or None where there is none that is as it was written.

    That is seen by the hashes of its files: a disk that lost power may give back zeros, which would be trained.
    """
    try:
        if json.loads((folder / "sums.json").read_bytes()) != _sums(folder):
            return None
        saved = json.loads((folder / "meta.json").read_bytes())
        found = {}
        for part in parts:
            arrays: dict[str, Any] = {
                name: np.load(folder / f"{part}-{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS
            }
            found[part] = Sequences(**arrays, origins=saved["origins"][part])
        meta = saved["meta"]
    except Exception:  # whatever is wrong with it, the rows are still there
        return None
    with contextlib.suppress(OSError):
        os.utime(folder)  # used now
    return found, meta


def _sums(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in folder.iterdir() if file.name != "sums.json"}
