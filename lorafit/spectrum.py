"""How much rank an adapter uses: the singular values of each update (alpha / rank) · B A, and smaller adapters.

    values = spectrum(layer)                 singular values, largest first
    with Trial(model) as trial:              many ranks, measured on the model itself
        trial.keep(rank=4)
    cut(model, rank=4)                       or cut(model, energy=0.99): smaller factors in the tree for good

No update is ever formed as a full matrix: with B = Q_B R_B and Aᵀ = Q_A R_A, the update is Q_B (R_B R_Aᵀ) Q_Aᵀ, and
the singular values are those of the small matrix in the middle. The best update of a lower rank keeps the largest of
them (Eckart and Young 1936); nothing else of the layer changes, its scaling included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.errors import InputError
from lorafit.inject import adapter_modules, lora_layers
from lorafit.lora import LoRAEmbedding, LoRALinear

VISIBLE = 0.01  # the share of the largest singular value from which a direction counts in the effective rank
_ROUNDING = 1e-12  # of the energy: what float32 factors leave in directions that are not there


def spectrum(layer: LoRALinear | LoRAEmbedding) -> Tensor:
    """The singular values of the layer's update, [rank] in float64 on the CPU, largest first.

    Raises InputError for factors that are not finite.
    """
    return _decompose(layer)[1].cpu() * layer.scaling


def energy(values: Tensor) -> list[float]:
    """The share of the update's squared norm that its first 1, 2, … directions hold; all ones for a zero update."""
    squares = values.double() ** 2
    total = float(squares.sum())
    return [min(1.0, float(share)) for share in squares.cumsum(0) / total] if total else [1.0] * len(values)


def effective_rank(values: Tensor) -> int:
    """How many singular values are above 1 % of the largest; 0 for a zero update."""
    return int((values > VISIBLE * values.max()).sum())


def rank_for_energy(values: Tensor, share: float) -> int:
    """The fewest directions that hold `share` of the energy; 0 for a zero update.

    Raises InputError for a share outside of (0, 1].
    """
    check_energy(share)
    if not bool(values.any()):
        return 0
    return 1 + next(index for index, held in enumerate(energy(values)) if held >= share - _ROUNDING)


