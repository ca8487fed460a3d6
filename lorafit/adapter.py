"""The adapter on disk: peft's folder, so that whatever reads peft folders reads ours, and we read theirs.

    adapter_config.json          peft's options; here, and nowhere else in lorafit, rank is `r` and alpha `lora_alpha`
    adapter_model.safetensors    base_model.model.<layer>.lora_A.weight and .lora_B.weight
    lorafit.json                 what peft does not record: quantization recipe, fingerprint of the base, metrics
    README.md                    a model card, written from the measured numbers

Reading is strict: a tensor that is missing or left over, another shape, or an option that lorafit does not know is
an error that names it. The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorafit.checkpoint import replace_folder, write_atomically, write_json
from lorafit.errors import InputError
from lorafit.inject import ALL_LINEAR, inject_lora, load_lora_state_dict, lora_layers, lora_state_dict, matches
from lorafit.lora import LoRALinear
from lorafit.quant import base_report, linear_layers, logical_shape

PREFIX = "base_model.model."
CONFIG, WEIGHTS, PROVENANCE, CARD = "adapter_config.json", "adapter_model.safetensors", "lorafit.json", "README.md"
# Options of peft that change what the adapter computes, with the value that means "not used".
UNUSED = {
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "lora_bias": False,
}
OFF: tuple[Any, ...] = (None, False, "none", {}, [])
# What a peft configuration may hold: what is read here, and what does not change what the finished adapter computes.
# Any other option that is not off is refused, those of future versions of peft included.
READ = {
    *("peft_type", "r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "fan_in_fan_out"),
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("ensure_weight_tying", "layers_pattern", "megatron_config", "megatron_core", "qalora_group_size"),
}
HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write the LoRA layers of `model` as a peft folder, replacing the adapter that was there.

    base_model: the name to record; by default the one it was loaded by. provenance: what else lorafit.json and the
    card should hold ("metrics", "data", ...). Raises InputError when the model has no adapter.
    """
    layers = lora_layers(model)
    if not layers:
        raise InputError("the model has no LoRA layers to save: call inject_lora first")
    report = base_report(model)
    name = base_model or (report.name if report else None)
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{str(folder)!r} is a file: an adapter is saved as a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        tensors = {PREFIX + key: tensor.cpu().contiguous() for key, tensor in lora_state_dict(model).items()}
        content = safetensors.torch.save(tensors, metadata={"format": "pt"})
        write_atomically(draft / WEIGHTS, lambda file: file.write(content))
        config = _peft_config(model, name)
        write_json(draft / CONFIG, config)
        record = {
            "base_model": name,
            "base_fingerprint": base_fingerprint(model),
            "quant": report.quant.as_dict() if report and report.quant else None,
            "quantized_modules": report.quantized if report else [],
            "variant": next(iter(layers.values())).variant,
            **(provenance or {}),
        }
        write_json(draft / PROVENANCE, record)
        card = model_card(config, record).encode()
        write_atomically(draft / CARD, lambda file: file.write(card))
        draft.chmod(0o755)  # mkdtemp makes what only its owner may open
        replace_folder(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _peft_config(model: nn.Module, base_model: str | None) -> dict[str, Any]:
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": base_model,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": getattr(first.dropout, "p", 0.0),
        "target_modules": _target_modules(model, list(layers)),
        "use_rslora": first.variant == "rslora",
        "fan_in_fan_out": any(_is_transposed(layer.base_layer) for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        **UNUSED,
    }


def _target_modules(model: nn.Module, wrapped: list[str]) -> list[str] | str:
    """The shortest way to say in peft's words which layers are wrapped: by kind, by full name, or as an expression.

    peft takes every module, of whatever type, whose name is in the list or ends with "." and an entry of it.
    """
    inside = tuple(f"{name}." for name in wrapped)
    names = [name for name, _ in model.named_modules() if not name.startswith(inside)]
    for entries in (sorted({name.rpartition(".")[2] for name in wrapped}), sorted(wrapped)):
        ends = tuple(f".{entry}" for entry in entries)
        if {name for name in names if name in entries or name.endswith(ends)} == set(wrapped):
            return entries
    return "|".join(re.escape(name) for name in wrapped)


def _task_type(model: nn.Module) -> str | None:
    if not getattr(model, "can_generate", bool)():
        return None
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def _is_transposed(base_layer: nn.Module) -> bool:
    return isinstance(base_layer, Conv1D) or getattr(base_layer, "source_cls", None) is Conv1D


def load_adapter(model: nn.Module, folder: str | Path) -> list[str]:
    """Inject LoRA layers as a peft folder says, fill them from it, and return their names.

    Raises InputError that names the missing or unused tensors, the wrong shapes, or the option that is not known here;
    then the model is as it was.
    """
    folder = Path(folder)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise InputError(f"adapter folder {str(folder)!r} has no {file}")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except (ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"adapter folder {str(folder)!r} cannot be read: {error}") from error
    _check_peft_config(config, folder / CONFIG)
    targets = config["target_modules"]
    if targets == "all-linear":
        targets = ALL_LINEAR
    elif isinstance(targets, str):
        targets = f"(?:{targets})"  # to peft a string is an expression for the whole name, even if it looks like a name
    else:
        # peft takes entries that match nothing, as long as one does
        present = list(linear_layers(model))
        targets = [entry for entry in targets if matches(entry, present)] or targets
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    names = inject_lora(
        model,
        rank=config["r"],
        alpha=config["lora_alpha"],
        target_modules=targets,
        dropout=config.get("lora_dropout", 0.0),
        variant="rslora" if config.get("use_rslora") else "lora",
    )
    try:
        load_lora_state_dict(model, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()})
    except InputError:
        for name, layer in list(model.named_modules(remove_duplicate=False)):
            if isinstance(layer, LoRALinear):
                model.set_submodule(name, layer.base_layer)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
        raise
    return names


