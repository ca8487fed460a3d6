"""Weights that are never whole in memory: safetensors files read a tensor at a time, and written so.

A file is opened for each tensor and closed again. Mapping it into memory would be shorter, but pages of a mapped
file count as memory of the process as soon as they are touched, and a merge is to fit where the model alone does not.

The format (https://github.com/huggingface/safetensors#format): eight bytes for the length of a JSON header, the
header with the dtype, shape and place of each tensor, and the tensors. As all shapes are known before the first
weight is computed, the header can be written first and the weights one after another.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import InputError

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
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Planned:
    """A tensor that is not there yet: its dtype and shape, and how it is made."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Weights = Mapping[str, Planned]  # named tensors in an order, one at a time in memory


def size(text: str) -> int:
    """Bytes of "5GB" or "500MB". Raises InputError for what is no size."""
    found = re.fullmatch(r"(\d+)\s*(B|KB|MB|GB)", text)
    if not found or not int(found[1]):
        raise InputError(f"a size is a number with B, KB, MB or GB, such as 5GB, got {text!r}")
    return int(found[1]) * UNITS[found[2]]


class FileWeights(Mapping[str, Planned]):
    """The tensors of a model folder, in the order in which they lie there; `make` reads one.

    Raises InputError for an index or a file that cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if (folder / INDEX).is_file():
            files = [folder / name for name in indexed_files(folder)]
        else:
            files = sorted(folder.glob("*.safetensors"))
            files = [path for path in files if path.name == "model.safetensors"] or files
        self._tensors: dict[str, Planned] = {}
        for path in files:
            self._tensors |= read_header(path)[0]

    def __getitem__(self, name: str) -> Planned:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def indexed_files(folder: Path) -> list[str]:
    """The names of the files in which the index of a folder says that its tensors are. Raises InputError."""
    try:
        names = list(dict.fromkeys(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{str(folder / INDEX)!r} is no index of a model's files: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise InputError(f"{str(folder / INDEX)!r} names {name!r}, which is no file of its folder")
    return names


def read_header(path: Path) -> tuple[dict[str, Planned], dict[str, str]]:
    """(the tensors of a safetensors file in their order, its metadata)."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        return {name: _in_file(path, 8 + length, entry) for name, entry in entries}, metadata
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise InputError(f"{str(path)!r} is no safetensors file that can be read: {error!r}") from error


def _in_file(path: Path, start: int, entry: Mapping[str, Any]) -> Planned:
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if last - first != math.prod(shape) * dtype.itemsize or min(first, *shape, 0) < 0:
        raise ValueError(f"bytes {first} to {last} are not those of a {list(shape)} in {entry['dtype']}")

    def read() -> Tensor:
        tensor = torch.empty(last - first, dtype=torch.uint8)
        with open(path, "rb", buffering=0) as file:
            file.seek(start + first)
            view, at = tensor.numpy().data, 0
            while at < len(view):
                got = file.readinto(view[at:])
                if not got:
                    raise InputError(f"{str(path)!r} ends before its last tensor: it is cut")
                at += got
        return tensor.view(dtype).view(shape) if tensor.numel() else torch.empty(shape, dtype=dtype)

    return Planned(dtype, shape, read)


def write_shards(
    folder: Path,
    tensors: Mapping[str, Planned],
    limit: int,
    seen: Callable[[str, Tensor], None] | None = None,
) -> int:
    """Write tensors into a folder as transformers names its files, none of more than `limit` bytes unless one tensor
    is; return the bytes of all tensors. `seen` is called with each tensor as it is written."""
    shards: list[dict[str, Planned]] = [{}]
    for name, planned in tensors.items():
        if shards[-1] and sum(item.nbytes for item in shards[-1].values()) + planned.nbytes > limit:
            shards.append({})
        shards[-1][name] = planned
    total = sum(planned.nbytes for planned in tensors.values())
    if len(shards) == 1:
        write_file(folder / "model.safetensors", shards[0], seen=seen)
        return total
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard, seen=seen)
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


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
