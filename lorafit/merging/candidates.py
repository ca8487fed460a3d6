"""The ways in which an adapter can be merged, each as a plan of tensors that are made one at a time.

    original      round(W + ΔW) into the checkpoint's own 16-bit weights, which is what a plain model folder holds
    dequantized   every quantized layer as the live model computes it, that is dequantized, and ΔW where there is one
    requantized   the same sum quantized again by the same recipe

An adapter is trained to make up for what quantization did to its base, and merged into the original weights it
makes up for what is no longer there; merged into the dequantized ones it is rounded once; quantized again, the whole
sum is. Which of them costs least is measured (measure.py), on the very tensors that are written.
Merged weights are computed in float32 or wider and rounded once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.errors import InputError
from lorafit.inject import adapter_modules, trained_biases
from lorafit.lora import LoRAEmbedding, LoRALinear, TrainedCopy
from lorafit.merging.base import Base, stored, there
from lorafit.merging.skeleton import lend_weights, place_of
from lorafit.quant import (
    Quantization,
    base_report,
    dequantize,
    features,
    is_linear,
    is_quantized,
    plain_dtype,
    requantize,
    transformers_quantization,
)
from lorafit.weights import Planned

ORIGINAL, DEQUANTIZED, REQUANTIZED = CANDIDATES = ("original", "dequantized", "requantized")
_AT_ONCE = 2**24  # values of an update that are computed together: 64 MiB in float32


@dataclass
class Candidate:
    """A merged model that is not there yet. tensors: all that its folder will hold. before: for each tensor that the
    merge changes, the one it was merged into. untied: embedding and head are no longer one weight, so that `added` came
    to the checkpoint's tensors. packed: layers that are quantized already, by name."""

    name: str
    config: Any
    tensors: dict[str, Planned]
    before: dict[str, Planned]
    untied: bool
    added: list[str]
    packed: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(planned.nbytes for planned in self.tensors.values())


def candidates(base: Base, only: str = "auto") -> Iterator[Candidate]:
    """The candidates that there are for the adapted model `base.model`, one after another; or the one called `only`.

    Raises InputError when `only` names one that there is not.
    """
    quantized = any(is_quantized(module) for module in base.model.modules())
    there = [ORIGINAL] if base.originals is not None else []
    there += [DEQUANTIZED, REQUANTIZED] if quantized else []
    if only not in ("auto", *there):
        why = "comes quantized" if base.originals is None else "is not quantized"
        raise InputError(f"merge.candidate={only}: the base {why}, so there is only {' or '.join(there)}")
    for name in there if only == "auto" else [only]:
        yield make_candidate(base, name)


def make_candidate(base: Base, name: str) -> Candidate:
    """One of CANDIDATES for the adapted model `base.model`. Nothing is computed but what is packed."""
    plan = _Plan(base, name)
    config = copy.deepcopy(base.config)
    floating = [planned.dtype for planned in plan.tensors.values() if planned.dtype.is_floating_point]
    config.dtype = next((dtype for dtype in floating if dtype == base.config.dtype), floating[0])
    if plan.untied:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    packed: dict[str, nn.Module] = {}
    if name == REQUANTIZED:
        report = base_report(base.model)
        assert report is not None and report.quant is not None
        packed = plan.pack(report.quant)
        config.quantization_config = transformers_quantization(report.quant, plan.not_packed(packed))
    return Candidate(name, config, plan.tensors, plan.before, plan.untied, plan.added, packed)


def merged_model(base: Base, candidate: Candidate) -> Any:
    """The candidate as a model that computes with the tensors it plans, each there while it is used."""
    config = copy.deepcopy(candidate.config)
    if candidate.packed:
        del config.quantization_config
    model = base.skeleton(config, config.dtype)
    for name, layer in candidate.packed.items():
        model.set_submodule(name, layer)
    lend_weights(model, candidate.tensors)
    return model.to(next(base.model.parameters()).device).eval()