def _check_peft_config(config: Any, path: Path) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{path}: peft_type is {kind!r}, only LORA is read")
    absent = [key for key in ("r", "lora_alpha", "target_modules") if not config.get(key)]
    if absent:
        raise InputError(f"{path}: {', '.join(absent)} is missing")
    used = [f"{key}={value!r}" for key, value in config.items() if key not in READ and value not in OFF]
    if config.get("init_lora_weights", True) not in HARMLESS_INITS:
        used.append(f"init_lora_weights={config['init_lora_weights']!r} (it changes the base)")
    if used:
        raise InputError(f"{path}: options that lorafit cannot apply: {', '.join(used)}")


def base_fingerprint(model: nn.Module, samples: int = 64) -> str:
    """A SHA-256 over the names, shapes and `samples` evenly spaced values of every frozen parameter of the base.

    Cheap enough to take each time, and different for another base of the same shape.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        flat = parameter.detach().flatten()
        places = torch.linspace(0, flat.numel() - 1, min(samples, flat.numel()), dtype=torch.float64).long()
        digest.update(f"{name.replace('.base_layer.', '.')} {tuple(logical_shape(parameter))}".encode())
        digest.update(flat[places.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_card(config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The README.md of an adapter: what it is, how to use it, and what was measured."""
    metrics, data = record.get("metrics") or {}, record.get("data") or {}
    quant, targets = record.get("quant"), config["target_modules"]
    targets = targets.split("|") if isinstance(targets, str) else targets
    lines = [
        "---",
        f"base_model: {config['base_model_name_or_path']}",
        "library_name: peft",
        "tags: [lora, lorafit]",
        "---",
        "",
        f"# LoRA adapter for {config['base_model_name_or_path']}",
        "",
        f"Rank {config['r']}, alpha {config['lora_alpha']:g}{' (rsLoRA)' if config['use_rslora'] else ''}, on "
        f"{', '.join(sorted({name.rpartition('.')[2] for name in targets}))}. The base was held in "
        + (f"{quant['type']} (block size {quant['block_size']}, " if quant else "16 or 32 bits.")
        + (f"double quantization {'on' if quant['double_quant'] else 'off'}) in training." if quant else ""),
    ]
    if data:
        lines += ["", f"Trained on `{data.get('path')}`: {data.get('train_examples')} examples."]
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    if after:
        lines += ["", "| held out | base | with the adapter |", "|---|---|---|"]
        lines += [f"| {key} | {_number(before.get(key))} | {_number(value)} |" for key, value in after.items()]
    retention = metrics.get("retention") or {}
    if retention:
        lines += [
            "",
            f"On text that has nothing to do with the task, perplexity went from "
            f"{_number(retention['perplexity_adapter_off'])} to {_number(retention['perplexity_adapter_on'])} "
            f"(KL divergence {_number(retention['kl'])} nats per token).",
        ]
    lines += [
        "",
        "```python",
        "from peft import PeftModel",
        "model = PeftModel.from_pretrained(base_model, folder)",
        "```",
        "",
        f"Recipe, versions and hashes are in `{PROVENANCE}`.",
        "",
    ]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, int | float) else str(value)
