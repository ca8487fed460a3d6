"""adapter_config.json: peft's words for what an adapter is. Here, and nowhere else in lorafit, rank is `r`.

Reading is strict. What changes what the adapter computes is understood or refused; what only says how it was trained
is passed over; any other option that is not off is refused, those of future versions of peft included.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorafit.errors import InputError
from lorafit.inject import ALL_LINEAR, BIASES, adapter_modules, find_targets, lora_layers, matched, trained_biases
from lorafit.lora import LoRALinear, TrainedCopy
from lorafit.quant import linear_layers

# Options that change what the adapter computes and are not applied here, with the value that means "not used".
UNUSED = {
    "use_dora": False,
    "trainable_token_indices": None,
    "target_parameters": None,
    "lora_bias": False,
}
OFF: tuple[Any, ...] = (None, False, "none", {}, [])
# What a peft configuration may hold: what is read here, and what does not change what the finished adapter computes.
READ = {
    *("peft_type", "r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "fan_in_fan_out"),
    *("rank_pattern", "alpha_pattern", "bias", "modules_to_save", "exclude_modules", "layers_to_transform"),
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("ensure_weight_tying", "layers_pattern", "megatron_config", "megatron_core", "qalora_group_size"),
}
HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass
class AdapterConfig:
    """What adapter_config.json says, in the words of the house."""

    base_model: str | None
    rank: int
    alpha: float
    dropout: float
    variant: str
    target_modules: str | list[str]
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: list[str] = field(default_factory=list)
    exclude_modules: str | list[str] = field(default_factory=list)
    layers: list[int] | None = None
    layers_pattern: list[str] = field(default_factory=list)


def parse(config: Any, where: str) -> AdapterConfig:
    """From the JSON of a file. Raises InputError, led by `where`, for what is missing, impossible or unknown."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{where}: peft_type is {_shown(kind)}, only LORA is read")
    if odd := [key for key in config if not key.isprintable()]:
        raise InputError(f"{where}: {_shown(odd[0])} is no option of peft")
    absent = [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) in (None, "", [])]
    if absent:
        raise InputError(f"{where}: {', '.join(absent)} is missing")
    used = [
        f"{_shown(key)[1:-1]}={_shown(value)}" for key, value in config.items() if key not in READ and value not in OFF
    ]
    if config.get("init_lora_weights", True) not in HARMLESS_INITS:
        used.append(f"init_lora_weights={_shown(config['init_lora_weights'])} (it changes the base)")
    if used:
        more = f" and {len(used) - 8} more" if len(used) > 8 else ""
        raise InputError(f"{where}: options that lorafit cannot apply: {', '.join(used[:8])}{more}")

    def value(key: str, good: Any, wanted: str, otherwise: Any = None) -> Any:
        found = config.get(key)
        if found is None:
            return otherwise
        if not good(found):
            raise InputError(f"{where}: {key} must be {wanted}, got {_shown(found)}")
        return found

    layers = value("layers_to_transform", lambda v: _is_int(v) or _all(v, _is_int), "a number or a list of numbers")
    pattern = value(
        "layers_pattern", lambda v: isinstance(v, str) or _all(v, _is_text), "a name or a list of names", []
    )
    return AdapterConfig(
        base_model=value("base_model_name_or_path", lambda v: isinstance(v, str), "a text"),
        rank=value("r", _is_rank, "a positive integer"),
        alpha=value("lora_alpha", _is_alpha, "a positive number"),
        dropout=value("lora_dropout", lambda v: _is_number(v) and 0 <= v < 1, "in [0, 1)", 0.0),
        variant="rslora" if value("use_rslora", lambda v: isinstance(v, bool), "true or false") else "lora",
        target_modules=value("target_modules", lambda v: _is_text(v) or _all(v, _is_text), "a text or a list of texts"),
        rank_pattern=value("rank_pattern", lambda v: _is_pattern(v, _is_rank), "{name: positive integer}", {}),
        alpha_pattern=value("alpha_pattern", lambda v: _is_pattern(v, _is_alpha), "{name: positive number}", {}),
        bias=value("bias", lambda v: isinstance(v, str) and v in BIASES, f"one of {', '.join(BIASES)}", "none"),
        modules_to_save=value("modules_to_save", lambda v: _all(v, _is_text), "a list of texts", []),
        exclude_modules=value("exclude_modules", lambda v: _is_text(v) or _all(v, _is_text), "a text or texts", []),
        layers=[layers] if _is_int(layers) else layers or None,
        layers_pattern=[pattern] if isinstance(pattern, str) else pattern,
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_int(value) and 0 < value < 2**31


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and 0 < value < 1e9  # a number of JSON may be larger than any float


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _all(value: Any, good: Any) -> bool:
    return isinstance(value, list) and all(good(item) for item in value)


def _is_pattern(value: Any, good: Any) -> bool:
    return isinstance(value, dict) and all(good(item) for item in value.values())


# ------------------------------------------------------------------------------------------------ which layers


def adapted_names(model: nn.Module, config: AdapterConfig, where: str) -> tuple[list[str], list[str]]:
    """(layers with A and B, modules trained whole) that a configuration means in `model`, by peft's rules.

    Unlike `inject_lora`, entries that match nothing are passed over as long as one does: the tensors of the file are
    held against the names afterwards. Raises InputError where nothing matches.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    ends = tuple(config.modules_to_save)
    saved = [name for name in names if ends and name.endswith(ends)]
    saved = [name for name in saved if not any(name.startswith(f"{other}.") for other in saved)]
    inside = tuple(f"{name}." for name in saved)
    if config.target_modules == "all-linear":
        found = find_targets(model, ALL_LINEAR, without=saved)
    else:
        possible = {
            *linear_layers(model),
            *(name for name in names if isinstance(model.get_submodule(name), nn.Embedding)),
        }
        found = [
            name
            for name in names
            if name in possible
            and name not in saved
            and not (inside and name.startswith(inside))
            and _targeted(name, config, where)
        ]
    excluded = _matching(config.exclude_modules, found, where)
    found = [name for name in found if name not in excluded]
    if not found:
        raise InputError(f"{where}: target_modules {_shown(config.target_modules)} match no layer of this model")
    return found, saved


def _matching(entries: str | Sequence[str], names: Iterable[str], where: str) -> set[str]:
    """peft's rule: a text is an expression for the whole name, a list holds names or dotted ends of names."""
    if isinstance(entries, str):
        try:
            return {name for name in names if matched(rf"(?:{entries})\Z", name)}
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    ends = tuple(f".{entry}" for entry in entries)
    return {name for name in names if name in entries or (ends and name.endswith(ends))}


def _targeted(name: str, config: AdapterConfig, where: str) -> bool:
    if not _matching(config.target_modules, [name], where):
        return False
    if config.layers is None or isinstance(config.target_modules, str) or name in config.target_modules:
        return True  # as in peft, a full name is not asked for its layer
    found = None
    for pattern in config.layers_pattern or [r"[^.]*"]:
        start = r"(?:^|.*?\.)" if config.layers_pattern else r".*?\."
        found = found or matched(rf"{start}{pattern}\.(?P<layer_number>\d+)\.", name)
    return found is not None and int(found["layer_number"]) in config.layers


# ------------------------------------------------------------------------------------------------ writing


def write(model: nn.Module, base_model: str | None) -> dict[str, Any]:
    """The adapter_config.json of the adapter that `model` carries."""
    layers = lora_layers(model)
    rank = _commonest(layer.rank for layer in layers.values())
    alpha = _commonest(layer.alpha for layer in layers.values())
    saved = [name for name, module in adapter_modules(model).items() if isinstance(module, TrainedCopy)]
    dropouts = [getattr(layer.dropout, "p", 0.0) for layer in layers.values() if isinstance(layer, LoRALinear)]
    biases = {name.rpartition(".")[0] for name in trained_biases(model)}
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropouts[0] if dropouts else 0.0,
        "target_modules": _target_modules(model, list(layers)),
        "rank_pattern": _pattern({name: layer.rank for name, layer in layers.items()}, rank),
        "alpha_pattern": _pattern({name: layer.alpha for name, layer in layers.items()}, alpha),
        "use_rslora": next(iter(layers.values())).variant == "rslora",
        "fan_in_fan_out": any(_is_transposed(layer.base_layer) for layer in layers.values()),
        "bias": "none" if not biases else "lora_only" if biases <= layers.keys() else "all",
        "modules_to_save": _names_to_save(model, saved) or None,
        "layers_to_transform": None,
        "inference_mode": True,
        "init_lora_weights": True,
        **UNUSED,
    }


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """The values that are not the usual one, by kind of layer where a whole kind has it, else by full name."""
    pattern: dict[str, Any] = {}
    for name, value in values.items():
        kind = name.rpartition(".")[2]
        of_kind = {other for key, other in values.items() if key.rpartition(".")[2] == kind}
        if value != usual:
            pattern[kind if of_kind == {value} else f"^{re.escape(name)}"] = value
    return pattern


