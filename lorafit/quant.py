"""What a quantized linear layer is: its types, its weight dense again, how it is made, and the guards around it.

    quantize_model(model, Quantization("nf4"), torch.device("cpu"), report)
    dequantize(model.model.layers[0].mlp.up_proj)

Quantization is a property of the base and of nothing else: QLoRA (Dettmers et al. 2023, arXiv:2305.14314)
is LoRA over a base whose weights happen to be stored in 4 bits and are dequantized for each product.
This is the only file that knows bitsandbytes. It also stands guard against two faults of bitsandbytes 0.50
on CPUs with AVX-512, both silent:

- `Linear4bit` repacks its weight in place at the first evaluation-mode forward; gradients and
  dequantized weights are garbage from then on. `disarm_repacking` takes that path away.
- for some input widths the packed weight is read back wrongly. Every weight quantized here is read back and
  held against the definition (`reads_back_right`); a layer that fails stays in 16 bits, and the
  report says so. The guard looks at behaviour, so it costs nothing where the fault is absent.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from lorafit.errors import InputError, did_you_mean
from lorafit.fourbit import quantize_blocks

# On an AVX512-BF16 CPU every import of bitsandbytes reports a download that it would like to make.
# And its 8-bit layer says at every call that it casts its input to float16.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)
import bitsandbytes as bnb  # noqa: E402

FOUR_BIT = ("nf4", "fp4")
TYPES = (*FOUR_BIT, "int8")
BLOCK_SIZES = (32, 64, 128, 256, 512)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339, section 3.2): input columns above 6.0 are multiplied in 16 bits.
INT8_OUTLIER_THRESHOLD = 6.0
_AT_ONCE = 2**17  # weights that are computed together
_FEW = 2**14  # values that torch does not divide among threads


def to_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from its name; None and "auto" give None."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.{did_you_mean(dtype, DTYPES)}")
    return DTYPES[dtype]


@dataclass(frozen=True)
class Quantization:
    """How base weights are stored. `block_size` weights share one scale; `double_quant` stores the scales in 8 bits.

    The defaults are the QLoRA paper's (section 3): NF4, blocks of 64, double quantization, bfloat16 products.
    For "int8" each output row has a scale of its own: no block size, no double quantization.
    """

    type: str = "nf4"
    double_quant: bool = True
    block_size: int | None = 64
    compute_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise InputError(
                f"quant.type must be one of {', '.join(TYPES)}, got {self.type!r}.{did_you_mean(self.type, TYPES)}"
            )
        if self.type in FOUR_BIT and self.block_size not in BLOCK_SIZES:
            raise InputError(f"quant.block_size must be one of {BLOCK_SIZES}, got {self.block_size!r}")

    @classmethod
    def of(cls, spec: Quantization | Mapping[str, Any] | str | None) -> Quantization | None:
        """From a type name, a mapping of the fields, or None ("none") for a base in 16 bits."""
        if spec is None or spec == "none":
            return None
        if isinstance(spec, Quantization):
            return spec
        fields: dict[str, Any] = {"type": spec} if isinstance(spec, str) else dict(spec)
        if fields.get("type") == "int8":
            fields = fields | {"double_quant": False, "block_size": None}
        if "compute_dtype" in fields:
            fields["compute_dtype"] = to_dtype(fields["compute_dtype"]) or torch.bfloat16
        return cls(**fields)

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain values, for metrics and adapter provenance."""
        return {
            "type": self.type,
            "double_quant": self.double_quant,
            "block_size": self.block_size,
            "compute_dtype": str(self.compute_dtype).removeprefix("torch."),
        }


@dataclass
class BaseReport:
    """What loading did: which linear layers were quantized, and which stayed in 16 bits and why. fingerprint: of the
    parameters before they were quantized (see fingerprint.py); None where those cannot be told: on the meta device, for
    a model that came quantized, and for one of more than float16 that was loaded as float16. whole: why the 16-bit
    model was whole in memory, or None. copy: the folder that the quantized layers were read from, or None."""

    name: str
    quant: Quantization | None
    fingerprint: str | None = None
    quantized: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    whole: str | None = None
    copy: str | None = None


