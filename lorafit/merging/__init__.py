"""Merging: an adapter becomes part of the weights, by the way that costs least, and out of them again.

    base = open_base("embedded", quant="nf4", load_whole=…)        base.py        the base, read piece by piece
    load_adapter(base.model, folder)
    for candidate in candidates(base): …                           candidates.py  what may be written
    measure_merge(base.model, {name: merged_model(…)}, batches)    measure.py     what each costs
    write_merged(candidate, out, …)                                folder.py      a plain model folder
    unmerge_folder(merged, adapter, …)                             folder.py, undo.py   back, bit for bit

For a model in memory there are `merged(model)`, a context in which its layers are plain and as fast as a base's, and
`unmerge_lora`, which it ends with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lorafit.errors import InputError
from lorafit.inject import adapter_modules
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
    "fold_lora",
    "make_candidate",
    "measure_merge",
    "merged",
    "merged_model",
    "open_base",
    "require_new",
    "size",
    "unmerge_folder",
    "unmerge_lora",
    "write_merged",
]


def fold_lora(model: nn.Module) -> dict[str, Any]:
    """Put merged plain layers in the place of the adapter's modules, in place; return those, for `unmerge_lora`.

    Raises InputError when the model has no adapter.
    """
    modules = adapter_modules(model)
    if not modules:
        raise InputError("the model has no adapter to merge")
    plain: dict[int, nn.Module] = {}
    for name, module in modules.items():
        if id(module) not in plain:
            plain[id(module)] = module.merge()
        model.set_submodule(name, plain[id(module)])
    return modules


def unmerge_lora(model: nn.Module, modules: Mapping[str, Any]) -> None:
    """Undo `fold_lora` exactly: nothing is subtracted, the layers that were set aside come back."""
    for name, module in modules.items():
        module.train(model.get_submodule(name).training)
        model.set_submodule(name, module)


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model's layers are merged and plain; afterwards it is exactly as it was."""
    modules = fold_lora(model)
    try:
        yield model
    finally:
        unmerge_lora(model, modules)
