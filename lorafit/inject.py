"""Injection: find the target layers by name, wrap each in LoRALinear, and handle what was injected as one thing.

    names = inject_lora(model, rank=16, alpha=32, target_modules="all_linear")
    mark_only_lora_as_trainable(model)

One walk over the module tree does it; no base weight is copied. `target_modules` is

- "all_linear": every linear layer but the output head;
- a list of names, each equal to a layer's name or a dotted end of it ("q_proj", "self_attn.q_proj");
- a string: such a name, or a regular expression that must match the whole name.

Names may also mean embeddings. An entry that matches no such layer is an error. Nothing is adapted by guess and
nothing is skipped in silence: `coverage` tells how many layers of each kind were wrapped and how many were not.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import regex
import torch
from torch import Tensor, nn

from lorafit.errors import InputError, did_you_mean, reason
from lorafit.lora import LoRAEmbedding, LoRALayer, LoRALinear, TrainedCopy, lora_scaling
from lorafit.quant import base_report, disarm_repacking, head_names, linear_layers, logical_shape

ALL_LINEAR = "all_linear"
BIASES = ("none", "all", "lora_only")


def find_targets(model: nn.Module, target_modules: str | Sequence[str], without: Sequence[str] = ()) -> list[str]:
    """Names of the layers that `target_modules` means, in the model's order; none of `without` and what lies in them.

    Raises InputError for an entry that matches nothing, naming the nearest names that the model has.
    """
    outside = tuple(f"{name}." for name in without)
    linears = {name for name in linear_layers(model) if name not in without and not name.startswith(outside or ("\0",))}
    if target_modules == ALL_LINEAR:
        head = head_names(model)
        found = [name for name in linear_layers(model) if name in linears - head]
        if not found:
            raise InputError(f"target_modules={ALL_LINEAR}: {type(model).__name__} has no linear layer but its head")
        return found
    entries = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not entries:
        raise InputError("target_modules is empty: name layers, or take all_linear")
    layers = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if name in linears
        or (isinstance(module, nn.Embedding) and name not in without and not name.startswith(outside or ("\0",)))
    ]
    chosen: set[str] = set()
    for entry in entries:
        matched = matches(str(entry), layers)
        if not matched:
            raise InputError(_no_match(model, str(entry), layers))
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
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    bias: str = "none",
    modules_to_save: Sequence[str] = (),
    adapter_dtype: str = "float32",
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Wrap the target layers of `model`, in place, and return their names.

    rank_pattern, alpha_pattern: other ranks and alphas for some layers, by name, dotted end or regular expression of it
    (the first that matches counts, as in peft). bias: which biases of the base are trained as well: "none", "all", or
    "lora_only", those of the wrapped layers; they keep the base's dtype. modules_to_save: modules to train whole.
    adapter_dtype: see LoRALinear.

    Each wrapped layer is frozen; `mark_only_lora_as_trainable` freezes the rest. A layer that the model uses under
    several names is wrapped once. Raises InputError for impossible values, for a name that matches nothing, and
    for a model that is adapted already; then nothing has changed.
    """
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
    for each in (rank, *ranks.values()):  # before anything is changed
        lora_scaling(each, alpha, variant)
    for other in alphas.values():
        lora_scaling(rank, other, variant)
    if bias not in BIASES:
        raise InputError(f"bias must be one of {', '.join(BIASES)}, got {bias!r}.{did_you_mean(bias, BIASES)}")
    if adapter_modules(model) or trained_biases(model):
        raise InputError("the model carries LoRA layers already: merge them or load it anew")
    disarm_repacking(model)
    saved = _modules_to_save(model, modules_to_save)
    names = find_targets(model, target_modules, without=saved)
    for key, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        for pattern in patterns:
            if not any(means(pattern, name) for name in names):
                raise InputError(f"{key}: {pattern!r} matches none of the adapted layers, such as {names[0]}")
    layers = {name: model.get_submodule(name) for name in names}
    biased = [] if bias == "none" else _biases(model, names if bias == "lora_only" else None, saved)
    if bias != "none" and not biased:
        raise InputError(f"bias={bias}: {type(model).__name__} has no such bias to train")
    layers |= {name: model.get_submodule(name) for name in saved}
    wrapped: dict[int, nn.Module] = {}
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for name, base_layer in layers.items():
            if id(base_layer) in wrapped:
                continue
            of_layer: dict[str, Any] = {"rank": by_pattern(ranks, name, rank), "alpha": by_pattern(alphas, name, alpha)}
            of_layer |= {"variant": variant, "dtype": dtype, "adapter_dtype": adapter_dtype}
            if name in saved:
                wrapped[id(base_layer)] = TrainedCopy(base_layer)
            elif isinstance(base_layer, nn.Embedding):
                wrapped[id(base_layer)] = LoRAEmbedding(base_layer, **of_layer)
            else:
                wrapped[id(base_layer)] = LoRALinear(base_layer, dropout=dropout, **of_layer)
    except InputError:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise
    originals = {name: (parameter, parameter.detach().clone()) for name, parameter in biased}
    for name, base_layer in layers.items():  # nothing can fail from here on
        model.set_submodule(name, wrapped[id(base_layer)])
    if originals:
        model.lorafit_biases = originals  # type: ignore[assignment]
    return names


