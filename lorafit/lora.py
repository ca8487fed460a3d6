"""The layer: a frozen linear map beside which a product of two thin matrices is trained.

    LoRA (Hu et al. 2021, arXiv:2106.09685), section 4.1:   h = W x + (alpha / rank) · B A x

              x ──────────────┬───────────────────┐
                              │                   │ dropout
                        W [out, in]          A [rank, in]      kaiming-uniform
                          frozen             B [out, rank]     zero, so that training starts at W
                              │                   │ · scaling
                              └─────── + ─────────┘

One class serves every linear base: it calls the layer that it wraps and never asks how the weight is stored.
`LoRAEmbedding` is the same equation where x is a one-hot row, and `TrainedCopy` a module that is trained whole beside
its frozen original. A and B are kept in float32 and multiplied in the dtype in which the base computes.
Merging returns a new plain layer and leaves this one as it was.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lorafit.errors import InputError, did_you_mean
from lorafit.quant import compute_dtype, dequantize, features, is_linear, is_quantized, plain_dtype, plain_layer
from lorafit.rounding import straight_through

VARIANTS = ("lora", "rslora")
ADAPTER_DTYPES = ("float32", "int8", "nf4")


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

    def value(self) -> Tensor:
        """The matrix as it multiplies."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.value().to(x.dtype))


class RoundedFactor(Factor):
    """A factor that multiplies as 8 or 4 bits will hold it; its gradient goes straight through to the float32 weight,
    as if nothing had been rounded (the straight-through estimator, arXiv:1308.3432)."""

    def __init__(self, in_features: int, out_features: int, *, kind: str, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        self.kind = kind

    def value(self) -> Tensor:
        return straight_through(self.weight, self.kind)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rounded to {self.kind}"


def make_factor(in_features: int, out_features: int, adapter_dtype: str, **options: Any) -> Factor:
    """A factor whose values are float32, or rounded to int8 or nf4 each time they are used."""
    if adapter_dtype not in ADAPTER_DTYPES:
        hint = did_you_mean(adapter_dtype, ADAPTER_DTYPES)
        raise InputError(f"adapter_dtype must be one of {', '.join(ADAPTER_DTYPES)}, got {adapter_dtype!r}.{hint}")
    if adapter_dtype == "float32":
        return Factor(in_features, out_features, **options)
    return RoundedFactor(in_features, out_features, kind=adapter_dtype, **options)


class _Wrapper(nn.Module):
    """What LoRALinear and LoRAEmbedding share: the two factors, their scaling, and the update as one matrix."""

    def __init__(self, base_layer: Any, rank: int, alpha: float, variant: str) -> None:
        super().__init__()
        self.scaling = lora_scaling(rank, alpha, variant)
        self.rank, self.alpha, self.variant = rank, alpha, variant
        self.base_layer: Any = base_layer.requires_grad_(False)
        self.lora_A: Factor
        self.lora_B: Factor

    def _product(self) -> Tensor:
        """(alpha / rank) · B A, in float32 or wider."""
        wide = torch.promote_types(self.lora_A.weight.dtype, torch.float32)
        return (self.lora_B.value().detach().to(wide) @ self.lora_A.value().detach().to(wide)) * self.scaling

    # Models look at these of their layers (T5 asks for wo.weight.dtype).
    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:g}"


class LoRALinear(_Wrapper):
    """`base_layer(x) + lora_B(lora_A(dropout(x))) * scaling`, with base_layer frozen.

    base_layer: nn.Linear, transformers' Conv1D, or bitsandbytes' Linear4bit or Linear8bitLt; x is [..., in_features].
    rank and alpha: positive. dropout: the probability with which an input of A is zeroed in training.
    variant: "lora" or "rslora" (see `lora_scaling`). dtype: in which A and B are kept. adapter_dtype: "float32", or
    "int8" or "nf4" to round them so each time they multiply. Raises InputError naming the value that is not possible.
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
        adapter_dtype: str = "float32",
    ) -> None:
        if not is_linear(base_layer):
            raise InputError(f"LoRA wraps linear layers, not {type(base_layer).__name__}")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
            raise InputError(f"dropout must be a number in [0, 1), got {dropout!r}")
        super().__init__(base_layer, rank, alpha, variant)
        in_features, out_features = features(base_layer)
        device = base_layer.weight.device
        self.lora_A = make_factor(in_features, rank, adapter_dtype, device=device, dtype=dtype)
        self.lora_B = make_factor(rank, out_features, adapter_dtype, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.reset_parameters()
        self.train(base_layer.training)

    def reset_parameters(self) -> None:
        """A kaiming-uniform as in the authors' code, B zero (section 4.1): the update starts at exactly zero."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        return result + self.update(x).to(result.dtype)

    def update(self, x: Tensor) -> Tensor:
        """(alpha / rank) · B A x, in the dtype in which the base multiplies."""
        x = x.to(compute_dtype(self.base_layer, x))
        return self.lora_B(self.lora_A(self.dropout(x))) * self.scaling

    def delta_weight(self) -> Tensor:
        """The update (alpha / rank) · B A as a dense [out_features, in_features] tensor, in float32 or wider."""
        return self._product()

    def merge(self) -> nn.Module:
        """A new plain layer holding W + (alpha / rank) · B A; a quantized W is taken as dequantized.

        It has the dtype that the base had before quantization, so that it fits where the base stood. The sum is
        rounded once. This layer stays as it was.
        """
        weight = dequantize(self.base_layer) + self.delta_weight()
        return plain_layer(self.base_layer, weight.to(plain_dtype(self.base_layer)))

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return self.lora_A.in_features

    @property
    def out_features(self) -> int:
        return self.lora_B.out_features