def base_report(model: nn.Module) -> BaseReport | None:
    """The report of `load_base_model`, or None for a model that came another way."""
    return getattr(model, "lorafit_base", None)


# ------------------------------------------------------------------------------------------------ linear layers


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes x Wᵀ + b: nn.Linear, its bitsandbytes kin, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def is_quantized(module: nn.Module) -> bool:
    """Whether the linear layer's weight is stored in 8 or 4 bits."""
    return isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)


def stores_int8(module: nn.Module) -> bool:
    """Whether the linear layer multiplies in 8 bits: then its output is not x Wᵀ with the dense weight."""
    return isinstance(module, bnb.nn.Linear8bitLt)


def features(linear: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer, logical whatever the storage."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]


def compute_dtype(linear: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype in which the layer multiplies the input x."""
    if isinstance(linear, bnb.nn.Linear4bit):
        return linear.compute_dtype or x.dtype
    if isinstance(linear, bnb.nn.Linear8bitLt):
        return x.dtype  # bitsandbytes gives back what came in
    return linear.weight.dtype  # type: ignore[return-value]


def logical_shape(parameter: Tensor) -> torch.Size:
    """The shape of the weights a parameter stands for; a packed 4-bit tensor holds two of them in a byte."""
    quant_state = getattr(parameter, "quant_state", None)
    return quant_state.shape if quant_state is not None else parameter.shape


def _quant_state(linear: Any) -> Any:
    return linear.weight.quant_state


def quant_state_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The tensors that go with the quantized weights of a model: scales, code books, nested scales."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            quant_state: Any = _quant_state(module)
            while quant_state is not None:
                yield from (quant_state.absmax, quant_state.code)
                if isinstance(quant_state.offset, Tensor):
                    yield quant_state.offset
                quant_state = quant_state.state2
        elif isinstance(module, bnb.nn.Linear8bitLt):
            yield _int8_scales(module)


def _int8_scales(linear: Any) -> Tensor:
    # the first forward moves the scales from the parameter to the layer's state
    return linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB


def dequantize(linear: Any) -> Tensor:
    """The weight of a linear layer as a dense [out_features, in_features] tensor, whatever its storage."""
    if isinstance(linear, Conv1D):
        return linear.weight.detach().T
    if isinstance(linear, bnb.nn.Linear4bit):
        _undo_repacking(linear)
        return bnb.functional.dequantize_4bit(linear.weight.data, _quant_state(linear))
    if isinstance(linear, bnb.nn.Linear8bitLt):
        return linear.weight.data * (_int8_scales(linear).unsqueeze(1) / 127.0)
    return linear.weight.detach()


def plain_dtype(linear: Any) -> torch.dtype:
    """The dtype of a linear layer's weight, of a quantized one before it was quantized."""
    if not is_quantized(linear):
        return linear.weight.dtype
    # a layer that came quantized says at most in which dtype it multiplies
    return getattr(linear, "source_dtype", None) or getattr(linear, "compute_dtype", None) or torch.bfloat16


def plain_layer(linear: Any, weight: Tensor) -> nn.Module:
    """A new 16- or 32-bit layer of the kind `linear` was before quantization, holding weight [out, in]."""
    bias = getattr(linear, "bias", None)
    kind = getattr(linear, "source_cls", nn.Linear) if is_quantized(linear) else type(linear)
    if kind is Conv1D:
        in_features, out_features = features(linear)
        layer: nn.Module = Conv1D(out_features, in_features)
        weight = weight.T
    elif is_quantized(linear):
        layer = nn.Linear(*features(linear), bias=bias is not None, device="meta")
    else:  # a copy keeps the class and attributes of a subclass of nn.Linear
        layer = copy.copy(linear)
        layer._parameters = dict(linear._parameters)
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True), requires_grad=False)
    return layer.train(linear.training)


