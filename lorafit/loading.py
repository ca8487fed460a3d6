"""The base: load a language model, frozen, with its linear weights in 16, 8 or 4 bits.

    model = load_base_model("embedded", quant="nf4")

The 16-bit model is read whole before it is quantized layer by layer; reading tensor by tensor, so that it is
never whole in memory, is not done here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from lorafit.embedded import MODEL as EMBEDDED_MODEL
from lorafit.errors import InputError, reason
from lorafit.fingerprint import fingerprint_of
from lorafit.quant import (
    BaseReport,
    Quantization,
    disarm_repacking,
    note_quantized,
    quantize_model,
    to_dtype,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resolve(name: str) -> str:
    """The hub id or folder behind a model name; "embedded" is the model inside the package."""
    return str(EMBEDDED_MODEL) if name == "embedded" else str(name)


def load_base_model(
    name: str,
    *,
    quant: Quantization | Mapping[str, Any] | str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    init: str = "pretrained",
    attention: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model, frozen, its linear layers quantized as asked.

    name: a hub id, a local folder or "embedded". quant: "nf4", "fp4", "int8", a mapping or `Quantization`, or
    None for 16 bits. dtype: of what is not quantized; None means the checkpoint's own, or the compute dtype of
    a quantized base. init: "random" builds from the configuration alone and reads no weights.
    What was quantized and what was not is in `base_report(model)`.
    Raises InputError when the model, its weights or a choice cannot be had.
    """
    quant = Quantization.of(quant)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = resolve(name)
    wanted = to_dtype(dtype)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    with _input_errors(name):
        config = AutoConfig.from_pretrained(source, **options)
        if attention not in (None, "auto"):
            options["attn_implementation"] = attention
        prequantized = getattr(config, "quantization_config", None) is not None
        if prequantized and quant is not None:
            raise InputError(
                f"model {name!r} comes quantized already: choose quant=none to use it as it is, "
                f"or the 16-bit model for quant={quant.type}"
            )
        if wanted is None and quant is not None:
            wanted = quant.compute_dtype
        if init == "random":
            wanted = wanted or getattr(config, "dtype", None) or torch.float32
            model = AutoModelForCausalLM.from_config(config, dtype=wanted, **options)
        elif init == "pretrained":
            _require_weights(name, source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=wanted or "auto",
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are an error below, with names
                **({"device_map": {"": str(device)}} if prequantized else {}),
                **options,
            )
            model, info = loaded
            missing = sorted(info["missing_keys"]) + sorted(str(item) for item in info["mismatched_keys"])
            if missing:
                raise InputError(
                    f"model {name!r}: {len(missing)} weights are missing from its files or have another shape, "
                    f"and would be random: {', '.join(missing[:3])}"
                )
        else:
            raise InputError(f"model.init must be pretrained or random, got {init!r}")
    model.requires_grad_(False)
    report = BaseReport(name=str(name), quant=quant)
    # codes of a model that was quantized elsewhere say nothing of its 16-bit weights, and float16 rounds otherwise
    told = not prequantized and (model.dtype != torch.float16 or getattr(config, "dtype", None) == torch.float16)
    if told and not any(parameter.is_meta for parameter in model.parameters()):
        report.fingerprint = fingerprint_of(model.named_parameters())
    if prequantized:
        note_quantized(model, report)
    if quant is not None:
        quantize_model(model, quant, device, report)
    model.to(device)
    disarm_repacking(model)
    model.config.use_cache = False  # packed examples would see each other through the cache
    model.lorafit_base = report
    return model.train()


def _require_weights(name: str, source: str) -> None:
    folder = Path(source).expanduser()
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        others = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
        found = f"; it holds {others[0]}, which lorafit does not open (pickle)" if others else ""
        raise InputError(
            f"model folder {name!r} has no *.safetensors weights{found}. "
            "Save the model with save_pretrained, or use model.init=random to begin from its configuration."
        )


@contextlib.contextmanager
def _input_errors(name: str) -> Iterator[None]:
    """Turn what transformers says about a model that is not there into one message of ours."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        folder = Path(resolve(name)).expanduser()
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise InputError(f"model folder {name!r} has no config.json: it is no model folder") from error
        raise InputError(f"model {name!r} cannot be loaded: {reason(error)}") from error