def means(pattern: str, name: str) -> bool:
    """Whether an entry of rank_pattern or alpha_pattern speaks of the layer: peft's rule."""
    return matched(rf"(.*\.)?({pattern})$", name) is not None


def matched(pattern: str, name: str) -> Any:
    """The match of an expression at the start of a name, or None. The expression may be a stranger's: one that takes
    longer than two seconds, as some nested ones do for ever, is an InputError, as is one that is none."""
    try:
        return regex.match(pattern, name, timeout=2)
    except TimeoutError as error:
        raise InputError(f"the expression {pattern[:80]!r} takes too long on a name of {len(name)} letters") from error
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise InputError(f"{pattern[:80]!r} is no regular expression ({reason(error)[:80]})") from error


def by_pattern(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that speaks of the layer."""
    return next((value for pattern, value in patterns.items() if means(pattern, name)), otherwise)


def _modules_to_save(model: nn.Module, entries: Sequence[str]) -> list[str]:
    """The names that modules_to_save means, by name or dotted end; none that lies in another of them."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    found: set[str] = set()
    for entry in entries:
        matched = [name for name in names if name == entry or name.endswith(f".{entry}")]
        if not matched:
            hint = did_you_mean(entry, {*names, *(name.rpartition(".")[2] for name in names)})
            raise InputError(f"modules_to_save: {entry!r} matches no module of {type(model).__name__}.{hint}")
        for name in matched:
            if not any(True for _ in model.get_submodule(name).parameters()):
                raise InputError(f"modules_to_save: {name!r} has no parameters to train")
        found.update(matched)
    return [name for name in names if name in found and not any(name.startswith(f"{other}.") for other in found)]


def _biases(model: nn.Module, of: Sequence[str] | None, without: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
    """The biases of the layers `of`, or all of the model; none in `without`, which is trained anyway."""
    outside = tuple(f"{name}." for name in without)
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] == "bias"
        and (of is None or name.rpartition(".")[0] in of)
        and not name.startswith(outside or ("\0",))
    ]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear | LoRAEmbedding]:
    """The LoRA layers of a model by name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def adapter_modules(model: nn.Module) -> dict[str, LoRALinear | LoRAEmbedding | TrainedCopy]:
    """Every module of the adapter by name: LoRA layers and modules trained whole; a shared one under all its names."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (*LoRALayer, TrainedCopy))
    }


