"""What a merged folder must remember for the merge to be undone bit for bit.

M = round(W + ΔW) has lost bits of W, so that M - ΔW is near W and not always W. Where rounding M was finer than the
rounding of W it is: only weights that the update moved to a larger power of two, or swallowed, come back wrong, and
those by a few units in the last place. So W is foretold as round(M - ΔW), and what is kept is how far off that is,
counted in floating-point numbers in between: nearly all zeros, which zlib makes small. The SHA-256 of each tensor,
before and after the merge, is kept as well, and nothing is given back, or taken, that does not have it.

ΔW is computed in float64 here, so that what is foretold does not hang on the order in which a machine adds.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafit.errors import InputError
from lorafit.lora import LoRAEmbedding, LoRALayer, LoRALinear
from lorafit.merging.base import stored
from lorafit.merging.candidates import Candidate, update_rows
from lorafit.weights import Planned, read_header, write_file

# content of a safetensors file; by another suffix, as readers of models take all that are called *.safetensors
UNDO = "undo.lorafit"
_AT_ONCE = 2**21  # weights that are foretold together


def ordered(tensor: Tensor) -> Tensor:
    """Floating numbers as whole ones in the same order, neighbours one apart; int64, and nothing is lost."""
    bits = 8 * tensor.dtype.itemsize
    whole = tensor.view({16: torch.int16, 32: torch.int32}[bits]).long()
    return torch.where(whole >= 0, whole, -(whole & (2 ** (bits - 1) - 1)) - 1)


def from_ordered(whole: Tensor, dtype: torch.dtype) -> Tensor:
    """The other way."""
    bits = 8 * dtype.itemsize
    magnitude = torch.where(whole >= 0, whole, (-whole - 1) - 2 ** (bits - 1))
    return magnitude.to({16: torch.int16, 32: torch.int32}[bits]).view(dtype)


def foretell(merged: Tensor, adapted: Any, start: int, stop: int) -> Tensor:
    """The rows start … stop of W as they seem from those of M: round(M - ΔW), or M itself where nothing was added."""
    if not isinstance(adapted, LoRALayer):
        return merged[start:stop]
    rows = slice(start, stop)
    return (merged[rows].double() - update_rows(adapted, rows, torch.float64)).to(merged.dtype)


def rows_of(tensor: Tensor, adapted: Any) -> tuple[Tensor, int]:
    """(a tensor as rows that `update_rows` counts, how many to take together)."""
    if isinstance(adapted, LoRALinear):
        tensor = stored(adapted.base_layer, tensor)
    elif not isinstance(adapted, LoRAEmbedding):
        tensor = tensor.reshape(-1, 1)
    return tensor, max(1, _AT_ONCE // max(1, tensor[:1].numel()))


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


class UndoWriter:
    """Collects, tensor by tensor, what undoes a merge; `write` puts it into the folder."""

    def __init__(self, candidate: Candidate, adapted: Mapping[str, Any], folder: Path) -> None:
        self.candidate, self.adapted, self.path = candidate, adapted, folder / UNDO
        self.blobs: dict[str, tuple[int, int]] = {}
        self.notes: dict[str, dict[str, str]] = {}
        self.draft = open(folder / f".{UNDO}", "w+b")  # compressed: their sizes are not known before

    def see(self, name: str, merged: Tensor) -> None:
        """Note what leads from a tensor of the merged model back to the one before."""
        if name not in self.candidate.before:
            self.notes[name] = {"sha256": sha256(merged)}
            return
        before, adapted = self.candidate.before[name].make(), adapter_of(self.adapted, name)
        old, new = rows_of(before, adapted)[0], rows_of(merged, adapted)[0]
        count = rows_of(merged, adapted)[1]
        parts = []
        for start in range(0, len(new), count):
            off = ordered(old[start : start + count].contiguous()) - ordered(
                foretell(new, adapted, start, start + count).contiguous()
            )
            parts.append(off.to(_narrowest(off)))
        widest = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize, default=torch.int8)
        content = zlib.compress(torch.cat([part.to(widest).flatten() for part in parts]).numpy().tobytes(), 6)
        at = self.draft.tell()
        self.draft.write(content)
        self.blobs[name] = (at, len(content))
        self.notes[name] = {
            "sha256": sha256(before),
            "merged": sha256(merged),
            "width": str(widest).removeprefix("torch."),
        }

    def write(self) -> int:
        """Write the file, and return its bytes."""

        def reader(at: int, length: int) -> Any:
            def read() -> Tensor:
                self.draft.seek(at)
                return torch.frombuffer(bytearray(self.draft.read(length)), dtype=torch.uint8)

            return read

        tensors = {
            name: Planned(torch.uint8, (length,), reader(at, length)) for name, (at, length) in self.blobs.items()
        }
        write_file(self.path, tensors, {"tensors": json.dumps(self.notes)})
        self.draft.close()
        os.unlink(self.draft.name)
        return self.path.stat().st_size


def _narrowest(off: Tensor) -> torch.dtype:
    largest = int(off.abs().max()) if off.numel() else 0
    return next(
        kind for kind in (torch.int8, torch.int16, torch.int32, torch.int64) if largest <= torch.iinfo(kind).max
    )


def adapter_of(adapted: Mapping[str, Any], name: str) -> Any:
    """What adapted a tensor: a LoRA layer for its weight, or nothing that can be computed."""
    owner, _, leaf = name.rpartition(".")
    module = adapted.get(owner)
    return module if leaf == "weight" and isinstance(module, LoRALayer) else None


def read_undo(folder: Path) -> tuple[dict[str, Planned], dict[str, dict[str, str]]]:
    """(compressed differences by name, their notes). Raises InputError where a folder has none."""
    if not (folder / UNDO).is_file():
        raise InputError(
            f"merged folder {str(folder)!r} has no {UNDO}, without which the merge cannot be undone exactly: "
            "it was merged with merge.undo=false, or quantized again"
        )
    tensors, metadata = read_header(folder / UNDO)
    try:
        notes = json.loads(metadata["tensors"])
        if not all(isinstance(note["sha256"], str) for note in notes.values()):
            raise ValueError("a tensor has no SHA-256")
        return tensors, notes
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{str(folder / UNDO)!r} does not say what it holds: {error!r}") from error


def restore(name: str, merged: Tensor, adapted: Any, content: Tensor | None, note: Mapping[str, str]) -> Tensor:
    """The tensor before the merge. Raises InputError when its hash, or that of what it was merged to, is not the one
    that was noted."""
    if content is None:  # the merge did not change it
        return _checked(name, merged, note)
    # a bit of M that is lost in rounding M - ΔW would not show in W
    if sha256(merged) != note.get("merged"):
        raise InputError(f"{name} does not come back as it was: the merged folder holds another than was written")
    try:
        off = torch.from_numpy(
            np.frombuffer(zlib.decompress(content.numpy().tobytes()), dtype=np.dtype(note["width"])).copy()
        )
        rows, count = rows_of(merged, adapted)
        off = off.view(rows.shape)
    except (zlib.error, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise InputError(f"{UNDO}: what it holds of {name} cannot be read: {error!r}") from error
    parts = []
    for start in range(0, len(rows), count):
        guess = ordered(foretell(rows, adapted, start, start + count).contiguous())
        parts.append(from_ordered(guess + off[start : start + count], merged.dtype))
    found = torch.cat(parts) if parts else rows
    found = rows_of(found, adapted)[0] if isinstance(adapted, LoRALinear) else found
    found = found.reshape(merged.shape).contiguous()
    return _checked(name, found, note)


def _checked(name: str, found: Tensor, note: Mapping[str, str]) -> Tensor:
    if sha256(found) != note["sha256"]:
        raise InputError(
            f"{name} does not come back as it was: the merged folder or the adapter is not the one of the merge"
        )
    return found
