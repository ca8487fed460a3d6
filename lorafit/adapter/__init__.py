"""The adapter on disk: peft's folder, so that whatever reads peft folders reads ours, and we read theirs.

    adapter_config.json          peft's options (options.py)
    adapter_model.safetensors    base_model.model.<layer>.lora_A.weight and .lora_B.weight, and what else was trained
    lorafit.json                 what peft does not record: recipe of the quantization, fingerprint of the base, metrics
    README.md                    a model card, written from the measured numbers (card.py)

Reading is strict: a tensor that is missing or left over, another shape, another base, or an option that lorafit does
not know is an error that names it. Shapes are compared before anything is made as large as a file claims. The folder
appears whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.adapter.card import model_card
from lorafit.adapter.files import (
    CARD,
    CONFIG,
    PROVENANCE,
    WEIGHT_FILES,
    WEIGHTS,
    find_adapter,
    read_json,
    read_weights,
    sha256_of,
    weights_bytes,
    weights_file,
)
from lorafit.adapter.options import AdapterConfig, adapted_names, parse, write
from lorafit.errors import DivergedError, InputError, did_you_mean
from lorafit.files import replace_folder, write_atomically, write_json
from lorafit.fingerprint import fingerprint_of
from lorafit.inject import (
    adapter_modules,
    by_pattern,
    detach_adapter,
    inject_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    means,
    trained_biases,
)
from lorafit.lora import LoRAEmbedding, RoundedFactor
from lorafit.quant import base_report, features, is_quantized
from lorafit.redact import redact
from lorafit.rounding import KINDS, bytes_of, round_to

__all__ = [
    "CARD",
    "CONFIG",
    "PROVENANCE",
    "WEIGHTS",
    "adapter_bytes",
    "adapter_dtype",
    "base_fingerprint",
    "find_adapter",
    "fingerprint_of",
    "load_adapter",
    "model_card",
    "read_config",
    "read_record",
    "round_adapter",
    "save_adapter",
    "weights_file",
]

PREFIX = "base_model.model."


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> None:
    """Write the adapter of `model` as a peft folder, replacing the adapter that was there.

    base_model: the name to record; by default the one it was loaded by. provenance: what else lorafit.json and the
    card should hold ("metrics", "data", ...). dtype: of the tensors on the disk, "float32", "bfloat16", "int8" or
    "nf4"; by default what A and B multiply in. Only the first two are read by peft.
    Raises InputError when the model has no adapter, or one that peft cannot say; DivergedError when it holds a number
    that is not finite, or that would not be in `dtype`.
    """
    layers = lora_layers(model)
    if not layers:
        raise InputError("the model has no LoRA layers to save: call inject_lora first")
    dtype = dtype or adapter_dtype(model)
    if dtype not in KINDS:
        raise InputError(f"dtype must be one of {', '.join(KINDS)}, got {dtype!r}.{did_you_mean(dtype, KINDS)}")
    report = base_report(model)
    name = base_model or (report.name if report else None)
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{str(folder)!r} is a file: an adapter is saved as a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        config = write(model, name)
        state = _to_peft(model, _as_used(model))
        _require_finite(state, dtype)
        factors = {key for key in state if ".lora_" in key}
        file_name, content = weights_bytes(state, dtype, factors)
        write_atomically(draft / file_name, lambda file: file.write(content))
        write_json(draft / CONFIG, config)
        record = {
            "base_model": name,
            "base_fingerprint": base_fingerprint(model),
            "base_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "quant": report.quant.as_dict() if report and report.quant else None,
            "quantized_modules": report.quantized if report else [],
            "variant": next(iter(layers.values())).variant,
            **(provenance or {}),
            "dtype": dtype,
            "weights": {"file": file_name, "bytes": len(content), "sha256": sha256_of(draft / file_name)},
        }
        write_json(draft / PROVENANCE, record)
        card = redact(model_card(config, record)).encode()
        write_atomically(draft / CARD, lambda file: file.write(card))
        draft.chmod(0o755)  # mkdtemp makes what only its owner may open
        replace_folder(draft, folder)
        for other in WEIGHT_FILES:  # replace_folder keeps what the new folder lacks
            if other != file_name:
                (folder / other).unlink(missing_ok=True)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _require_finite(state: Mapping[str, Tensor], dtype: str) -> None:
    """Raise DivergedError for values that are not finite, or would not be in the file: bfloat16 ends at 3.39e38, a
    little below float32."""
    for name, tensor in state.items():
        stored = tensor.to(torch.bfloat16) if _stored_as(name, dtype) == "bfloat16" else tensor
        if not torch.isfinite(stored).all():
            also = "" if stored is tensor else f" as {dtype}"
            raise DivergedError(
                f"the adapter holds a number that is not finite{also}, in {name.removeprefix(PREFIX)}: it is not "
                "saved. Lower optimizer.lr"
            )


def _as_used(model: nn.Module) -> dict[str, Tensor]:
    """The adapter as it multiplies: rounded factors as rounded, not the finer weights that training keeps."""
    state = lora_state_dict(model)
    for name, layer in lora_layers(model).items():
        for factor in ("lora_A", "lora_B"):
            state[f"{name}.{factor}.weight"] = getattr(layer, factor).value().detach()
    return state


def adapter_dtype(model: nn.Module) -> str:
    """In what A and B of the model's LoRA layers multiply: "float32", or what they are rounded to."""
    first = next(iter(lora_layers(model).values())).lora_A
    return first.kind if isinstance(first, RoundedFactor) else "float32"


