"""Injection: find the target layers by name, wrap each in LoRALinear, and handle what was injected as one thing.

    names = inject_lora(model, rank=16, alpha=32, target_modules="all_linear")
    mark_only_lora_as_trainable(model)

One walk over the module tree does it; nothing is copied. `target_modules` is

- "all_linear": every linear layer but the output head;
- a list of names, each equal to a layer's name or a dotted end of it ("q_proj", "self_attn.q_proj");
- a string: such a name, or a regular expression that must match the whole name.

An entry that matches no linear layer is an error. Nothing is adapted by guess and nothing is skipped in silence:
`coverage` tells how many layers of each kind were wrapped and how many were not.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lorafit.errors import InputError, did_you_mean
from lorafit.lora import LoRALinear, lora_scaling
from lorafit.quant import disarm_repacking, head_names, linear_layers, logical_shape

ALL_LINEAR = "all_linear"


def find_targets(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """Names of the linear layers that `target_modules` means, in the model's order.

    Raises InputError for an entry that matches nothing, naming the nearest names that the model has.
    """
    layers = linear_layers(model)
    if target_modules == ALL_LINEAR:
        head = head_names(model)
        found = [name for name in layers if name not in head]
        if not found:
            raise InputError(f"target_modules={ALL_LINEAR}: {type(model).__name__} has no linear layer but its head")
        return found
    entries = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not entries:
        raise InputError("target_modules is empty: name layers, or take all_linear")
    chosen: set[str] = set()
    for entry in entries:
        matched = matches(str(entry), layers)
        if not matched:
            raise InputError(_no_match(model, str(entry), list(layers)))
        chosen.update(matched)
    return [name for name in layers if name in chosen]


def matches(entry: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that an entry of `target_modules` means: by name or dotted end, else as a regular expression."""
    names = list(names)
    if re.fullmatch(r"[\w.]+", entry):
        by_name = [name for name in names if name == entry or name.endswith("." + entry)]
        if by_name:
            return by_name
    try:
        pattern = re.compile(entry)
    except re.error as error:
        raise InputError(f"target_modules: {entry!r} is neither a name nor a regular expression ({error})") from error
    return [name for name in names if pattern.fullmatch(name)]


def _no_match(model: nn.Module, entry: str, layers: list[str]) -> str:
    others = matches(entry, [name for name, _ in model.named_modules() if name])
    if others:
        kind = type(model.get_submodule(others[0])).__name__
        inside = sorted({name.rpartition(".")[2] for name in layers if name.startswith(others[0] + ".")})
        hint = f" Its linear layers are {', '.join(inside)}." if inside else ""
        return f"target_modules: {entry!r} is {kind}, no linear layer.{hint}"
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    hint = did_you_mean(entry, [*kinds, ALL_LINEAR, *(layers if "." in entry else [])])
    return f"target_modules: {entry!r} matches no linear layer of {type(model).__name__} ({', '.join(kinds)}).{hint}"


def inject_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    dropout: float = 0.0,
    variant: str = "lora",
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Wrap the target layers of `model`, in place, and return their names.

    Each wrapped layer is frozen; `mark_only_lora_as_trainable` freezes the rest. A layer that the model uses under
    several names is wrapped once. Raises InputError for impossible values, for a target that matches nothing, and
    for a model that is adapted already.
    """
    lora_scaling(rank, alpha, variant)  # before anything is changed
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise InputError("the model carries LoRA layers already: merge them or load it anew")
    disarm_repacking(model)
    names = find_targets(model, target_modules)
    wrapped: dict[int, LoRALinear] = {}
    for name in names:
        base_layer = model.get_submodule(name)
        if id(base_layer) not in wrapped:
            wrapped[id(base_layer)] = LoRALinear(base_layer, rank, alpha, dropout, variant=variant, dtype=dtype)
        model.set_submodule(name, wrapped[id(base_layer)])
    return names


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA layers of a model by name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Freeze every parameter but the A and B of the LoRA layers."""
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) logical parameters: a 4-bit weight of 4096 x 4096 counts 16,777,216."""
    counts = [(logical_shape(parameter).numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trainable in counts if trainable), sum(count for count, _ in counts)


def coverage(model: nn.Module) -> dict[str, dict[str, int]]:
    """For each kind of linear layer (the last part of its name): how many are wrapped, and how many there are."""
    kinds: dict[str, dict[str, int]] = {}
    adapted = {
        name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, LoRALinear)
    }
    # what lies inside a LoRA layer, its base and its factors, is part of it
    inside = tuple(f"{name}." for name in adapted) or ("\0",)
    plain = [name for name in linear_layers(model) if not name.startswith(inside)]
    for name in [*adapted, *plain]:
        entry = kinds.setdefault(name.rpartition(".")[2], {"wrapped": 0, "total": 0})
        entry["wrapped"] += name in adapted
        entry["total"] += 1
    return kinds


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter alone: `<layer>.lora_A.weight` [rank, in] and `<layer>.lora_B.weight` [out, rank] of each layer."""
    return {
        f"{name}.{factor}.weight": getattr(layer, factor).weight.detach()
        for name, layer in lora_layers(model).items()
        for factor in ("lora_A", "lora_B")
    }


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Fill the LoRA layers; the names and shapes must be exactly those of `lora_state_dict(model)`.

    Raises InputError that lists what is missing, what is left over and what has another shape; then nothing changed.
    """
    own = lora_state_dict(model)
    problems = [f"missing {name}" for name in own if name not in state_dict]
    problems += [f"unused {name}" for name in state_dict if name not in own]
    problems += [
        f"{name} is {tuple(state_dict[name].shape)}, the model's is {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputError(f"the adapter does not fit the model: {'; '.join(problems[:8])}{more}")
    for name, tensor in own.items():
        tensor.copy_(state_dict[name])


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every LoRA layer by its merged plain layer, in place, and return the model."""
    merged: dict[int, nn.Module] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, LoRALinear):
            if id(layer) not in merged:
                merged[id(layer)] = layer.merge()
            model.set_submodule(name, merged[id(layer)])
    return model


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base alone: within the context every LoRA layer is replaced by the layer it wraps. Exact, and free."""
    layers = {
        name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, LoRALinear)
    }
    try:
        for name, layer in layers.items():
            layer.base_layer.train(layer.training)
            model.set_submodule(name, layer.base_layer)
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
