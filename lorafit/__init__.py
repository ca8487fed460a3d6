"""lorafit: fine-tuning of language models with LoRA and QLoRA that says what will happen and proves what did.

    model = lorafit.load_base_model("embedded", quant="nf4")
    lorafit.inject_lora(model, rank=16, alpha=32)
    lorafit.mark_only_lora_as_trainable(model)

The names below are the public surface. Each is imported when it is first used, so that `import lorafit`, a typing
error on the command line and `--help` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafit.adapter import load_adapter, save_adapter
    from lorafit.callbacks import PagedOptimizerMemory
    from lorafit.datamodule import FinetuneDataModule
    from lorafit.errors import DivergedError, InputError, LorafitError, MemoryExhausted
    from lorafit.inject import (
        count_parameters,
        inject_lora,
        load_lora_state_dict,
        lora_state_dict,
        mark_only_lora_as_trainable,
        merge_lora,
        unmerge_lora,
    )
    from lorafit.loading import load_base_model
    from lorafit.lora import LoRAEmbedding, LoRALinear
    from lorafit.module import FinetuneModule
    from lorafit.quant import dequantize
    from lorafit.serving import Adapters

_HOME = {
    "Adapters": "serving",
    "DivergedError": "errors",
    "FinetuneDataModule": "datamodule",
    "FinetuneModule": "module",
    "InputError": "errors",
    "LoRAEmbedding": "lora",
    "LoRALinear": "lora",
    "LorafitError": "errors",
    "MemoryExhausted": "errors",
    "PagedOptimizerMemory": "callbacks",
    "count_parameters": "inject",
    "dequantize": "quant",
    "inject_lora": "inject",
    "load_adapter": "adapter",
    "load_base_model": "loading",
    "load_lora_state_dict": "inject",
    "lora_state_dict": "inject",
    "mark_only_lora_as_trainable": "inject",
    "merge_lora": "inject",
    "save_adapter": "adapter",
    "unmerge_lora": "inject",
}

__all__ = [
    "Adapters",
    "DivergedError",
    "FinetuneDataModule",
    "FinetuneModule",
    "InputError",
    "LoRAEmbedding",
    "LoRALinear",
    "LorafitError",
    "MemoryExhausted",
    "PagedOptimizerMemory",
    "count_parameters",
    "dequantize",
    "inject_lora",
    "load_adapter",
    "load_base_model",
    "load_lora_state_dict",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge_lora",
    "save_adapter",
    "unmerge_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lorafit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lorafit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
