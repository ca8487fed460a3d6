"""Small matrices in 8 or 4 bits: how the factors of an adapter are stored, and what is read back.

    packed = quantize(weight, "nf4")        codes and scales
    dequantize(packed)                      float32, the same bits on every machine
    round_to(weight, "nf4")                 the same without codes: what training has to see

Blocks of 64 values along the flattened tensor share one scale, the largest magnitude among them, which is read back
exactly. "int8" divides [-scale, scale] into 254 equal steps; "nf4" has the 16 values of QLoRA (Dettmers et al. 2023,
arXiv:2305.14314, appendix E), two codes a byte, the first one in the high half. Rounding what was rounded changes no
bit. Plain torch on any device: a file written here needs no other library to be read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.errors import InputError, did_you_mean

KINDS = ("float32", "bfloat16", "int8", "nf4")
BLOCK = 64
METADATA = "lorafit.rounding"  # the entry in the metadata of a safetensors file
SCALES = ".scales"
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_INT8 = 127.0
_ZERO = NF4.index(0.0)
_PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CODES = {"int8": torch.int8, "nf4": torch.uint8, **_PLAIN}


@dataclass(frozen=True)
class Packed:
    """A tensor as it is stored.

    codes: int8 [count] for "int8", uint8 [ceil(count / 2)] for "nf4"; for the other kinds the values themselves.
    scales: float32, one for each block of 64 values; empty where values are stored as they are.
    """

    codes: Tensor
    scales: Tensor
    kind: str
    shape: tuple[int, ...]


def check_kind(kind: Any) -> str:
    """The kind, or InputError that names those there are."""
    if kind not in KINDS:
        hint = did_you_mean(str(kind)[:80], KINDS)
        raise InputError(f"a tensor is rounded to one of {', '.join(KINDS)}, not {repr(kind)[:80]}.{hint}")
    return str(kind)


def quantize(tensor: Tensor, kind: str) -> Packed:
    """Codes and scales of a tensor of any shape. Raises InputError where a value is not finite in float32."""
    check_kind(kind)
    values, shape = tensor.detach().float(), tuple(tensor.shape)
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"a tensor of shape {shape} holds values that are not finite: it cannot be stored as {kind}")
    if kind in _PLAIN:
        return Packed(values.to(_PLAIN[kind]).contiguous(), values.new_empty(0), kind, shape)
    blocks, scales = _blocks(values)
    places = _places(blocks, scales, kind).reshape(-1)[: values.numel()]
    codes = places.to(torch.int8) if kind == "int8" else _halves_to_bytes(places)
    return Packed(codes, scales.reshape(-1), kind, shape)


def dequantize(packed: Packed) -> Tensor:
    """The float32 tensor that was stored."""
    if packed.kind in _PLAIN:
        return packed.codes.float().reshape(packed.shape)
    count = math.prod(packed.shape)
    codes = packed.codes if packed.kind == "int8" else _bytes_to_halves(packed.codes)[:count]
    places = F.pad(codes, (0, -count % BLOCK), value=0 if packed.kind == "int8" else _ZERO).reshape(-1, BLOCK)
    if packed.kind == "int8":
        places = places.float()
    return _values(places, packed.scales[:, None], packed.kind).reshape(-1)[:count].reshape(packed.shape)


def round_to(tensor: Tensor, kind: str) -> Tensor:
    """What would be read back, in the shape and dtype of `tensor`; the bits are those of `dequantize(quantize())`.

    Nothing is refused, so that no device has to be waited for: a block with a value that is not finite becomes NaN.
    """
    check_kind(kind)
    if kind == "float32":
        return tensor
    tensor = tensor.detach()
    if kind == "bfloat16":
        return tensor.to(torch.bfloat16).to(tensor.dtype)
    blocks, scales = _blocks(tensor.float())
    values = _values(_places(blocks, scales, kind), scales, kind).reshape(-1)[: tensor.numel()]
    return values.reshape(tensor.shape).to(tensor.dtype)


class _StraightThrough(torch.autograd.Function):
    # a function of its own, since w + (round_to(w) - w) is not round_to(w) to the last bit
    @staticmethod
    def forward(ctx: Any, weight: Tensor, kind: str) -> Tensor:
        return round_to(weight, kind)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def straight_through(weight: Tensor, kind: str) -> Tensor:
    """`round_to(weight, kind)`, bit for bit, whose gradient is passed on to `weight` as if nothing had been rounded
    (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432)."""
    if check_kind(kind) == "float32":
        return weight
    return _StraightThrough.apply(weight, kind)


def bytes_of(kind: str, count: int) -> int:
    """How many bytes `count` values take, their scales included."""
    scales = 4 * math.ceil(count / BLOCK)
    return {
        "float32": 4 * count,
        "bfloat16": 2 * count,
        "int8": count + scales,
        "nf4": math.ceil(count / 2) + scales,
    }[check_kind(kind)]


# ---------------------------------------------------------------------------------------------------------- in a file


def to_tensors(name: str, packed: Packed) -> dict[str, Tensor]:
    """The tensors of a safetensors file that hold `packed`: `name`, and `name.scales` where there are scales."""
    tensors = {name: packed.codes}
    return tensors if packed.kind in _PLAIN else tensors | {name + SCALES: packed.scales}


def to_metadata(packed: Mapping[str, Packed]) -> dict[str, str]:
    """What the metadata of the file says of them, by name: their kinds and shapes."""
    entries = {name: {"kind": item.kind, "shape": list(item.shape)} for name, item in packed.items()}
    return {METADATA: json.dumps({"block": BLOCK, "tensors": entries}, sort_keys=True)}


def from_metadata(metadata: Mapping[str, str] | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (kind, shape)} of a file's metadata, empty where it holds plain tensors alone.

    Raises InputError for an entry that was not written by `to_metadata`.
    """
    if not metadata or METADATA not in metadata:
        return {}
    try:
        found = json.loads(metadata[METADATA])
    except (ValueError, RecursionError) as error:
        raise InputError(f"the file's metadata entry {METADATA} is no JSON: write the file anew") from error
    if not isinstance(found, dict) or found.get("block") != BLOCK or not isinstance(found.get("tensors"), dict):
        raise InputError(f"the file's metadata entry {METADATA} does not speak of blocks of {BLOCK}: write it anew")
    return {name: _entry(name, entry) for name, entry in found["tensors"].items()}


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...]]:
    if not isinstance(entry, dict) or entry.keys() != {"kind", "shape"} or not isinstance(entry["shape"], list):
        raise InputError(f"{name}: the file's metadata gives {repr(entry)[:80]}, not its kind and shape: write it anew")
    if not all(type(size) is int and size >= 0 for size in entry["shape"]):
        raise InputError(f"{name}: the file's metadata gives the shape {repr(entry['shape'])[:80]}: write it anew")
    return check_kind(entry["kind"]), tuple(entry["shape"])


