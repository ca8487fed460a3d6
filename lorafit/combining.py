"""Several adapters made into one, over the same base.

    "cat"      the weighted sum of the updates, Σ wᵢ ΔWᵢ, exactly: factors side by side, so their ranks add up
    "svd"      the same sum at a lower rank: its best approximation (Eckart and Young 1936)
    "linear"   the factors averaged, as peft's add_weighted_adapter(combination_type="linear") does: of equal ranks, and
               cheap, but not the sum of the updates, since (Σ B)(Σ A) also holds each B times every other A

All weights may be negative: -1 takes away what an adapter adds. A layer that only some of the adapters have counts as
zero in the others. No update is ever formed as a full matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import InputError, did_you_mean
from lorafit.inject import Adapter
from lorafit.lora import LoRAEmbedding, LoRALinear, TrainedCopy
from lorafit.spectrum import truncated

METHODS = ("linear", "cat", "svd")
Layer = LoRALinear | LoRAEmbedding


@torch.no_grad()
def combine(adapters: Sequence[Adapter], weights: Sequence[float], method: str, rank: int | None = None) -> Adapter:
    """One adapter out of several of one model, with a scaling of 1, over the same base layers.

    weights: one for each. rank: of "svd" alone; by default each layer gets the largest that one of the adapters has
    there, and never more than their sum, at which nothing is lost. The adapters stay as they are.
    Raises InputError for weights that do not fit, a rank that cannot be, "linear" over unequal ranks, modules trained
    whole or trained biases, and for adapters of another base.
    """
    _check(adapters, weights, method, rank)
    places = dict.fromkeys(place for adapter in adapters for place in adapter.modules)
    made: dict[tuple[Any, ...], Layer] = {}
    combined: dict[str, Any] = {}
    for place in places:
        terms = [
            (adapter.modules[place], float(weight))
            for adapter, weight in zip(adapters, weights, strict=True)
            if place in adapter.modules
        ]
        if any(layer.base_layer is not terms[0][0].base_layer for layer, _ in terms):
            raise InputError(f"the adapters are not of one model: {place} is another layer in each")
        key = tuple(id(layer) for layer, _ in terms)  # one module under two names stays one
        if key not in made:
            made[key] = _combined(place, terms, method, rank)
        combined[place] = made[key]
    return Adapter(combined)


def _check(adapters: Sequence[Adapter], weights: Sequence[float], method: str, rank: Any) -> None:
    if method not in METHODS:
        raise InputError(
            f"combine.method must be one of {', '.join(METHODS)}, got {method!r}.{did_you_mean(method, METHODS)}"
        )
    if not adapters or len(weights) != len(adapters):
        raise InputError(f"combine.weights must be one number for each adapter: {len(weights)} for {len(adapters)}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise InputError(f"combine.weights must be finite numbers, got {weight!r}")
    if rank is not None and method != "svd":
        raise InputError(
            f"combine.rank belongs to svd: {method} has the ranks of its adapters. Take combine.method=svd"
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise InputError(f"combine.rank must be a positive integer, got {rank!r}")
    whole = [
        place for adapter in adapters for place, module in adapter.modules.items() if isinstance(module, TrainedCopy)
    ]
    if unable := [*whole, *(name for adapter in adapters for name in adapter.biases)]:
        more = f" and {len(unable) - 3} more" if len(unable) > 3 else ""
        raise InputError(
            f"only A and B can be combined: {', '.join(unable[:3])}{more} is trained whole (modules_to_save, bias)"
        )


def _combined(place: str, terms: Sequence[tuple[Layer, float]], method: str, rank: int | None) -> Layer:
    factors = [_factors(layer) for layer, _ in terms]
    scales = [weight * layer.scaling for layer, weight in terms]
    ranks = [layer.rank for layer, _ in terms]
    if method == "linear":
        if len(set(ranks)) > 1:
            raise InputError(
                f"combine.method=linear: {place} has the ranks {', '.join(map(str, ranks))}. It averages the factors "
                "(which is not the sum of the updates), so they must be alike: take cat or svd, which are that sum"
            )
        A = sum(math.copysign(math.sqrt(abs(scale)), scale) * A for scale, (A, _) in zip(scales, factors, strict=True))
        B = sum(math.sqrt(abs(scale)) * B for scale, (_, B) in zip(scales, factors, strict=True))
        return _layer(terms[0][0], A, B)
    exact = _layer(
        terms[0][0],
        torch.cat([scale * A for scale, (A, _) in zip(scales, factors, strict=True)]),
        torch.cat([B for _, B in factors], dim=1),
    )
    wanted = max(ranks) if rank is None else rank
    if method == "cat" or wanted >= exact.rank:
        return exact
    return _layer(exact, *truncated(exact, wanted))


def _factors(layer: Layer) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] as they multiply, in float64 on the CPU: some devices have none."""
    return layer.lora_A.value().detach().cpu().double(), layer.lora_B.value().detach().cpu().double()


def _layer(like: Layer, A: Any, B: Any) -> Layer:
    """A layer over the same base with these factors and a scaling of 1."""
    rank = A.shape[0]
    kind = LoRAEmbedding if isinstance(like, LoRAEmbedding) else LoRALinear
    made: Layer = kind(like.base_layer, rank, rank)
    made.lora_A.weight.copy_(A)
    made.lora_B.weight.copy_(B)
    made.requires_grad_(False)
    return made
