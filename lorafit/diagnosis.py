"""Where a number that is not finite comes from: the first module, in the order of the forward pass, that gives one out.

The batches of the step are computed once more, without gradient and in evaluation mode, in which the layers run as they
are written (fastpath.py) and nothing is dropped. So the answer names a layer, not a fused step. Nothing of the model is
changed, and no random number is used up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.lora import LoRAEmbedding
from lorafit.loss import supervised_loss
from lorafit.memory import tensors_in
from lorafit.quant import dequantize, is_quantized


@dataclass(frozen=True)
class Finding:
    """module: its name. weight: the first of its own parameters that is not finite, None where it is the input or the
    product that is not."""

    module: str
    weight: str | None
    from_input: bool

    def __str__(self) -> str:
        if self.weight is not None:
            return f"{self.module}, whose {self.weight} holds a number that is not finite"
        return f"{self.module}, whose input is not finite either" if self.from_input else self.module


class _Found(Exception):
    """Carries the finding out of the forward pass."""

    def __init__(self, finding: Finding) -> None:
        super().__init__()
        self.finding = finding


@torch.no_grad()
def first_nonfinite_module(model: nn.Module, batches: Iterable[Any]) -> Finding | None:
    """The first module whose output is not finite in the forward pass over the batches; None where all are."""
    hooks = []
    for name, module in model.named_modules():
        if name:
            watch = _watch(name.removesuffix(".base_layer"), model.get_submodule(name.rpartition(".")[0]))
            hooks.append(module.register_forward_hook(watch, with_kwargs=True))
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.eval()
            for batch in batches:
                supervised_loss(model, batch)
    except _Found as found:
        return found.finding
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return None


def _watch(name: str, around: nn.Module) -> Any:
    def look(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if all(_finite(tensor) for tensor in tensors_in(output)):
            return
        clean = all(_finite(tensor) for tensor in tensors_in((inputs, named)))
        if isinstance(around, LoRAEmbedding) and _bad_weight(around.lora_A) is not None:
            # whose rows are looked up, so that it has no output of its own
            raise _Found(Finding(f"{name.rpartition('.')[0]}.lora_A", _bad_weight(around.lora_A), False))
        raise _Found(Finding(name, _bad_weight(module), not clean))

    return look


def _bad_weight(module: nn.Module) -> str | None:
    if is_quantized(module) and not _finite(dequantize(module)):
        return "weight"
    for name, parameter in module.named_parameters(recurse=False):
        if not _finite(parameter):
            return name
    return None


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
