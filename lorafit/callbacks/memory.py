"""PagedOptimizerMemory: how much of the optimizer's state lies in pageable memory, and what else occupies memory.

QLoRA's paged optimizers put their state into CUDA managed memory, so that a peak elsewhere pushes it out to the host
instead of ending the run. Whether that happens depends on tensor sizes and the device, so it is counted, not assumed.
"""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
from torch.optim import Optimizer

from lorafit.memory import memory_by_part, peak_bytes
from lorafit.module import FinetuneModule
from lorafit.terminal import human
from lorafit.trainer import log_to_all

log = logging.getLogger(__name__)


class PagedOptimizerMemory(L.Callback):
    """Counts bytes by part every `every_n_steps` optimizer steps and at the end, and logs them as `memory/*`.

    idle_bytes: of the peak, what other runs of this process keep there; it is taken off. After training `parts` holds
    the last count and `peak` the peak (see `lorafit.memory`). At the first count it says in a sentence what is paged
    and what is not.
    """

    def __init__(self, every_n_steps: int | None = 50, idle_bytes: int = 0) -> None:
        self.every_n_steps, self.idle_bytes = every_n_steps, idle_bytes
        self.parts: dict[str, int] = {}
        self.gradient_bytes = 0
        self.peak = 0
        self._counted, self._peak_before = -1, 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        # the first step's are those of all steps; later they may be freed when this looks
        if not self.gradient_bytes:
            assert isinstance(pl_module, FinetuneModule)
            self.gradient_bytes = memory_by_part(pl_module)["gradient"]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, FinetuneModule)
        first = not self.parts
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if pl_module.stepped and (first or due):
            self.count(trainer, pl_module)
            if first and self.every_n_steps is not None:
                log.info(self.sentence(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.count(trainer, pl_module)

    def count(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count now, and hand the numbers to the loggers, once a step."""
        self.parts = memory_by_part(pl_module, trainer.optimizers[0]) | {"gradient": self.gradient_bytes}
        self.peak = max(self._peak_before, peak_bytes(pl_module.device) - self.idle_bytes)
        numbers = {f"memory/{part}_bytes": float(count) for part, count in self.parts.items()}
        if trainer.global_step != self._counted:
            self._counted = trainer.global_step
            log_to_all(trainer, numbers | {"memory/peak_bytes": float(self.peak)})

    def state_dict(self) -> dict[str, Any]:
        return {"parts": self.parts, "gradient_bytes": self.gradient_bytes, "peak": self.peak}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.parts, self.gradient_bytes = state_dict["parts"], state_dict["gradient_bytes"]
        self.peak = self._peak_before = state_dict["peak"]

    def sentence(self, trainer: L.Trainer) -> str:
        """What is paged, for a person."""
        optimizer = trainer.optimizers[0]
        total, paged = self.parts["optimizer"], self.parts["optimizer_paged"]
        name = type(getattr(optimizer, "optimizer", optimizer)).__name__
        if trainer.strategy.root_device.type != "cuda":
            return f"{name} holds {human(total)} of state. Nothing is paged: there is no CUDA device."
        if not getattr(optimizer, "is_paged", False):
            return f"{name} holds {human(total)} of state, all of it resident: it is no paged optimizer."
        return (
            f"{name} holds {human(total)} of state: {human(paged)} paged, {human(total - paged)} resident "
            "(bitsandbytes pages tensors of 100,000 elements or more)."
        )