def from_tensors(name: str, tensors: Mapping[str, Tensor], kind: str, shape: tuple[int, ...]) -> Packed:
    """The packed tensor that a file holds under `name`.

    kind, shape: as `from_metadata` gives them. Raises InputError for a tensor that is missing, has another dtype or
    another number of values than the shape needs, and for values that `quantize` does not write.
    """
    check_kind(kind)
    count = math.prod(shape)
    sizes = {name: -(-count // 2) if kind == "nf4" else count}
    dtypes = {name: _CODES[kind]}
    if kind not in _PLAIN:
        sizes[name + SCALES], dtypes[name + SCALES] = math.ceil(count / BLOCK), torch.float32
    for key, size in sizes.items():
        if key not in tensors:
            raise InputError(f"{key} is missing: {name} is stored as {kind}")
        found = tensors[key]
        if found.dtype != dtypes[key] or found.numel() != size:
            there, needed = (str(dtype).removeprefix("torch.") for dtype in (found.dtype, dtypes[key]))
            raise InputError(
                f"{key} holds {found.numel()} values of {there}; shape {shape} in {kind} takes {size} of {needed}"
            )
    if kind in _PLAIN:
        return Packed(tensors[name], torch.empty(0), kind, shape)
    codes, scales = tensors[name].reshape(-1), tensors[name + SCALES].reshape(-1)
    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise InputError(f"{name + SCALES} holds a scale that is no size: the file is damaged")
    if kind == "int8" and bool((codes == -128).any()):
        raise InputError(f"{name} holds the code -128, which is never written: the file is damaged")
    return Packed(codes, scales, kind, shape)


# ------------------------------------------------------------------------------------------------------------- blocks


def _blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """(values [blocks, 64], the last block filled up with zeros; the scale of each block [blocks, 1])."""
    flat = values.reshape(-1)
    if missing := -flat.numel() % BLOCK:
        flat = F.pad(flat, (0, missing))
    blocks = flat.view(-1, BLOCK)
    return blocks, blocks.abs().amax(dim=1, keepdim=True)


def _places(blocks: Tensor, scales: Tensor, kind: str) -> Tensor:
    """Where each value stands: a whole number in [-127, 127] as float32, or its place in NF4 as int64."""
    # divided, not multiplied by a reciprocal: that of a denormal scale is infinite
    shares = blocks / torch.where(scales == 0, 1.0, scales)
    if kind == "int8":
        return (shares * _INT8).round()
    book = blocks.new_tensor(NF4)
    return torch.bucketize(shares, (book[1:] + book[:-1]) / 2)


def _values(places: Tensor, scales: Tensor, kind: str) -> Tensor:
    if kind == "int8":
        # by a tensor: CUDA divides by a number as a product with its reciprocal, and then 127 / 127 may not be 1
        shares = places / torch.full_like(scales, _INT8)
    else:
        shares = scales.new_tensor(NF4)[places.long()]
    return shares * scales + 0.0  # no negative zero, which the codes do not know


def _halves_to_bytes(places: Tensor) -> Tensor:
    pairs = F.pad(places, (0, places.numel() % 2), value=_ZERO).to(torch.uint8).view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def _bytes_to_halves(codes: Tensor) -> Tensor:
    return torch.stack((codes >> 4, codes & 15), dim=1).reshape(-1)