def check_energy(share: Any) -> None:
    """Raise InputError unless `share` is a share that can be kept."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise InputError(f"energy is the share of the update to keep, in (0, 1], got {share!r}")


def truncated(layer: LoRALinear | LoRAEmbedding, rank: int) -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) whose product with the layer's scaling is the best of that rank.

    The singular values are shared evenly between the two, so that neither is much larger than the other. Raises
    InputError for a rank outside of 1 … layer.rank.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= layer.rank:
        raise InputError(f"an adapter of rank {layer.rank} is cut to a rank of 1 to {layer.rank}, not {rank!r}")
    rotated_A, rotated_B = _rotated(layer)
    return rotated_A[:rank].contiguous(), rotated_B[:, :rank].contiguous()


@torch.no_grad()
def cut(model: nn.Module, *, rank: int | None = None, energy: float | None = None) -> dict[str, int]:
    """Replace the LoRA layers of `model`, in place, by smaller ones over the same base layers; return their ranks.

    rank: for every layer; one that has less stays as it is. energy: each layer keeps the fewest directions that hold
    this share of its own update, and at least one. Modules trained whole and biases stay. Raises InputError for
    neither or both, for a rank above every layer's, and for a share outside of (0, 1]; then nothing has changed.
    """
    layers = lora_layers(model)
    ranks = chosen_ranks(model, {name: spectrum(layer) for name, layer in layers.items()}, rank=rank, energy=energy)
    smaller = {id(layer): _smaller(layer, ranks[name]) for name, layer in layers.items() if ranks[name] != layer.rank}
    for name, module in adapter_modules(model).items():
        if id(module) in smaller:
            model.set_submodule(name, smaller[id(module)])
    return ranks


def chosen_ranks(
    model: nn.Module, spectra: dict[str, Tensor], *, rank: int | None = None, energy: float | None = None
) -> dict[str, int]:
    """The rank that each LoRA layer gets when the model is cut to a rank or to a share of the energy (see `cut`)."""
    layers = lora_layers(model)
    if not layers:
        raise InputError("the model has no LoRA layers to cut: load an adapter first")
    if (rank is None) == (energy is None):
        raise InputError("an adapter is cut to a rank or to a share of its energy: give one of rank and energy")
    if rank is not None:
        highest = max(layer.rank for layer in layers.values())
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= highest:
            raise InputError(f"an adapter of rank {highest} is cut to a rank of 1 to {highest}, not {rank!r}")
        return {name: min(rank, layer.rank) for name, layer in layers.items()}
    assert energy is not None
    return {name: max(1, rank_for_energy(spectra[name], energy)) for name in layers}


class Trial:
    """A context in which the adapter of a model can be cut again and again; afterwards every bit is as it was.

    Each product is decomposed once. `keep` then swaps smaller factors in, which compute as those of `cut` do.
    spectra: the singular values of each LoRA layer by name, as `spectrum` gives them. ranks: those of the layers
    themselves.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = lora_layers(model)
        self.ranks = {name: layer.rank for name, layer in self.layers.items()}
        self._sizes = {
            name: (layer.lora_A.weight.numel() + layer.lora_B.weight.numel()) // layer.rank
            for name, layer in self.layers.items()
        }
        self.spectra: dict[str, Tensor] = {}
        self._own = {name: (layer.lora_A.weight.data, layer.lora_B.weight.data) for name, layer in self.layers.items()}
        self._rotated: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in self.layers.items():
            parts = _decompose(layer)
            self.spectra[name] = parts[1].cpu() * layer.scaling
            self._rotated[name] = _rotated(layer, parts)

    def keep(self, *, rank: int | None = None, energy: float | None = None) -> dict[str, int]:
        """Let the model compute with the adapter cut so (see `cut`); return the rank of each layer."""
        self.restore()  # the layers' own ranks are what is asked for
        ranks = chosen_ranks(self.model, self.spectra, rank=rank, energy=energy)
        for name, layer in self.layers.items():
            if ranks[name] != layer.rank:  # a layer that is not cut keeps its own factors
                rotated_A, rotated_B = self._rotated[name]
                layer.lora_A.weight.data = rotated_A[: ranks[name]].contiguous()
                layer.lora_B.weight.data = rotated_B[:, : ranks[name]].contiguous()
        return ranks

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """How many parameters the layers of these names have at these ranks."""
        return sum(self._sizes[name] * rank for name, rank in ranks.items())

    def restore(self) -> None:
        """Put the adapter's own factors back: the same memory, so the same bits."""
        for name, layer in self.layers.items():
            layer.lora_A.weight.data, layer.lora_B.weight.data = self._own[name]

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def _decompose(layer: LoRALinear | LoRAEmbedding) -> tuple[Tensor, Tensor, Tensor]:
    """(U [out, rank], S [rank], Vᵀ [rank, in]) of B A in float64, filled up with zeros where the layer is thinner than
    its rank."""
    A, B = (factor.value().detach() for factor in (layer.lora_A, layer.lora_B))
    if A.device.type == "mps":  # which has no float64
        A, B = A.cpu(), B.cpu()
    A, B = A.double(), B.double()
    if not bool(torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise InputError("a LoRA layer holds values that are not finite: this adapter diverged and cannot be cut")
    left, upper = torch.linalg.qr(B)
    right, lower = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    missing = layer.rank - len(S)
    pad = nn.functional.pad
    return pad(left @ U, (0, missing)), pad(S, (0, missing)), pad(Vh @ right.T, (0, 0, 0, missing))


def _rotated(layer: LoRALinear | LoRAEmbedding, parts: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(A, B) of the same product, in the layer's own dtype, whose directions are its singular vectors in order."""
    U, S, Vh = parts or _decompose(layer)
    root = S.sqrt()
    return (root[:, None] * Vh).to(layer.lora_A.weight), (U * root).to(layer.lora_B.weight)


def _smaller(layer: LoRALinear | LoRAEmbedding, rank: int) -> LoRALinear | LoRAEmbedding:
    """A layer of the same class over the same base, with the same scaling."""
    alpha = layer.scaling * (rank if layer.variant == "lora" else math.sqrt(rank))
    options: dict[str, Any] = {"variant": layer.variant, "dtype": layer.lora_A.weight.dtype}
    options["adapter_dtype"] = getattr(layer.lora_A, "kind", "float32")
    made: LoRALinear | LoRAEmbedding
    if isinstance(layer, LoRAEmbedding):
        made = LoRAEmbedding(layer.base_layer, rank, alpha, **options)
    else:
        made = LoRALinear(layer.base_layer, rank, alpha, getattr(layer.dropout, "p", 0.0), **options)
    for factor, values in zip((made.lora_A, made.lora_B), truncated(layer, rank), strict=True):
        factor.weight.copy_(values)
        factor.weight.requires_grad_(layer.lora_A.weight.requires_grad)
    return made.train(layer.training)