class _Plan:
    """The tensors of a candidate, in the order of the checkpoint."""

    def __init__(self, base: Base, name: str) -> None:
        self.base, self.name = base, name
        self.adapted = adapter_modules(base.model)
        self.biases = trained_biases(base.model)
        self.untied = False
        names, self.added = self._names()
        self.before: dict[str, Planned] = {}
        self.tensors = {name: self._tensor(name) for name in (*names, *self.added)}

    def _names(self) -> tuple[list[str], list[str]]:
        """(what the checkpoint holds, what comes to it where head and embedding are no longer one)."""
        if self.base.originals is not None:
            names = list(self.base.originals)
        else:
            bare = self.base.skeleton(self.base.config, None)
            names = [name for name in bare.state_dict() if name not in self.base.tied]
        added: list[str] = []
        for name, root in self.base.tied.items():
            if name.rpartition(".")[0] in self.adapted or root.rpartition(".")[0] in self.adapted:
                self.untied = True
                added += [each for each in (root, name) if each not in (*names, *added)]
        return names, added

    def _owner(self, name: str) -> tuple[Any, str, Any, str]:
        """(the module that a tensor belongs to in the base, its name, what adapts it, the tensor's name in there)."""
        parts = name.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            owner, leaf = ".".join(parts[:cut]), ".".join(parts[cut:])
            if owner in self.adapted:
                return self.adapted[owner].base_layer, owner, self.adapted[owner], leaf
        owner, leaf = ".".join(parts[:-1]), parts[-1]
        return self.base.model.get_submodule(owner), owner, None, leaf

    def _tensor(self, name: str) -> Planned:
        module, _, adapted, leaf = self._owner(name)
        before = self._before(name, module, leaf)
        if isinstance(adapted, TrainedCopy):
            trained = adapted.trained.state_dict()[leaf]
            planned = Planned(before.dtype, tuple(trained.shape), lambda: trained.to(before.dtype))
        elif adapted is not None and leaf == "weight":
            exact = self._exact(name, module)
            planned = Planned(before.dtype, before.shape, lambda: add_update(exact(), adapted, before.dtype))
        elif name in self.biases:
            bias = self.biases[name][0]
            planned = Planned(before.dtype, before.shape, lambda: bias.detach().to(before.dtype))
        else:
            return before
        self.before[name] = before
        return planned

    def _before(self, name: str, module: Any, leaf: str) -> Planned:
        """The tensor that is merged into, rounded as it would be written."""
        if self.name == ORIGINAL:
            return self._original(name)
        if is_quantized(module) and leaf == "weight":
            dtype, exact = plain_dtype(module), self._exact(name, module)
            nothing = torch.empty(features(module)[::-1], device="meta")
            shape = tuple(stored(module, nothing).shape)
            return Planned(dtype, shape, lambda: exact().to(dtype))
        if name in self.biases:
            return there(self.biases[name][1])
        inner, _, leaf = leaf.rpartition(".")
        module = module.get_submodule(inner)
        if leaf == "weight" and getattr(module, "lent_weight", None) is not None:
            return module.lent_weight
        return there(module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf])

    def _exact(self, name: str, module: Any) -> Any:
        """How the base's weight is had before anything is rounded, in the orientation in which it is stored."""
        if self.name != ORIGINAL and is_quantized(module):
            return lambda: stored(module, dequantize(module))
        return self._before(name, module, "weight").make

    def _original(self, name: str) -> Planned:
        assert self.base.originals is not None
        place = place_of(self.base.originals, name, self.base.tied)
        assert place is not None, f"{name} is not among the original weights"
        return self.base.originals[place]

    # ------------------------------------------------------------------------------------------------ requantized

    def pack(self, quant: Quantization) -> dict[str, nn.Module]:
        """Quantize again what was quantized, and put the packed tensors in the place of the others."""
        packed: dict[str, nn.Module] = {}
        done: dict[int, nn.Module] = {}
        for name in list(self.tensors):
            module, owner, adapted, leaf = self._owner(name)
            if leaf != "weight" or not is_quantized(module) or isinstance(adapted, TrainedCopy):
                continue
            if adapted is None:
                packed[owner] = module
            else:
                if id(module) not in done:
                    weight = self.tensors[name].make()
                    done[id(module)] = requantize(module, stored(module, weight), quant)
                packed[owner] = done[id(module)]
        tensors = {}
        for name, planned in self.tensors.items():
            owner, _, leaf = name.rpartition(".")
            if owner not in packed:
                tensors[name] = planned
            elif leaf == "weight":
                tensors |= {f"{owner}.{key}": there(tensor) for key, tensor in packed[owner].state_dict().items()}
        self.tensors = tensors
        return packed

    def not_packed(self, packed: dict[str, nn.Module]) -> list[str]:
        """The linear layers that stay in 16 bits."""
        bare = self.base.skeleton(self.base.config, None)
        return [name for name, module in bare.named_modules() if is_linear(module) and name not in packed]


def add_update(weight: Tensor, adapted: LoRALinear | LoRAEmbedding, dtype: torch.dtype) -> Tensor:
    """weight + ΔW, rounded to `dtype`; weight: [out, in] of a linear layer (as it stores it), or [rows, dim]."""
    linear = isinstance(adapted, LoRALinear)
    transposed = linear and stored(adapted.base_layer, torch.empty(1, 2)).shape[0] == 2
    weight = weight.T if transposed else weight
    if weight.numel() <= _AT_ONCE:
        merged = (weight + adapted.delta_weight()).to(dtype)
    else:
        merged = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        rows = max(1, _AT_ONCE // weight.shape[1])
        for start in range(0, weight.shape[0], rows):
            part = slice(start, start + rows)
            merged[part] = weight[part] + update_rows(adapted, part)
    return (merged.T if transposed else merged).contiguous()


def update_rows(adapted: LoRALinear | LoRAEmbedding, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some rows of `delta_weight()`, in `dtype` or wider."""
    up, down = adapted.lora_B.value().detach(), adapted.lora_A.value().detach()
    wide = torch.promote_types(up.dtype, dtype)
    if isinstance(adapted, LoRAEmbedding):
        return (up.to(wide) @ down[:, rows].to(wide)).T * adapted.scaling
    return (up[rows].to(wide) @ down.to(wide)) * adapted.scaling