# ------------------------------------------------------------------------------------------------ one dense weight


class _Shared:
    """The memory into which weights are dequantized, one after another: a flat tensor per device, dtype and reader.

    A reader is a thread on the CPU and a stream on the GPU: what two of them do may overlap, what one does may not.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[Any, ...], Tensor] = {}

    def get(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of that kind whose content is arbitrary, in the memory of the one before."""
        reader = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else threading.get_ident()
        key, count = (device, dtype, reader), shape.numel()
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < count:
            self.buffers.pop(key, None)
            del buffer  # before its successor is there, not after
            with torch.inference_mode(False):  # its own kind of tensor could not be used in training
                buffer = self.buffers[key] = torch.empty(count, dtype=dtype, device=device)
        return buffer[:count].view(shape)


_shared = _Shared()


def dequantize_shared(linear: Any, dtype: torch.dtype | None = None) -> Tensor:
    """`dequantize(linear)` as dtype, bit for bit, in memory that all layers share: valid until the next call.

    dtype: None is that of `dequantize`. A layer that is not quantized returns its own weight, uncopied where it has
    that dtype. A fresh tensor for each product costs more than what is written into it: its pages are mapped one by
    one. The result must not be saved by autograd; where it is and was overwritten since, backward raises.
    """
    if isinstance(linear, bnb.nn.Linear4bit):
        weight = _unpack_shared(linear)
    elif isinstance(linear, bnb.nn.Linear8bitLt):
        return _scale_shared(linear, dtype or torch.float32)
    else:
        weight = dequantize(linear)
    if dtype is None or weight.dtype == dtype:
        return weight
    return _shared.get(weight.shape, dtype, weight.device).copy_(weight)


def release_shared() -> None:
    """Give back the memory of `dequantize_shared`. What it returned before stays valid, and is no longer reused."""
    _shared.buffers.clear()


def _unpack_shared(linear: Any) -> Tensor:
    _undo_repacking(linear)
    packed, quant_state = linear.weight.data, _quant_state(linear)
    shape, device = quant_state.shape, packed.device
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[0] == 1 or not packed.is_contiguous():
        return dequantize(linear)  # one row of packed bytes is bitsandbytes' old way of saying "transposed"
    if device.type == "cuda":
        out = _shared.get(shape, quant_state.dtype, device)
        return bnb.functional.dequantize_4bit(packed, quant_state, out=out)
    read = _unpack_function(quant_state.quant_type, quant_state.dtype) if device.type == "cpu" else None
    # what bitsandbytes itself does not leave to this function
    if read is None or len(shape) != 2 or shape[-1] % 2 or quant_state.blocksize >= 2048:
        return dequantize(linear)
    out = _shared.get(shape, quant_state.dtype, device)
    read(packed, _scales(quant_state), out, quant_state.blocksize)
    torch.autograd.graph.increment_version(out)  # autograd has not seen this write
    return out


def _scales(quant_state: Any) -> Tensor:
    """The scale of each block, as float32."""
    scales = quant_state.absmax
    if quant_state.nested:
        scales = bnb.functional.dequantize_blockwise(scales, quant_state.state2)
        scales += quant_state.offset
    return scales.float().contiguous()


