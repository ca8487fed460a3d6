"""Which base is this? A hash by which an adapter knows the model that it was trained on.

It is taken over the names and shapes of all parameters and a few values of each, before anything is quantized, so
that the same model in 16, 8 or 4 bits has one fingerprint, and another model of the same shape another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

SAMPLES = 64


class Fingerprint:
    """Takes in the parameters of a model one by one, in any order, while each is there."""

    def __init__(self) -> None:
        self._seen: dict[str, bytes] = {}

    def see(self, name: str, parameter: Tensor) -> None:
        """Note the shape and 64 evenly spaced values of a parameter. Floating values are noted as bfloat16, to which a
        model may have been rounded when it was loaded."""
        flat = parameter.detach().flatten()
        places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        sample = flat[places.to(flat.device)].cpu()
        sample = sample.to(torch.bfloat16) if sample.is_floating_point() else sample
        values = sample.contiguous().view(torch.uint8).numpy().tobytes()
        self._seen[name] = f"{name} {tuple(parameter.shape)}".encode() + values

    def __contains__(self, name: str) -> bool:
        return name in self._seen

    def hexdigest(self, names: Iterable[str]) -> str:
        """The SHA-256 of what was seen under these names, in their order by the alphabet."""
        return hashlib.sha256(b"".join(self._seen[name] for name in sorted(names))).hexdigest()


def fingerprint_of(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """The fingerprint of all parameters of a model: a SHA-256 over their names, shapes and 64 values of each."""
    fingerprint, names = Fingerprint(), []
    for name, parameter in parameters:
        fingerprint.see(name, parameter)
        names.append(name)
    return fingerprint.hexdigest(names)
