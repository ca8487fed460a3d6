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


def fingerprint_of(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A SHA-256 over the names, the shapes and 64 evenly spaced values of each parameter, in the order of the names.

    Floating values are compared as bfloat16, to which a model may have been rounded when it was loaded.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters, key=lambda entry: entry[0]):
        flat = parameter.detach().flatten()
        places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        sample = flat[places.to(flat.device)].cpu()
        sample = sample.to(torch.bfloat16) if sample.is_floating_point() else sample
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