@functools.cache
def _unpack_function(kind: str, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor, int], None] | None:
    """The C function behind bitsandbytes' `dequantize_4bit` on the CPU, which takes no `out`; None where the library
    has none, or one that does something else."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    try:
        function = getattr(bnb.cextension.lib, f"cdequantize_blockwise_cpu_{kind}_{names[dtype]}")

        def read(packed: Tensor, scales: Tensor, out: Tensor, block: int) -> None:
            places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (packed, scales, out)]
            function(*places, *(ctypes.c_longlong(number) for number in (block, *out.shape)))

        weight = torch.linspace(-1, 1, 64 * 64).view(64, 64).to(dtype)
        packed, quant_state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
        out = torch.empty_like(weight)
        read(packed, quant_state.absmax, out, 64)
        return read if torch.equal(out, bnb.functional.dequantize_4bit(packed, quant_state)) else None
    except (AttributeError, KeyError, RuntimeError):
        return None


def _scale_shared(linear: Any, dtype: torch.dtype) -> Tensor:
    """An int8 weight times the scales of its rows: rounded to float32, then to dtype, as `dequantize` and `to` do."""
    codes, scales = linear.weight.data, _int8_scales(linear).unsqueeze(1) / 127.0
    out = _shared.get(codes.shape, dtype, codes.device)
    if codes.device.type != "cpu":
        return torch.mul(codes, scales, out=out)
    rows = max(1, _AT_ONCE // max(1, codes.shape[1]))  # the product in float32 stays in the processor's cache
    for start in range(0, codes.shape[0], rows):
        out[start : start + rows] = codes[start : start + rows] * scales[start : start + rows]
    return out


# ------------------------------------------------------------------------------------------------ the two guards


def disarm_repacking(model: nn.Module) -> None:
    """Keep every Linear4bit from repacking its weight in evaluation, and undo it where it has happened.

    What was repacked comes back with its scales rounded to bfloat16: closer than 2^-8, not bit for bit.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            _undo_repacking(module)


def _undo_repacking(linear: Any) -> None:
    quant_state = linear.weight.quant_state
    if getattr(quant_state, "packing_format_for_cpu", False):
        inverse = bnb.functional._convert_weight_packed_for_cpu_inverse
        linear.weight.data, quant_state = inverse(linear.weight.data, quant_state)
        if not quant_state.nested:  # these the inverse leaves as the repacking made them: transposed, in bfloat16
            quant_state.absmax = quant_state.absmax.T.reshape(-1).float()
        linear.weight.quant_state = linear.quant_state = quant_state


