"""The layer: a frozen linear map beside which a product of two thin matrices is trained.

    LoRA (Hu et al. 2021, arXiv:2106.09685), section 4.1:   h = W x + (alpha / rank) · B A x

              x ──────────────┬───────────────────┐
                              │                   │ dropout
                        W [out, in]          A [rank, in]      kaiming-uniform
                          frozen             B [out, rank]     zero, so that training starts at W
                              │                   │ · scaling
                              └─────── + ─────────┘

One class serves every base: it calls the layer that it wraps and never asks how the weight is stored.
A and B are kept in float32 and multiplied in the dtype in which the base computes. Merging returns
a new plain layer and leaves this one as it was.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.errors import InputError, did_you_mean
from lorafit.quant import compute_dtype, dequantize, features, is_linear, plain_dtype, plain_layer

VARIANTS = ("lora", "rslora")


def lora_scaling(rank: Any, alpha: Any, variant: str = "lora") -> float:
    """The factor before B·A: alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA (arXiv:2312.03732)."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"rank must be a positive integer, got {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise InputError(f"alpha must be a positive number, got {alpha!r}")
    if variant not in VARIANTS:
        raise InputError(
            f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}.{did_you_mean(variant, VARIANTS)}"
        )
    return float(alpha) / (rank if variant == "lora" else math.sqrt(rank))


class Factor(nn.Linear):
    """One of the two thin matrices: a linear layer without bias that multiplies in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class LoRALinear(nn.Module):
    """`base_layer(x) + lora_B(lora_A(dropout(x))) * scaling`, with base_layer frozen.

    base_layer: nn.Linear, transformers' Conv1D, or bitsandbytes' Linear4bit or Linear8bitLt; x is [..., in_features].
    rank and alpha: positive. dropout: the probability with which an input of A is zeroed in training.
    variant: "lora" or "rslora" (see `lora_scaling`). dtype: in which A and B are kept.
    Raises InputError naming the value that is not possible.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        variant: str = "lora",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not is_linear(base_layer):
            raise InputError(f"LoRA wraps linear layers, not {type(base_layer).__name__}")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
            raise InputError(f"dropout must be a number in [0, 1), got {dropout!r}")
        self.scaling = lora_scaling(rank, alpha, variant)
        self.rank, self.alpha, self.variant = rank, alpha, variant
        in_features, out_features = features(base_layer)
        device = base_layer.weight.device
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = Factor(in_features, rank, device=device, dtype=dtype)
        self.lora_B = Factor(rank, out_features, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.reset_parameters()
        self.train(base_layer.training)

    def reset_parameters(self) -> None:
        """A kaiming-uniform as in the authors' code, B zero (section 4.1): the update starts at exactly zero."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        update = self.lora_B(self.lora_A(self.dropout(x.to(compute_dtype(self.base_layer, x)))))
        return result + (update * self.scaling).to(result.dtype)

    def delta_weight(self) -> Tensor:
        """The update (alpha / rank) · B A as a dense [out_features, in_features] tensor, in float32 or wider."""
        wide = torch.promote_types(self.lora_A.weight.dtype, torch.float32)
        return (self.lora_B.weight.detach().to(wide) @ self.lora_A.weight.detach().to(wide)) * self.scaling

    def merge(self) -> nn.Module:
        """A new plain layer holding W + (alpha / rank) · B A; a quantized W is taken as dequantized.

        It has the dtype that the base had before quantization, so that it fits where the base stood. The sum is
        rounded once. This layer stays as it was.
        """
        weight = dequantize(self.base_layer) + self.delta_weight()
        return plain_layer(self.base_layer, weight.to(plain_dtype(self.base_layer)))

    # Models look at these of their linear layers (T5 asks for wo.weight.dtype).
    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        return self.lora_A.in_features

    @property
    def out_features(self) -> int:
        return self.lora_B.out_features

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:g}"
