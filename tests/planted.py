"""Faults to be planted in a run: functions that are called in its process before the program (see faulty.py).

forked(arguments, functools.partial(nan_batch, 5))
"""

from __future__ import annotations

import os
import signal
from typing import Any

LAYER = "model.layers.1.mlp.up_proj"


def nan_weight() -> None:
    """One weight of the base is not a number from the start."""
    import lorafit.sweep

    real = lorafit.sweep.load_base

    def load(*arguments: Any) -> Any:
        model = real(*arguments)
        model.get_submodule(LAYER).weight.data.view(-1)[3] = float("nan")
        return model

    lorafit.sweep.load_base = load  # type: ignore[assignment]


def _in_step(at: int, act: Any) -> None:
    """Call act(module) in micro-batch number `at` of the training, before it is computed."""
    from lorafit.module import FinetuneModule

    real, seen = FinetuneModule.training_step, [0]

    def step(self: Any, *arguments: Any) -> Any:
        seen[0] += 1
        if seen[0] == at:
            act(self)
        return real(self, *arguments)

    FinetuneModule.training_step = step  # type: ignore[method-assign]


def diverge(at: int) -> None:
    """From micro-batch `at` on, a factor of the adapter is not finite, as after a step that was too large."""

    def act(module: Any) -> None:
        module.model.get_submodule(LAYER).lora_B.weight.data.fill_(float("inf"))

    _in_step(at, act)


def nan_batch(at: int) -> None:
    """The loss of micro-batch `at` is not a number."""
    import lorafit.module

    real, seen = lorafit.module.supervised_loss, [0]

    def loss(model: Any, *arguments: Any, **options: Any) -> Any:
        total, tokens = real(model, *arguments, **options)
        seen[0] += model.training
        return (total * float("nan") if model.training and seen[0] == at else total), tokens

    lorafit.module.supervised_loss = loss  # type: ignore[assignment]


def out_of_memory(rows: int) -> None:
    """A training batch of more rows than that does not fit."""
    import torch

    import lorafit.module

    real = lorafit.module.supervised_loss

    def loss(model: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        result = real(model, batch, *arguments, **options)
        if model.training and len(batch["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result

    lorafit.module.supervised_loss = loss  # type: ignore[assignment]


def signalled(at: int, signum: int) -> None:
    """A signal comes in micro-batch number `at`."""
    _in_step(at, lambda module: os.kill(os.getpid(), signum))


def unwritable(at: int) -> None:
    """From micro-batch number `at` on, nothing can be written to the run folder."""
    from faulty import without_roots_rights

    without_roots_rights()

    def act(module: Any) -> None:
        for folder in ("run/checkpoints", "run"):
            os.chmod(folder, 0o555)
        os.chmod("run/metrics.json", 0o444)

    _in_step(at, act)


def killed_worker() -> None:
    """The kernel kills a process that reads data."""
    import lorafit.data.loader

    real = lorafit.data.loader._Rows.__getitem__

    def read(self: Any, index: int) -> Any:
        import multiprocessing

        if multiprocessing.parent_process() is not None and multiprocessing.current_process().daemon:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, index)

    lorafit.data.loader._Rows.__getitem__ = read  # type: ignore[method-assign]


def frozen_factor() -> None:
    """Somebody has frozen one B."""
    from lorafit.module import FinetuneModule

    real = FinetuneModule.configure_model

    def configure(self: Any) -> None:
        real(self)
        self.model.get_submodule(LAYER).lora_B.weight.requires_grad_(False)

    FinetuneModule.configure_model = configure  # type: ignore[method-assign]


def detached_layer() -> None:
    """No gradient comes to one layer."""
    from lorafit.module import FinetuneModule

    real = FinetuneModule.configure_model

    def configure(self: Any) -> None:
        real(self)
        layer = self.model.get_submodule(LAYER)
        for factor in (layer.lora_A, layer.lora_B):
            factor.weight.register_hook(lambda gradient: gradient * 0)

    FinetuneModule.configure_model = configure  # type: ignore[method-assign]


def changed_base(at: int) -> None:
    """One weight of the frozen base changes while it trains."""

    def act(module: Any) -> None:
        import torch

        weight = module.model.get_submodule(LAYER).base_layer.weight.data
        flat = weight.view(torch.uint8).view(-1)
        flat[len(flat) // 3] ^= 1

    _in_step(at, act)


def nan_at_the_end() -> None:
    """A number of the adapter is lost after the last step."""
    from lorafit.callbacks import Checkpoints

    real = Checkpoints.on_train_end

    def end(self: Any, trainer: Any, module: Any) -> None:
        real(self, trainer, module)
        module.model.get_submodule(LAYER).lora_A.weight.data[0, 0] = float("nan")

    Checkpoints.on_train_end = end  # type: ignore[method-assign]
