"""Merging: an adapter becomes part of the weights, by the way that costs least, and out of them again.

    base = open_base("embedded", quant="nf4", load_whole=…)        base.py        the base, read piece by piece
    load_adapter(base.model, folder)
    for candidate in candidates(base): …                           candidates.py  what may be written
    measure_merge(base.model, {name: merged_model(…)}, batches)    measure.py     what each costs
    write_merged(candidate, out, …)                                folder.py      a plain model folder
    unmerge_folder(merged, adapter, …)                             folder.py, undo.py   back, bit for bit

For a model in memory there is `merged(model)`, a context in which its layers are plain and as fast as a base's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from lorafit.errors import InputError
from lorafit.inject import adapter_modules, merge_lora, unmerge_lora
from lorafit.merging.base import Base, open_base
from lorafit.merging.candidates import CANDIDATES, Candidate, candidates, make_candidate, merged_model
from lorafit.merging.files import size
from lorafit.merging.folder import require_new, unmerge_folder, write_merged
from lorafit.merging.measure import measure_merge

__all__ = [
    "CANDIDATES",
    "Base",
    "Candidate",
    "candidates",
    "make_candidate",
    "measure_merge",
    "merged",
    "merged_model",
    "open_base",
    "require_new",
    "size",
    "unmerge_folder",
    "write_merged",
]


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model's layers are merged and plain; afterwards it is exactly as it was."""
    if not adapter_modules(model):
        raise InputError("the model has no adapter to merge")
    merge_lora(model, keep=True)
    try:
        yield model
    finally:
        unmerge_lora(model)