def adapter_bytes(model: nn.Module, dtype: str) -> int:
    """How many bytes the values of the adapter take in a file in `dtype`."""
    state = lora_state_dict(model)
    return sum(bytes_of(_stored_as(name, dtype), tensor.numel()) for name, tensor in state.items())


def _stored_as(name: str, dtype: str) -> str:
    """In what a tensor is stored: what is no factor is rounded to bfloat16 at most."""
    is_factor = name.endswith((".lora_A.weight", ".lora_B.weight"))
    return dtype if is_factor or dtype == "float32" else "bfloat16"


@torch.no_grad()
def round_adapter(model: nn.Module, dtype: str) -> None:
    """Give the adapter the values that it would be read back with after `save_adapter(dtype=…)`, in place."""
    for name, tensor in lora_state_dict(model).items():
        tensor.copy_(round_to(tensor, _stored_as(name, dtype)))


def read_config(folder: str | Path) -> AdapterConfig:
    """What adapter_config.json says; InputError where it is not there, or says what lorafit cannot apply."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise InputError(f"adapter folder {str(folder)!r} has no {CONFIG}")
    return parse(read_json(folder, CONFIG), str(folder / CONFIG))


def read_record(folder: str | Path) -> dict[str, Any]:
    """What lorafit.json says; nothing where the adapter comes from elsewhere."""
    folder = Path(folder)
    if not os.path.lexists(folder / PROVENANCE):
        return {}
    record = read_json(folder, PROVENANCE)
    settings = record.get("settings") if isinstance(record, dict) else None
    parts = settings.items() if isinstance(settings, dict) else ()
    if not isinstance(record, dict) or not isinstance(settings, dict | None):
        raise InputError(f"{folder / PROVENANCE} holds no record of an adapter")
    if not all(part is None or isinstance(part, int if key == "seed" else dict) for key, part in parts):
        raise InputError(f"{folder / PROVENANCE}: its settings are not sections of keys and values")
    return record


def load_adapter(model: nn.Module, folder: str | Path, *, allow_other_base: bool = False) -> list[str]:
    """Inject LoRA layers as a peft folder says, fill them from it, and return their names.

    allow_other_base: take another base than the one that the adapter was trained on, if the shapes are equal.
    Raises InputError that names the missing or unused tensors, the wrong shapes, the other base, or the option that is
    not known here; then the model is as it was.
    """
    folder = Path(folder)
    config = read_config(folder)
    record = read_record(folder)
    weights = record.get("weights")
    path = weights_file(folder, weights.get("file") if isinstance(weights, dict) else None)
    sha256 = weights.get("sha256") if isinstance(weights, dict) and weights.get("file") == path.name else None
    tensors = read_weights(path, sha256)
    if not allow_other_base:
        _require_base(model, record, folder)
    names, saved = adapted_names(model, config, str(folder / CONFIG))
    tensors = _from_peft(model, tensors, saved, path)
    rank_pattern = {key: value for key, value in config.rank_pattern.items() if any(means(key, n) for n in names)}
    alpha_pattern = {key: value for key, value in config.alpha_pattern.items() if any(means(key, n) for n in names)}
    _compare_shapes(model, names, saved, config.rank, rank_pattern, tensors)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    injected = inject_lora(
        model,
        rank=config.rank,
        alpha=config.alpha,
        target_modules="|".join(f"(?:{_exactly(name)})" for name in names),
        dropout=config.dropout,
        variant=config.variant,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        bias=config.bias,
        modules_to_save=saved,
    )
    try:
        load_lora_state_dict(model, tensors)
    except InputError:
        detach_adapter(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
        raise
    return injected


def base_fingerprint(model: nn.Module) -> str | None:
    """The fingerprint of the base below the adapter of `model`, before it was quantized; None where that is unknown:
    on the meta device, and for a model that was quantized elsewhere."""
    report = base_report(model)
    if report is not None:
        return report.fingerprint
    if any(parameter.is_meta for parameter in model.parameters()) or any(map(is_quantized, model.modules())):
        return None
    return fingerprint_of(_base_parameters(model))


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the base by its own names, trained biases with their original values."""
    parts = tuple(f"{name}.{part}." for name in adapter_modules(model) for part in ("lora_A", "lora_B", "trained"))
    originals = {name: original for name, (_, original) in trained_biases(model).items()}
    for name, parameter in model.named_parameters():
        if not (parts and name.startswith(parts)):
            name = name.replace(".base_layer.", ".").removeprefix("base_layer.")
            yield name, originals.get(name, parameter)


