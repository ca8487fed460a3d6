"""Quantized copies: the layers of a model as they were quantized, on the disk, to be read and not made the next time.

    entry = entry_of(paths, model, quant, device)
    copy = open_copy(entry)                    None where there is none that is whole
    copy.layer(name, linear)                   a quantized layer, or why there is none
    write_copy(entry, model, report)

Only what was quantized is kept; the rest is read from the model's own files, without which a copy is not looked for.
An entry is named after everything that decides its bytes. It is written beside its place and renamed, so that it is
there whole or not at all, and each of its tensors is held against a checksum as it is read: what is damaged is
quantized again from the model's files. The entries that were not used for longest go when there are too many.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.cache import cache_folder, forget_oldest
from lorafit.quant import BaseReport, Quantization, is_quantized, layer_of_packed, linear_layers, packed_tensors
from lorafit.weights import Ahead, Planned, read_header, write_file

FORMAT = 1
SMALLEST = 64 << 20  # bytes of a model's files; a smaller one is quantized as fast as it is read
LIMIT = 20 << 30  # bytes of all entries
_FILE = "layers.safetensors"
_SAMPLES, _SAMPLE = 64, 4096

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """The place of a copy, and what it must have been made of and by."""

    folder: Path
    made_of: str
    quant: Quantization
    device: torch.device


def entry_of(paths: Sequence[Path], model: Any, quant: Quantization, device: torch.device) -> Entry | None:
    """The entry of a model that was read from `paths`, or None where it is too small to be worth one."""
    try:
        if sum(path.stat().st_size for path in paths) < SMALLEST:
            return None
        files = [_file(path) for path in paths]
    except OSError:
        return None
    made_of = {
        "format": FORMAT,
        "files": files,
        "config": {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"},
        "dtype": str(model.dtype),
        "quant": quant.as_dict(),
        # which layers bitsandbytes reads back rightly is a matter of the processor, and the last bit of the mean that
        # double quantization takes one of how many threads add it up
        "device": [device.type, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        "versions": [version("bitsandbytes"), version("transformers"), torch.__version__.split(".")[0]],
    }
    text = json.dumps(made_of, sort_keys=True, default=str)
    return Entry(cache_folder("models") / hashlib.sha256(text.encode()).hexdigest()[:32], text, quant, device)


def _file(path: Path) -> list[Any]:
    """A file's name, size, times and the hash of a sample of it: its head, and runs of bytes throughout."""
    status = path.stat()
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for number in range(_SAMPLES + 1):
            file.seek(max(0, status.st_size - _SAMPLE) * number // _SAMPLES)
            digest.update(file.read(_SAMPLE))
    return [path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, digest.hexdigest()]


class QuantizedCopy:
    """An entry that is there. sound: whether all that was asked of it could be given."""

    def __init__(self, entry: Entry) -> None:
        """Raises whatever speaks against the entry."""
        self.entry, self.sound = entry, True
        tensors, metadata = read_header(entry.folder / _FILE)
        if hashlib.sha256(metadata["about"].encode()).hexdigest() != metadata["sum"]:
            raise ValueError("what the entry says of itself is damaged")
        about = json.loads(metadata["about"])
        if about["made_of"] != entry.made_of:
            raise ValueError("the entry was made of something else")
        self.fingerprint: str | None = about["fingerprint"]
        self._left, self._sums = about["left"], about["sums"]
        self._tensors: dict[str, dict[str, Planned]] = {}
        for name, planned in tensors.items():
            layer, _, part = name.partition("/")
            self._tensors.setdefault(layer, {})[part] = planned
        if sorted(tensors) != sorted(self._sums):
            raise ValueError("the entry holds other tensors than it says")
        self._ahead = Ahead((name, functools.partial(self._read, name)) for name in self._tensors)

    def _read(self, name: str, _: int) -> dict[str, Tensor] | None:
        try:
            found = {part: planned.make() for part, planned in self._tensors[name].items()}
            sums = {part: _sum(tensor) for part, tensor in found.items()}
        except Exception:  # whatever is wrong with it, the model's own files are still there
            return None
        return found if all(self._sums[f"{name}/{part}"] == each for part, each in sums.items()) else None

    def layer(self, name: str, linear: nn.Module) -> nn.Module | str | None:
        """The quantized twin of a layer, or why it was left as it is; None where the entry does not know it."""
        if name in self._left:
            return str(self._left[name])
        tensors = self._ahead.get(name)
        if tensors is not None:
            with contextlib.suppress(Exception):
                return layer_of_packed(linear, self.entry.quant, tensors, self.entry.device)
        self.sound = False
        return None

    def close(self) -> None:
        """No more layers will be asked for."""
        self._ahead.__exit__()


@contextlib.contextmanager
def open_copy(entry: Entry | None) -> Iterator[QuantizedCopy | None]:
    """The copy of an entry, or None where there is none that can be trusted."""
    copy = None
    if entry is not None:
        with contextlib.suppress(Exception):
            copy = QuantizedCopy(entry)
            os.utime(entry.folder)  # used now
    try:
        yield copy
    finally:
        if copy is not None:
            copy.close()


def write_copy(entry: Entry, model: nn.Module, report: BaseReport) -> None:
    """Write an entry. A disk that is full or not ours is said, and is no reason to stop."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, layer in linear_layers(model).items():
        if is_quantized(layer) and id(layer) not in seen:
            seen.add(id(layer))
            tensors |= {f"{name}/{part}": tensor for part, tensor in packed_tensors(layer).items()}
    about = {
        "made_of": entry.made_of,
        "fingerprint": report.fingerprint,
        "left": report.left,
        "sums": {name: _sum(tensor) for name, tensor in tensors.items()},
    }
    text = json.dumps(about)
    metadata = {"about": text, "sum": hashlib.sha256(text.encode()).hexdigest()}
    planned = {name: _there(tensor) for name, tensor in tensors.items()}
    parent = entry.folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        needed, free = sum(each.nbytes for each in planned.values()), shutil.disk_usage(parent).free
        if needed * 1.1 > free:
            log.warning("no quantized copy is kept: it needs %d MB and %s has %d", needed >> 20, parent, free >> 20)
            return
        draft = Path(tempfile.mkdtemp(dir=parent, prefix=".draft-"))
        try:
            write_file(draft / _FILE, planned, metadata)
            shutil.rmtree(entry.folder, ignore_errors=True)  # what is there could not be read
            try:
                os.rename(draft, entry.folder)
            except OSError:
                if not (entry.folder / _FILE).is_file():  # another process was first, and its copy is as good
                    raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        log.warning("no quantized copy is kept in %s: %s", parent, error)
        return
    with contextlib.suppress(OSError):  # another process may be tidying up as well
        _forget_drafts(parent)
        forget_oldest(parent, keep=entry.folder, limit=LIMIT)


def _there(tensor: Tensor) -> Planned:
    return Planned(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _sum(tensor: Tensor) -> int:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def _forget_drafts(folder: Path) -> None:
    """Remove what processes that were killed have begun."""
    for path in folder.iterdir():
        if path.name.startswith(".draft-") and time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)