def _outside(model: nn.Module) -> list[str]:
    """The names of the modules that the base has, without what lies in the modules of the adapter."""
    inside = tuple(f"{name}." for name in adapter_modules(model))
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name and not name.startswith(inside)]


def _target_modules(model: nn.Module, wrapped: list[str]) -> list[str] | str:
    """The shortest way to say in peft's words which layers are wrapped: by kind, by full name, or as an expression.

    peft takes every module, of whatever type, whose name is in the list or ends with "." and an entry of it.
    """
    names = [name for name in _outside(model) if not isinstance(adapter_modules(model).get(name), TrainedCopy)]
    for entries in (sorted({name.rpartition(".")[2] for name in wrapped}), sorted(wrapped)):
        if _matching(entries, names, "") == set(wrapped):
            return entries
    return "|".join(re.escape(name) for name in wrapped)


def _names_to_save(model: nn.Module, saved: list[str]) -> list[str]:
    """peft takes every module whose name ends with an entry: the full names, where those mean no more."""
    names = _outside(model)
    more = [name for name in names if saved and name.endswith(tuple(saved)) and name not in saved]
    if more:
        raise InputError(
            f"modules_to_save: peft would take {more[0]!r} for one of {', '.join(saved)}: train it as well, or neither"
        )
    return saved


def _task_type(model: nn.Module) -> str | None:
    if not getattr(model, "can_generate", bool)():
        return None
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def _is_transposed(base_layer: nn.Module) -> bool:
    return isinstance(base_layer, Conv1D) or getattr(base_layer, "source_cls", None) is Conv1D