def _require_base(model: nn.Module, record: Mapping[str, Any], folder: Path) -> None:
    recorded, own = record.get("base_fingerprint"), base_fingerprint(model)
    if recorded is None or own is None or recorded == own:
        return
    report = base_report(model)
    there = f" {report.name!r}" if report else ""
    raise InputError(
        f"adapter {str(folder)!r} was trained on another base than{there}: on {str(record.get('base_model'))[:200]!r}, "
        "by its fingerprint of names, shapes and values. Give model.name=THAT, or allow_other_base=true if you know "
        "better"
    )


# ------------------------------------------------------------------------------------------------ names and shapes


def _to_peft(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to those of the file: peft calls an embedding's factors otherwise, and a wrapped layer's bias."""
    layers, named = lora_layers(model), {}
    for key, tensor in state.items():
        owner = key.removesuffix(".weight").rpartition(".")[0]
        if key.endswith((".lora_A.weight", ".lora_B.weight")) and isinstance(layers.get(owner), LoRAEmbedding):
            key = f"{owner}.lora_embedding_{key[-8]}"
        elif key.endswith(".bias") and key.removesuffix(".bias") in layers:
            key = f"{key.removesuffix('bias')}base_layer.bias"
        named[PREFIX + key] = tensor
    return named


def _from_peft(model: nn.Module, tensors: Mapping[str, Tensor], saved: Iterable[str], path: Path) -> dict[str, Tensor]:
    """The names of the file to ours, without the unchanged base weights that peft saves beside an adapted embedding."""
    own: dict[str, Tensor] = {}
    base = dict(model.named_parameters(remove_duplicate=False))
    trained_whole = tuple(f"{name}." for name in saved)
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        for factor in "AB":
            if name.endswith(f".lora_embedding_{factor}"):
                name = f"{name.removesuffix(f'.lora_embedding_{factor}')}.lora_{factor}.weight"
        name = name.replace(".modules_to_save.", ".")  # peft says a bias of such a module twice
        if name.endswith(".base_layer.bias"):
            name = f"{name.removesuffix('base_layer.bias')}bias"
        of_base = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        is_bias = name.endswith(".bias") and name == of_base
        if of_base in base and not is_bias and (name != of_base or not name.startswith(trained_whole or ("\0",))):
            if not _same(base[of_base], tensor):
                raise InputError(f"{path}: {key} is not the base's own weight: the adapter needs a changed base")
            continue
        if name in own and not torch.equal(own[name], tensor):
            raise InputError(f"{path}: {key} says anew what another tensor of the file says already")
        own[name] = tensor
    return own


def _same(weight: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold one thing, be it that one of them was rounded to its dtype."""
    weight = weight.detach().cpu()
    return weight.shape == other.shape and (
        torch.equal(weight.to(other.dtype), other) or torch.equal(weight, other.to(weight.dtype))
    )


def _exactly(name: str) -> str:
    return "".join(f"[{char}]" if not char.isalnum() and char != "_" else char for char in name)


def _compare_shapes(
    model: nn.Module,
    names: Iterable[str],
    saved: Iterable[str],
    rank: int,
    ranks: Mapping[str, int],
    tensors: Mapping[str, Tensor],
) -> None:
    """Raise InputError where A and B of the file are not what the configuration claims, before any is made."""
    problems = [
        f"missing {name}.{key}"
        for name in saved
        for key, _ in model.get_submodule(name).named_parameters()
        if f"{name}.{key}" not in tensors
    ]
    shared: set[int] = set()  # a layer under several names is in the file once
    for name in names:
        layer: Any = model.get_submodule(name)
        of_layer = by_pattern(ranks, name, rank)
        if isinstance(layer, nn.Embedding):
            inner, outer = layer.num_embeddings, layer.embedding_dim
        else:
            inner, outer = features(layer)
        for factor, shape in (("A", (of_layer, inner)), ("B", (outer, of_layer))):
            tensor = tensors.get(f"{name}.lora_{factor}.weight")
            if tensor is not None and tuple(tensor.shape) != shape:
                problems.append(f"{name}.lora_{factor}.weight is {tuple(tensor.shape)}, not {shape}")
            elif tensor is None and id(layer) not in shared:
                problems.append(f"missing {name}.lora_{factor}.weight")
        shared.add(id(layer))
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputError(f"the adapter does not fit the model: {'; '.join(problems[:8])}{more}")
