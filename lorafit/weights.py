"""Weights in files: safetensors read and written a tensor at a time, so that they are never whole in memory.

A file is opened for each tensor and closed again. Mapping it into memory would be shorter, but pages of a mapped
file count as memory of the process as soon as they are touched, and what is loaded in 4 bits, or merged, is to fit
where the 16-bit model does not.

The format (https://github.com/huggingface/safetensors#format): eight bytes for the length of a JSON header, the
header with the dtype, shape and place of each tensor, and the tensors. As all shapes are known before the first
weight is computed, the header can be written first and the weights one after another.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from lorafit.errors import InputError, reason
from lorafit.files import require_regular

Key = TypeVar("Key")
Result = TypeVar("Result")

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes: what safetensors itself reads
_MOST_SIZES = 64  # of one tensor: what torch counts and compares


@dataclass(frozen=True)
class Planned:
    """A tensor that is not there yet: its dtype and shape, and how it is made; or how it is read into memory that is
    there, of `nbytes` uint8."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    read_into: Callable[[Tensor], None] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Weights = Mapping[str, Planned]  # named tensors in an order, one at a time in memory


class FileWeights(Mapping[str, Planned]):
    """The tensors of a model folder, or of some safetensors files, in the order in which they lie there.

    Raises InputError for an index or a file that cannot be read.
    """

    def __init__(self, source: str | Path | Iterable[str | Path]) -> None:
        files = _files_of(Path(source)) if isinstance(source, str | Path) else source
        self._tensors: dict[str, Planned] = {}
        self._paths: dict[str, Path] = {}
        for path in files:
            tensors = read_header(Path(path))[0]
            self._tensors |= tensors
            self._paths |= dict.fromkeys(tensors, Path(path))

    def mapped(self, name: str) -> Tensor:
        """A tensor as a view of its file: pages that nobody looks at take no memory, and processes share the others."""
        with safe_open(self._paths[name], framework="pt") as file:
            return file.get_tensor(name)

    def __getitem__(self, name: str) -> Planned:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Ahead(Generic[Key, Result]):
    """Does jobs in a thread, in their order, and one before its result is asked for.

    A job is given 0 or 1 in turn, for the memory that it may write to: what it returned is used until the next result
    is asked for. To be left as a context.
    """

    def __init__(self, jobs: Iterable[tuple[Key, Callable[[int], Result]]]) -> None:
        self._jobs = dict(jobs)
        self._order = iter(list(self._jobs))
        self._pool = ThreadPoolExecutor(1)
        self._begun: deque[tuple[Key, Future[Result]]] = deque()
        self._number = 0
        self._begin()

    def _begin(self) -> None:
        for key in self._order:
            self._begun.append((key, self._pool.submit(self._jobs[key], self._number % 2)))
            self._number += 1
            return

    def get(self, key: Key) -> Result | None:
        """The result of a job, or None where there is none of that name, or it was passed over already."""
        if key not in self._jobs:
            return None
        while self._begun:
            found, future = self._begun.popleft()
            del self._jobs[found]
            future.exception()  # is done with its memory
            self._begin()
            if found == key:
                return future.result()
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _files_of(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return [folder / name for name in indexed_files(folder)]
    files = sorted(folder.glob("*.safetensors"))
    return [path for path in files if path.name == "model.safetensors"] or files


def indexed_files(folder: Path) -> list[str]:
    """The names of the files in which the index of a folder says that its tensors are. Raises InputError."""
    try:
        names = list(dict.fromkeys(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{str(folder / INDEX)!r} is no index of a model's files: {reason(error)[:200]}") from error
    for name in names:
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise InputError(f"{str(folder / INDEX)!r} names {name!r}, which is no file of its folder")
    return names


def read_header(path: Path) -> tuple[dict[str, Planned], dict[str, str]]:
    """(the tensors of a safetensors file in their order, its metadata)."""
    require_regular(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, _LONGEST_HEADER):  # before as much memory is asked for
                raise ValueError(f"it claims a header of {length} bytes, and has {size} in all")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are not texts")
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        tensors = {name: _in_file(path, 8 + length, entry) for name, entry in entries}
        end = 8 + length + max((entry["data_offsets"][1] for _, entry in entries), default=0)
        if size < end:
            raise ValueError(f"it is cut: {size} bytes are there of {end}")
        return tensors, metadata
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        said = f"{type(error).__name__}: {reason(error)[:200]}"  # the text of some holds the whole header
        raise InputError(f"{str(path)!r} is no safetensors file that can be read: {said}") from error


def _in_file(path: Path, start: int, entry: Mapping[str, Any]) -> Planned:
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    first, last = entry["data_offsets"]
    numbers = (first, last, *shape)
    if len(shape) > _MOST_SIZES or not all(type(number) is int and abs(number) < 2**48 for number in numbers):
        raise ValueError(f"{str(shape)[:80]} from {str(first)[:80]} to {str(last)[:80]} is no place of a tensor")
    if last - first != math.prod(shape) * dtype.itemsize or min(first, *shape, 0) < 0:
        raise ValueError(f"bytes {first} to {last} are not those of a {list(shape)} in {entry['dtype']}")

    def read_into(memory: Tensor) -> None:
        with open(path, "rb", buffering=0) as file:
            file.seek(start + first)
            view, at = memory.numpy().data, 0
            while at < len(view):
                got = file.readinto(view[at:])
                if not got:
                    raise InputError(f"{str(path)!r} ends before its last tensor: it is cut")
                at += got

    def read() -> Tensor:
        if first == last:
            return torch.empty(shape, dtype=dtype)
        tensor = torch.empty(last - first, dtype=torch.uint8)
        read_into(tensor)
        return tensor.view(dtype).view(shape)

    return Planned(dtype, shape, read, read_into)


def write_file(
    path: Path,
    tensors: Mapping[str, Planned],
    metadata: Mapping[str, str] | None = None,
    seen: Callable[[str, Tensor], None] | None = None,
) -> None:
    """Write one safetensors file, a tensor at a time, and see it to the disk. Not atomic: for files in a draft."""
    ordered: Sequence[tuple[str, Planned]] = list(tensors.items())
    if len({planned.dtype.itemsize for _, planned in ordered}) > 1:
        # readers take a tensor as a view of the file, which must begin at a multiple of its item's size
        ordered = sorted(ordered, key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for name, planned in ordered:
        header[name] = {
            "dtype": NAMES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [at, at + planned.nbytes],
        }
        at += planned.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, planned in ordered:
            tensor = planned.make().detach().cpu().contiguous()
            if tensor.dtype != planned.dtype or tuple(tensor.shape) != planned.shape:
                raise AssertionError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {planned}")
            if seen is not None:
                seen(name, tensor)
            if tensor.numel():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def give_memory_back() -> None:
    """Let glibc return large blocks to the system when they are freed, for the rest of the process.

    It raises the size from which it does so each time that such a block is freed, up to 32 MiB; the weights of most
    layers are smaller, and what they leave behind in the heap was half of a merge's memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_mmap_threshold = -3
        mallopt(m_mmap_threshold, 2**20)