class LoRAEmbedding(_Wrapper):
    """The same for a table of vectors: row i of the base plus (alpha / rank) · B A[:, i].

    base_layer: nn.Embedding of [num_embeddings, dim]; lora_A is [rank, num_embeddings] and starts at zero, lora_B is
    [dim, rank] and starts normal, as in the authors' code. Nothing is dropped out: x is a number. A base that scales
    its output (`embed_scale`, Gemma) scales the update alike. Raises InputError as LoRALinear does.
    """

    def __init__(
        self,
        base_layer: nn.Embedding,
        rank: int,
        alpha: float,
        *,
        variant: str = "lora",
        dtype: torch.dtype = torch.float32,
        adapter_dtype: str = "float32",
    ) -> None:
        if not isinstance(base_layer, nn.Embedding):
            raise InputError(f"LoRAEmbedding wraps an nn.Embedding, not {type(base_layer).__name__}")
        super().__init__(base_layer, rank, alpha, variant)
        device = base_layer.weight.device
        self.lora_A = make_factor(base_layer.num_embeddings, rank, adapter_dtype, device=device, dtype=dtype)
        self.lora_B = make_factor(rank, base_layer.embedding_dim, adapter_dtype, device=device, dtype=dtype)
        nn.init.zeros_(self.lora_A.weight)
        nn.init.normal_(self.lora_B.weight)
        self.train(base_layer.training)

    def forward(self, ids: Tensor) -> Tensor:
        result = self.base_layer(ids)
        return result + self.update(ids).to(result.dtype)

    def update(self, ids: Tensor) -> Tensor:
        """(alpha / rank) · B A[:, ids], in float32 or wider."""
        columns = F.embedding(ids, self.lora_A.value().T, self.base_layer.padding_idx)
        return self.lora_B(columns) * self.scaling * getattr(self.base_layer, "embed_scale", 1.0)

    def delta_weight(self) -> Tensor:
        """The update as a dense [num_embeddings, dim] tensor, in float32 or wider."""
        return self._product().T

    def merge(self) -> nn.Embedding:
        """A new embedding of the base's kind and dtype, holding W + ((alpha / rank) · B A)ᵀ rounded once."""
        weight = (self.base_layer.weight.detach() + self.delta_weight()).to(self.base_layer.weight.dtype)
        merged = copy.copy(self.base_layer)
        merged._parameters = {"weight": nn.Parameter(weight.contiguous(), requires_grad=False)}
        return merged.train(self.training)

    @property
    def num_embeddings(self) -> int:
        return self.lora_A.in_features

    @property
    def embedding_dim(self) -> int:
        return self.lora_B.out_features

    @property
    def padding_idx(self) -> int | None:
        return self.base_layer.padding_idx


class TrainedCopy(nn.Module):
    """A module that is trained whole (peft's modules_to_save): the frozen original, and a float32 copy that is used.

    The copy computes in float32 and gives back the dtype that came in, or the original's where ids came in. A
    quantized layer is copied as dequantized. Raises InputError where something quantized lies deeper inside.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if any(is_quantized(module) for module in base_layer.modules() if module is not base_layer):
            raise InputError(
                f"a {type(base_layer).__name__} that holds quantized layers cannot be trained whole: name those layers "
                "themselves in modules_to_save, or choose quant=none"
            )
        if is_linear(base_layer):
            trained = plain_layer(base_layer, dequantize(base_layer).clone())
        else:
            trained = copy.deepcopy(base_layer)
        self.dtype = plain_dtype(base_layer) if is_linear(base_layer) else next(base_layer.parameters()).dtype
        self.base_layer = base_layer.requires_grad_(False)
        self.trained = trained.float().requires_grad_(True)
        self.train(base_layer.training)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        given = [x for x in tree_leaves((inputs, named)) if isinstance(x, Tensor) and x.is_floating_point()]
        inputs, named = _cast((inputs, named), torch.float32)
        return _cast(self.trained(*inputs, **named), given[0].dtype if given else self.dtype)

    def merge(self) -> nn.Module:
        """The trained module as a plain one, in the dtype of the original. This one stays as it was."""
        return copy.deepcopy(self.trained).to(self.dtype).requires_grad_(False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what a model asks of its head or its embedding: weight, num_embeddings, …
            return getattr(super().__getattr__("trained"), name)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors among nested values in another dtype."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, values)


LoRALayer = (LoRALinear, LoRAEmbedding)
