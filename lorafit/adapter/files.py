"""The files of an adapter folder, read as a stranger's: nothing in them is executed, trusted or followed elsewhere.

Weights are safetensors; a pickle is named and left alone. A file that is a link out of its folder is not opened. The
hash that lorafit.json holds of the weights is checked, so that one flipped bit is noticed.

In 8 or 4 bits the weights lie in a file of another name, since whoever reads only peft's would take the codes for
the values.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lorafit.errors import InputError, near_path, reason
from lorafit.files import require_regular
from lorafit.rounding import (
    METADATA,
    SCALES,
    Packed,
    dequantize,
    from_metadata,
    from_tensors,
    quantize,
    to_metadata,
    to_tensors,
)

CONFIG, WEIGHTS, PROVENANCE, CARD = "adapter_config.json", "adapter_model.safetensors", "lorafit.json", "README.md"
ROUNDED = {"int8": "adapter_model.int8.safetensors", "nf4": "adapter_model.nf4.safetensors"}
WEIGHT_FILES = (WEIGHTS, *ROUNDED.values())
_LARGEST_JSON = 32 * 2**20  # bytes; a list of layers and some numbers take far less
_LONGEST_NAME = 1000  # letters of a tensor's


def find_adapter(name: str) -> Path:
    """The folder of an adapter: a folder, or one on the hub (org/name), fetched without what is not an adapter.

    Raises InputError where there is none, naming the nearest.
    """
    folder = Path(name)
    if os.path.isdir(folder):  # a Path's own is_dir raises for a name that is too long
        _require_adapter(folder)
        return folder
    if os.path.exists(folder):
        raise InputError(f"adapter {name!r} is a file: give the folder that holds it")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"adapter: no folder {name!r}.{near_path(name)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, *WEIGHT_FILES, PROVENANCE]))
    except Exception as error:  # the hub's errors have no common root
        raise InputError(f"adapter: no folder {name!r}, and the hub does not give it: {reason(error)}") from error


def _require_adapter(folder: Path) -> None:
    """Raise InputError where a folder is no adapter's, with what it is instead."""
    if (folder / CONFIG).exists():
        return
    hint = ""
    if (folder / "adapter" / CONFIG).is_file():
        hint = f": it is a run. Did you mean {str(folder / 'adapter')!r}?"
    elif (folder / "config.json").is_file():
        hint = ": it is a model, no adapter"
    raise InputError(f"adapter folder {str(folder)!r} has no {CONFIG}{hint}")


def inside(folder: Path, name: str) -> Path:
    """The file of a folder. Raises InputError where it is a link that leads out of it.

    The cache of the hub keeps its files beside its snapshots, as links into `blobs`: those stay in their repository.
    """
    path, target = folder / name, Path(os.path.realpath(folder / name))  # which, unlike resolve, takes a loop of links
    homes = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        homes.append(folder.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        raise InputError(f"adapter folder {str(folder)!r}: {name} is a link out of the folder, to {str(target)!r}")
    return path


def read_json(folder: Path, name: str) -> Any:
    """The value of a JSON file of the folder; InputError where it cannot be read."""
    path = inside(folder, name)
    require_regular(path)
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes are too many for a {name}")
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as JSON: {reason(error)}") from error


def weights_file(folder: Path, recorded: str | None = None) -> Path:
    """The file of weights in the folder: the one that lorafit.json names, or else the only one.

    Raises InputError where there is none, or only a pickle, or more than one.
    """
    found = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        others = sorted(path.name for path in folder.glob("adapter_model*"))
        said = f"; {others[0]} is a pickle or of an unknown kind, and is not opened" if others else ""
        raise InputError(f"adapter folder {str(folder)!r} has no {WEIGHTS}{said}")
    if recorded in found:
        found = [recorded]
    if len(found) > 1:
        raise InputError(f"adapter folder {str(folder)!r} holds {' and '.join(found)}: remove all but one")
    return inside(folder, found[0])


def read_weights(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file by name, rounded ones read back as float32, each finite.

    sha256: of the whole file, where it is known. Raises InputError where the file is not what was written.
    """
    try:
        if sha256 is not None and sha256_of(path) != sha256:
            raise InputError(f"{path} is damaged: its SHA-256 is not the one in {PROVENANCE}")
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata and METADATA not in metadata and metadata.get("format") != "pt":
            raise InputError(f"{path}: the format of its tensors is {str(metadata.get('format'))[:80]!r}, not 'pt'")
        tensors = safetensors.torch.load_file(path)
        if odd := [name for name in tensors if not name.isprintable() or len(name) > _LONGEST_NAME]:
            raise InputError(f"{path}: {odd[0][:80]!r} is no name of a tensor")
        stored = from_metadata(metadata)
        values = {name: dequantize(from_tensors(name, tensors, kind, shape)) for name, (kind, shape) in stored.items()}
        parts = {key for name in stored for key in (name, name + SCALES)}
        values |= {name: tensor for name, tensor in tensors.items() if name not in parts}
        wrong = [name for name, tensor in values.items() if not tensor.is_floating_point()]
        if wrong:
            raise InputError(f"{path}: {wrong[0]} holds {values[wrong[0]].dtype}, no floating-point numbers")
        wrong = [name for name, tensor in values.items() if not bool(torch.isfinite(tensor.float()).all())]
        if wrong:
            raise InputError(f"{path}: {', '.join(wrong[:3])} holds values that are not finite")
        return values
    except InputError:
        raise
    except Exception as error:  # a damaged header comes as an error of any kind
        raise InputError(f"{path} cannot be read as safetensors: {reason(error)[:200]}") from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_bytes(tensors: Mapping[str, Tensor], dtype: str, factors: set[str]) -> tuple[str, bytes]:
    """(file name, content) of the weights in `dtype`.

    factors: the names that may be rounded to int8 or nf4; what is trained whole is then kept in bfloat16.
    """
    if dtype not in ROUNDED:
        wanted = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        plain = {name: tensor.to("cpu", wanted).contiguous() for name, tensor in tensors.items()}
        return WEIGHTS, safetensors.torch.save(plain, metadata={"format": "pt"})
    packed: dict[str, Packed] = {name: quantize(tensors[name].cpu(), dtype) for name in tensors if name in factors}
    stored = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    for name, item in packed.items():
        stored |= to_tensors(name, item)
    # one entry alone: safetensors writes several in an order that changes from file to file
    return ROUNDED[dtype], safetensors.torch.save(stored, metadata=to_metadata(packed))
