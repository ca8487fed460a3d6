"""The files of a merged model: named as transformers does, and none larger than was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from lorafit.errors import InputError
from lorafit.weights import INDEX, Planned, write_file

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """Bytes of "5GB" or "500MB". Raises InputError for what is no size."""
    found = re.fullmatch(r"(\d+)\s*(B|KB|MB|GB)", text)
    if not found or not int(found[1]):
        raise InputError(f"a size is a number with B, KB, MB or GB, such as 5GB, got {text!r}")
    return int(found[1]) * UNITS[found[2]]


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