def trained_biases(model: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """The biases of the base that are trained in place: {name in the base: (parameter, its original values)}."""
    return getattr(model, "lorafit_biases", {})


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Freeze every parameter but those of the adapter: A and B, modules trained whole, trained biases."""
    model.requires_grad_(False)
    for module in adapter_modules(model).values():
        for part in [module.trained] if isinstance(module, TrainedCopy) else [module.lora_A, module.lora_B]:
            part.requires_grad_(True)
    for parameter, _ in trained_biases(model).values():
        parameter.requires_grad_(True)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) logical parameters: a 4-bit weight of 4096 x 4096 counts 16,777,216."""
    counts = [(logical_shape(parameter).numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trainable in counts if trainable), sum(count for count, _ in counts)


def coverage(model: nn.Module) -> dict[str, dict[str, int]]:
    """For each kind of linear layer (the last part of its name): how many are wrapped, and how many there are."""
    kinds: dict[str, dict[str, int]] = {}
    modules = adapter_modules(model)
    # what lies inside a module of the adapter, its base and its factors, is part of it
    inside = tuple(f"{name}." for name in modules) or ("\0",)
    plain = [name for name in linear_layers(model) if not name.startswith(inside)]
    adapted = [name for name, module in modules.items() if isinstance(module, LoRALayer)]  # not what is trained whole
    for name in [*adapted, *plain]:
        entry = kinds.setdefault(name.rpartition(".")[2], {"wrapped": 0, "total": 0})
        entry["wrapped"] += name in modules
        entry["total"] += 1
    return kinds


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter alone, by the base's names: `<layer>.lora_A.weight` [rank, in] and `<layer>.lora_B.weight`
    [out, rank] of each LoRA layer, the parameters of each module trained whole, and the trained biases."""
    state = {
        f"{name}.{factor}.weight": getattr(layer, factor).weight.detach()
        for name, layer in lora_layers(model).items()
        for factor in ("lora_A", "lora_B")
    }
    for name, module in model.named_modules():
        if isinstance(module, TrainedCopy):
            state |= {f"{name}.{key}": tensor for key, tensor in module.trained.state_dict().items()}
    return state | {name: parameter.detach() for name, (parameter, _) in trained_biases(model).items()}


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


def merge_lora(model: nn.Module, *, keep: bool = False) -> nn.Module:
    """Replace every LoRA layer and every module trained whole by its merged plain one, in place; return the model.

    keep: set the adapter's modules and the base weights in them aside, so that `unmerge_lora` can put them back.
    Trained biases stand in the base already. Where an embedding and the head shared one weight and no longer do,
    the model's configuration says so.
    """
    modules, report = adapter_modules(model), base_report(model)
    configs = [part for part in _configs(model) if getattr(part, "tie_word_embeddings", False)]
    if keep:
        model.lorafit_kept = (  # type: ignore[assignment]
            modules,
            trained_biases(model),
            configs,
            report.fingerprint if report else None,
        )
    merged: dict[int, nn.Module] = {}
    for name, module in modules.items():
        if id(module) not in merged:
            merged[id(module)] = module.merge()
        model.set_submodule(name, merged[id(module)])
    if trained_biases(model):
        del model.lorafit_biases
    note_untied(model)
    if report is not None:
        report.fingerprint = None  # it is another base now
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Undo `merge_lora(model, keep=True)` in place, exactly: nothing is subtracted, what was set aside comes back.

    Raises InputError where nothing was set aside.
    """
    if not hasattr(model, "lorafit_kept"):
        raise InputError("nothing was set aside to unmerge: call merge_lora(model, keep=True)")
    modules, biases, configs, fingerprint = model.lorafit_kept  # type: ignore[misc]
    del model.lorafit_kept
    for name, module in modules.items():
        module.train(model.get_submodule(name).training)
        model.set_submodule(name, module)
    if biases:
        model.lorafit_biases = biases
    for part in configs:
        part.tie_word_embeddings = True
    if (report := base_report(model)) is not None:
        report.fingerprint = fingerprint
    return model


def _configs(model: nn.Module) -> list[Any]:
    """The configuration of a model of transformers, and that of its text part."""
    config: Any = getattr(model, "config", None)
    return [] if config is None or not hasattr(config, "get_text_config") else [config, config.get_text_config()]


def note_untied(model: nn.Module) -> None:
    """Say in the model's configuration that embedding and head are two weights, where they have become so: otherwise
    transformers would tie them again when the model is loaded."""
    if not hasattr(model, "get_output_embeddings"):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is not None and getattr(head, "weight", None) is not embedding.weight:
        for part in _configs(model):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False


@dataclass
class Adapter:
    """One adapter outside of its model: the modules that belong over the base's, and trained values of its biases."""

    modules: dict[str, Any] = field(default_factory=dict)
    biases: dict[str, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)


@torch.no_grad()
def detach_adapter(model: nn.Module) -> Adapter:
    """Take the adapter out of the model, which then is exactly its base; nothing of the base is copied."""
    adapter = Adapter(adapter_modules(model))
    for name, module in adapter.modules.items():
        module.base_layer.train(module.training)
        model.set_submodule(name, module.base_layer)
    for name, (parameter, original) in trained_biases(model).items():
        adapter.biases[name] = (parameter, parameter.detach().clone())
        parameter.copy_(original)
    if adapter.biases:
        del model.lorafit_biases
    return adapter


@torch.no_grad()
def attach_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Put an adapter over the base it was taken from. Raises InputError when the model carries one already."""
    if adapter_modules(model) or trained_biases(model):
        raise InputError("the model carries an adapter already: take it out with detach_adapter")
    for name, module in adapter.modules.items():
        model.set_submodule(name, module)
        module.train(module.base_layer.training)
    if adapter.biases:
        model.lorafit_biases = {  # type: ignore[assignment]
            name: (parameter, parameter.detach().clone()) for name, (parameter, _) in adapter.biases.items()
        }
    for parameter, values in adapter.biases.values():
        parameter.copy_(values)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base alone: within the context the adapter is out of the model. Exact, and free."""
    adapter = detach_adapter(model)
    try:
        yield
    finally:
        attach_adapter(model, adapter)