def reads_back_right(linear: Any, rows: int = 8) -> bool:
    """Whether bitsandbytes reads a Linear4bit's packed weight as its definition says, on its first and last rows.

    The definition (QLoRA, section 2): two 4-bit codes a byte, high half first, in row-major order; a weight is
    its code's value times the scale of its block, and with double quantization the scales are stored so too.
    """
    quant_state = linear.weight.quant_state
    in_features, out_features = features(linear)
    codes, read = linear.weight.data.view(torch.uint8).flatten(), dequantize_shared(linear).flatten()
    values = quant_state.code.cpu().numpy()
    # numpy, and a few rows at a time: threads that are woken for so little cost more than they do
    step = max(1, _FEW // in_features)
    for first in {0, max(0, out_features - rows)}:
        for row in range(first, min(first + rows, out_features), step):
            # whole bytes only: an odd row length may begin in the middle of one
            start, stop = row * in_features // 2 * 2, min(row + step, out_features) * in_features // 2 * 2
            packed = codes[start // 2 : stop // 2].cpu().numpy()
            weights = values[np.stack((packed >> 4, packed & 15), axis=1).reshape(-1)]
            block = np.arange(start, stop) // quant_state.blocksize
            scales = _defined_scales(quant_state, start // quant_state.blocksize, (stop - 1) // quant_state.blocksize)
            weights = torch.from_numpy(weights * scales[block - block[:1]])
            expected = weights.to(quant_state.dtype).float().numpy()
            if not np.allclose(read[start:stop].float().cpu().numpy(), expected, rtol=2e-2, atol=1e-6):
                return False
    return True


def _defined_scales(quant_state: Any, first: int, last: int) -> np.ndarray:
    """The scales of some blocks, by the definition."""
    scales: np.ndarray = quant_state.absmax[first : last + 1].cpu().numpy()
    if quant_state.nested:
        nested = quant_state.state2
        blocks = np.arange(first, last + 1) // nested.blocksize
        scales = nested.code.cpu().numpy()[scales] * nested.absmax.cpu().numpy()[blocks]
        scales = scales + np.float32(quant_state.offset.item())
    return scales


# ------------------------------------------------------------------------------------------------ quantizing


def head_names(model: nn.Module) -> set[str]:
    """Names of the output head: what turns hidden states into token scores. It is neither quantized nor adapted."""
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    names = {name for name, module in model.named_modules(remove_duplicate=False) if module is head}
    # classification heads are trained from scratch, and sit at the top under these names
    return names | {name for name in ("classifier", "score", "qa_outputs") if hasattr(model, name)}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by name, in order: all of its names where one layer is used under several.

    The output projection of nn.MultiheadAttention is left out: its weight is used without calling the layer,
    so that a wrapper around it would do nothing.
    """
    named = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    attention = tuple(f"{name}." for name, module in named if isinstance(module, nn.MultiheadAttention))
    return {name: module for name, module in named if is_linear(module) and not name.startswith(attention or ("\0",))}


def quantize_model(
    model: nn.Module,
    quant: Quantization,
    device: torch.device,
    report: BaseReport,
    layer_of: Callable[[str, nn.Module], nn.Module | str] | None = None,
) -> None:
    """Replace the model's linear layers, head excepted, by quantized ones on `device`; note what and why in report.

    layer_of: gives the quantized twin of a layer, or says why there is none; `quantized_layer` where it is None.
    """
    head = head_names(model)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    done: dict[int, nn.Module | str] = {}
    layers = linear_layers(model)
    for name in list(layers):
        linear = layers.pop(name)  # nothing here keeps it alive once it is replaced
        if name in head:
            report.left[name] = "output head"
        elif id(linear.weight) in embeddings:
            report.left[name] = "shares its weight with an embedding"
        elif is_quantized(linear):
            report.quantized.append(name)
        else:
            if id(linear) not in done:
                make = layer_of or (lambda _, linear: quantized_layer(linear, quant, device))
                done[id(linear)] = make(name, linear)
            layer = done[id(linear)]
            if isinstance(layer, str):
                report.left[name] = layer
            else:
                model.set_submodule(name, layer)
                report.quantized.append(name)
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.dim() == 3 and not isinstance(owner, nn.Conv1d):
            report.left[name] = "a stack of expert weights, no linear layer"


def filled(linear: nn.Module, read: Callable[[str], Tensor]) -> nn.Module:
    """A copy of a layer with the parameters that `read` gives for their names in it."""
    layer = copy.copy(linear)
    layer._parameters = {
        leaf: None if parameter is None else nn.Parameter(read(leaf), requires_grad=False)
        for leaf, parameter in linear._parameters.items()
    }
    return layer


def quantized_layer(linear: nn.Module, quant: Quantization, device: torch.device) -> nn.Module | str:
    """The quantized twin of a linear layer on `device`, or why there can be none."""
    if not multiplies_only(linear):
        return f"{type(linear).__name__} computes more than x Wᵀ + b"
    layer = _quantize_linear(linear, quant, device)
    return layer if layer is not None else f"{features(linear)} in/out: bitsandbytes would read it back wrongly here"


def multiplies_only(linear: Any) -> bool:
    """Whether a linear layer computes x Wᵀ + b and nothing else, so that a quantized layer can stand in for it.

    A subclass may have a forward of its own. Falcon's multiplies as well; others do more, and are tried out.
    """
    if type(linear).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    in_features, _ = features(linear)
    x = torch.linspace(-1, 1, 2 * in_features, device=linear.weight.device, dtype=linear.weight.dtype)
    x = x.reshape(2, in_features)
    with torch.no_grad():
        result = linear(x)
        expected = nn.functional.linear(x, linear.weight, linear.bias)
    # routers of experts give several tensors
    return isinstance(result, Tensor) and torch.allclose(result, expected, rtol=1e-2, atol=1e-3)


def quantize_4bit(weight: Tensor, quant: Quantization, device: torch.device) -> tuple[Tensor, Any]:
    """(packed [⌈n/2⌉, 1], quant_state) of n weights on `device`, as bitsandbytes' `quantize_4bit` gives it, to the bit.

    On the CPU that one is so slow that it is most of the time of loading; `fourbit.quantize_blocks` does the same.
    """
    weight, kind, block = weight.contiguous().to(device), quant.type, quant.block_size or 64
    if device.type == "cpu" and _blocks_agree(kind):
        code = bnb.functional.get_4bit_type(kind, device=device)
        packed, scales = quantize_blocks(weight, block, code)
        if np.isfinite(scales.numpy()).all():
            state: dict[str, Any] = {"shape": weight.shape, "dtype": weight.dtype, "blocksize": block}
            state |= {"code": code, "quant_type": kind}
            if quant.double_quant:
                offset = scales.mean()
                scales, nested = bnb.functional.quantize_blockwise(scales - offset, blocksize=256)
                state |= {"offset": offset, "state2": nested}
            return packed.unsqueeze(1), bnb.functional.QuantState(absmax=scales, **state)
    return bnb.functional.quantize_4bit(
        weight, blocksize=block, compress_statistics=quant.double_quant, quant_type=kind
    )


@functools.cache
def _blocks_agree(kind: str) -> bool:
    """Whether this bitsandbytes quantizes as `quantize_blocks` does, where that is decided: at the midpoints."""
    code = bnb.functional.get_4bit_type(kind, device="cpu")
    values = code.sort().values
    midpoints = (values[:-1] + values[1:]) / 2
    beside = [midpoints.nextafter(torch.tensor(side)) for side in (-1.0, 1.0)]
    weight = torch.cat((values, midpoints, *beside, torch.zeros(4), torch.linspace(-0.3, 0.1, 65)))
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    found, scales = quantize_blocks(weight, 64, code)
    return torch.equal(found, packed.flatten()) and torch.equal(scales, state.absmax)


def _quantize_linear(linear: Any, quant: Quantization, device: torch.device) -> nn.Module | None:
    """The quantized twin of a linear layer, or None when bitsandbytes cannot hold it rightly on this machine."""
    weight = (linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data).contiguous()
    layer = _shell(linear, quant)
    if quant.type == "int8":
        packed: Any = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        layer.weight = packed.to(device)
    else:
        _hold_4bit(layer, *quantize_4bit(weight, quant, device))
        if not reads_back_right(layer):
            return None
    return _finish(layer, linear, weight.dtype, device)


def _shell(linear: Any, quant: Quantization) -> Any:
    """A quantized layer of the shape of `linear` that holds nothing yet."""
    options: dict[str, Any] = {"bias": getattr(linear, "bias", None) is not None, "device": "meta"}
    if quant.type == "int8":
        options |= {"has_fp16_weights": False, "threshold": INT8_OUTLIER_THRESHOLD}
        return bnb.nn.Linear8bitLt(*features(linear), **options)
    options |= {"compute_dtype": quant.compute_dtype, "compress_statistics": quant.double_quant}
    layer = bnb.nn.Linear4bit(*features(linear), quant_type=quant.type, **options)
    disarm_repacking(layer)
    return layer


def _hold_4bit(layer: Any, packed: Tensor, quant_state: Any) -> None:
    layer.weight = bnb.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=quant_state,
        blocksize=quant_state.blocksize,
        compress_statistics=quant_state.nested,
        quant_type=quant_state.quant_type,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = quant_state


def _finish(layer: Any, linear: Any, source_dtype: torch.dtype, device: torch.device) -> nn.Module:
    bias = getattr(linear, "bias", None)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(device), requires_grad=False)
    layer.source_cls = Conv1D if isinstance(linear, Conv1D) else nn.Linear
    layer.source_dtype = source_dtype
    return layer.train(linear.training)


def packed_tensors(layer: Any) -> dict[str, Tensor]:
    """What a quantized layer holds in place of its weight, as named tensors that go into a file."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return {"weight": layer.weight.data, "SCB": _int8_scales(layer)}
    return {"weight": layer.weight.data, **_quant_state(layer).as_dict(packed=True)}


def layer_of_packed(linear: Any, quant: Quantization, tensors: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """The quantized twin of `linear` on `device` that `packed_tensors` gave; only the shape of `linear` is looked at.

    Raises ValueError where the tensors are not those of such a layer.
    """
    layer, dtype = _shell(linear, quant), linear.weight.dtype
    (in_features, out_features), packed = features(linear), tensors["weight"]
    if quant.type == "int8":
        scales = tensors["SCB"]
        kinds = packed.dtype, packed.shape, scales.dtype, scales.shape
        if kinds != (torch.int8, (out_features, in_features), torch.float32, (out_features,)):
            raise ValueError(
                f"{kinds} are not the int8 weight and the scales of a layer {in_features} to {out_features}"
            )
        packed, scales = packed.to(device), scales.to(device)
        layer.weight = bnb.nn.Int8Params(packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=scales)
    else:
        rest = {name: tensor for name, tensor in tensors.items() if name != "weight"}
        state: Any = bnb.functional.QuantState.from_dict(rest, device=device)
        count = in_features * out_features
        blocks = -(-count // state.blocksize)
        found = (state.quant_type, state.nested, state.blocksize, state.dtype, tuple(state.shape))
        sizes = (packed.dtype, tuple(packed.shape), state.absmax.numel(), state.code.numel())
        wanted = (quant.type, quant.double_quant, quant.block_size, dtype, (out_features, in_features))
        if found != wanted or sizes != (torch.uint8, ((count + 1) // 2, 1), blocks, 16):
            raise ValueError(f"{found} with {sizes} is not a layer {in_features} to {out_features} by {quant}")
        if state.nested and state.state2.absmax.numel() != -(-blocks // state.state2.blocksize):
            raise ValueError(f"{state.state2.absmax.numel()} are not the nested scales of {blocks} blocks")
        _hold_4bit(layer, packed.to(device), state)
    return _finish(layer, linear, dtype, device)


def note_quantized(model: nn.Module, report: BaseReport) -> None:
    """Report the linear layers that a checkpoint brought quantized, and tell each which dtype the model works in."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for name, linear in linear_layers(model).items():
        if not is_quantized(linear):
            report.left[name] = "not quantized in the checkpoint"
            continue
        report.quantized.append(name)
        linear.source_dtype = dtype  # type: ignore[assignment]
        if isinstance(linear, bnb.nn.Linear4bit):
            state = _quant_state(linear)
            report.quant = Quantization(state.quant_type, state.nested, state.blocksize, linear.compute_dtype or dtype)
        else:
            report.quant = Quantization.of("int8")


# ------------------------------------------------------------------------------------------------ merging


def requantize(linear: nn.Module, weight: Tensor, quant: Quantization) -> nn.Module:
    """A quantized layer like `linear`, by the recipe `quant`, holding weight [out, in] instead of its own."""
    plain = plain_layer(linear, weight.to(plain_dtype(linear)))
    layer = _quantize_linear(plain, quant, linear.weight.device)  # type: ignore[arg-type]
    assert layer is not None, "bitsandbytes holds this shape already"
    return layer


def transformers_quantization(quant: Quantization, skip: list[str]) -> dict[str, Any]:
    """The quantization_config of config.json under which transformers reads weights packed by `quant`; skip: the
    linear layers that are not packed."""
    options: dict[str, Any] = {"llm_int8_skip_modules": skip}
    if quant.type == "int8":
        options |= {"load_in_8bit": True, "llm_int8_threshold": INT8_OUTLIER_THRESHOLD}
    else:
        options |= {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quant.type,
            "bnb_4bit_use_double_quant": quant.double_quant,
            "bnb_4bit_compute_dtype": quant.compute_dtype,
        }
    return BitsAndBytesConfig(**options).to_dict()
