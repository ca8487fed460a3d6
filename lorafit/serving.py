"""Several adapters over one base: switched without loading anything, or mixed within one batch.

    adapters = Adapters(model)                        the base, once
    adapters.load("law", "runs/law/adapter")
    adapters.load("tax", "runs/tax/adapter")
    adapters.use("law")                               model(...) is the base with this one
    with adapters.mixed(["law", "tax", None]):        model(...): a row for each, the last one the base's

An adapter that is not in use lies outside of the model, as `inject.Adapter`: its own small modules, each holding the
base's module that it belongs over. To switch is to put other modules at the same places of the tree, so the base's
memory stays where it is, and every further adapter costs its factors and nothing else.

In a mixed batch each layer computes its base once and every adapter's update for the whole batch, and then each row
takes its own. That multiplies matrices of the same shapes as when the batch runs under one adapter, so a row is, to the
bit, what it is there. (A base in 8 bits is the exception: which of its inputs count as outliers, and are multiplied in
16 bits, is decided over the whole batch.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.adapter import load_adapter
from lorafit.errors import InputError, did_you_mean
from lorafit.inject import Adapter, adapter_modules, attach_adapter, detach_adapter, trained_biases
from lorafit.lora import TrainedCopy


class Adapters:
    """The adapters of one model by name, at most one of them in use.

    model: a base without an adapter; it is changed in place by `use` and, for a while, by `mixed`. Raises InputError
    when it carries an adapter already. What is moved or cast with the model is the one in use alone.
    """

    def __init__(self, model: nn.Module) -> None:
        if adapter_modules(model) or trained_biases(model):
            raise InputError("the model carries an adapter already: take it out with detach_adapter, then add it here")
        self.model = model
        self._adapters: dict[str, Adapter] = {}
        self._used: str | None = None
        self._mixing = False

    @property
    def names(self) -> list[str]:
        """In the order in which they came."""
        return list(self._adapters)

    @property
    def used(self) -> str | None:
        """The name of the adapter in use; None for the base alone."""
        return self._used

    def load(self, name: str, folder: str | Path, *, allow_other_base: bool = False) -> None:
        """Read an adapter folder; what is in use stays in use. Raises InputError as `load_adapter` does, and for a name
        that is taken; then nothing has changed."""
        self._require_free(name)
        with self._base_alone():
            load_adapter(self.model, folder, allow_other_base=allow_other_base)
            self._adapters[name] = detach_adapter(self.model)

    def add(self, name: str, adapter: Adapter) -> None:
        """Take over an adapter of this model. Raises InputError for a name that is taken, and for another base."""
        self._require_free(name)
        with self._base_alone():
            for place, module in adapter.modules.items():
                if not _is_at(self.model, place, module.base_layer):
                    raise InputError(f"adapter {name!r} is not one of this model: {place} is another layer")
        self._adapters[name] = adapter

    def get(self, name: str) -> Adapter:
        """The adapter of that name, as it was when it was last out of use. Raises InputError when there is none."""
        return self._find(name)

    def use(self, name: str | None) -> None:
        """Let the model compute with this adapter; None: with the base alone, bit for bit.

        Raises InputError for a name that there is not; then nothing has changed.
        """
        self._require_not_mixing()
        if name is not None:
            self._find(name)
        if self._used is not None:
            # what was trained meanwhile is kept: the factors are the same tensors, biases come back with their values
            self._adapters[self._used] = detach_adapter(self.model)
            self._used = None
        if name is not None:
            attach_adapter(self.model, self._adapters[name])
            self._used = name

    def remove(self, name: str) -> Adapter:
        """Forget an adapter and give it back; if it is in use, the model is the base afterwards."""
        self._find(name)
        self._require_not_mixing()
        if self._used == name:
            self.use(None)
        return self._adapters.pop(name)

    @contextlib.contextmanager
    def mixed(self, rows: Sequence[str | None]) -> Iterator[None]:
        """A context in which row i of every batch is computed with the adapter rows[i]; None: with the base.

        The batches must have len(rows) rows; a cache keeps their order, so `model.generate` works without beams. What
        was in use before is in use again afterwards. Raises InputError for a name that there is not and for an adapter
        with trained biases, which are the base's own; and, when the model runs, for a batch of another size.
        """
        self._require_not_mixing()
        if not rows:
            raise InputError("a mixed batch needs the name of an adapter, or None, for each of its rows")
        chosen = {name: self._find(name) for name in dict.fromkeys(rows) if name is not None}
        for name, adapter in chosen.items():
            if adapter.biases:
                raise InputError(
                    f"adapter {name!r} has trained biases, which every row of a batch shares: it cannot be mixed with "
                    "others. Use it alone"
                )
        with self._base_alone():
            places = {place for adapter in chosen.values() for place in adapter.modules}
            # before anything is changed, since a block may stand in the tree under two names
            bases = {place: self.model.get_submodule(place) for place in places}
            # the innermost first: an adapter may train a whole block of which another one wraps a layer
            order = sorted(places, key=lambda place: -place.count("."))
            made: dict[Any, MixedRows] = {}
            self._mixing = True
            try:
                for place in order:
                    own = {name: adapter.modules.get(place) for name, adapter in chosen.items()}
                    # one module under two names stays one
                    key = (id(bases[place]), *map(id, own.values()))
                    if key not in made:
                        layers = [None if name is None else own[name] for name in rows]
                        made[key] = MixedRows(place, bases[place], layers)
                    self.model.set_submodule(place, made[key])
                yield
            finally:
                for place in reversed(order):
                    self.model.set_submodule(place, bases[place])
                self._mixing = False

    @contextlib.contextmanager
    def _base_alone(self) -> Iterator[None]:
        before = self.used
        self.use(None)
        try:
            yield
        finally:
            self.use(before)

    def _find(self, name: str) -> Adapter:
        if name not in self._adapters:
            known = f"There is {', '.join(self.names)}." if self._adapters else "None is loaded."
            raise InputError(f"no adapter {name!r}. {known}{did_you_mean(name, self.names)}")
        return self._adapters[name]

    def _require_free(self, name: str) -> None:
        self._require_not_mixing()
        if name in self._adapters:
            raise InputError(f"there is an adapter {name!r} already: remove it first, or take another name")

    def _require_not_mixing(self) -> None:
        if self._mixing:
            raise InputError("a mixed batch is being computed: adapters are changed after it")


def _is_at(model: nn.Module, place: str, module: nn.Module) -> bool:
    try:
        return model.get_submodule(place) is module
    except AttributeError:
        return False


class MixedRows(nn.Module):
    """A layer of the base of which every row of a batch has its own update.

    place: its name, for errors. rows: for each row the module of its adapter over this layer, or None for the base
    alone. The first dimension of the input is the rows; the result is as the base's. Raises InputError where it is not.
    """

    def __init__(self, place: str, base_layer: nn.Module, rows: Sequence[Any]) -> None:
        super().__init__()
        self.place, self.count = place, len(rows)
        self.base_layer = base_layer
        different = {id(layer): layer for layer in rows if layer is not None}
        self.layers = nn.ModuleList(different.values())
        self.of_layer = [[layer is own for own in rows] for layer in different.values()]
        self.train(base_layer.training)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        x = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
        if x is None or x.dim() == 0 or x.shape[0] != self.count:
            shape = None if x is None else list(x.shape)
            raise InputError(
                f"{self.place} is given {shape}, and its adapters are mixed for {self.count} rows: the batch has "
                "another size, or this model puts its rows together. Use one adapter at a time"
            )
        base = self.base_layer(*inputs, **named)
        result = base
        for layer, rows in zip(self.layers, self.of_layer, strict=True):
            if isinstance(layer, TrainedCopy):
                own = layer(*inputs, **named)
            else:
                own = base + layer.update(*inputs, **named).to(base.dtype)  # type: ignore[operator]
            if not isinstance(own, Tensor) or not isinstance(base, Tensor):
                raise InputError(f"{self.place} gives more than one tensor, whose rows cannot be mixed")
            mine = torch.tensor(rows, device=own.device).view(-1, *[1] * (own.dim() - 1))
            result = torch.where(mine, own, result)
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what a model asks of its layers: weight, bias, num_embeddings, …
            return getattr(super().__getattr__("base_layer"), name)
