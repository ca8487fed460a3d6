"""SkipNonFinite: a step whose loss or gradient is not finite is not taken, counted, and explained.

One bad row, or one overflow, would else be carried by the optimizer into every weight. The step is left out; where it
happens again and again the run is lost and stops, before more of the night is.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from lorafit.diagnosis import first_nonfinite_module
from lorafit.errors import DivergedError, reason
from lorafit.module import FinetuneModule
from lorafit.trainer import log_to_all

log = logging.getLogger(__name__)

_ADVICE = (
    "Lower optimizer.lr, lengthen scheduler.warmup, set trainer.gradient_clip_val, or look at the data with "
    "`python -m lorafit.audit`"
)


class SkipNonFinite(L.Callback):
    """Leaves out every step whose loss or gradient is not finite; the one after `max_skipped` of them raises
    DivergedError. A skipped step counts as a step of the run: the schedule goes on.

    `skipped` is how many there were so far; `skipped_in_a_row` how many since the last step that was taken, and
    `first_of_row` the number of the first of those.
    """

    def __init__(self, max_skipped: int = 0) -> None:
        self.max_skipped = max_skipped
        self.skipped = self.skipped_in_a_row = 0
        self.first_of_row: int | None = None
        self._batches: list[Any] = []  # the micro-batches of the step under way

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        assert isinstance(pl_module, FinetuneModule)
        if pl_module.stepped:
            self._batches = []
        self._batches.append(batch)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, FinetuneModule)
        parameters = {name: p for name, p in pl_module.named_parameters() if p.requires_grad and p.grad is not None}
        gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
        norms = torch._foreach_norm(gradients) if gradients else (torch.zeros((), device=pl_module.device),)
        both = torch.stack((pl_module.step_loss.float(), torch.stack(norms).sum().float()))
        if trainer.world_size > 1:  # a loss is of one process alone, and all have to do the same
            both = trainer.strategy.reduce(both, reduce_op="sum")
            assert isinstance(both, Tensor)
        loss, gradient = both.tolist()  # one transfer from the device for both
        if math.isfinite(loss) and math.isfinite(gradient):
            self.skipped_in_a_row, self.first_of_row = 0, None
            return
        step = trainer.global_step + 1
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.first_of_row = step if self.first_of_row is None else self.first_of_row
        what = f"its loss is {loss}" if not math.isfinite(loss) else "its gradient is not finite"
        if self.skipped_in_a_row == 1 or self.skipped > self.max_skipped:
            bad = [name for name, norm in zip(parameters, norms, strict=False) if not torch.isfinite(norm)]
            what += f". {self._where(pl_module, bad if math.isfinite(loss) else [])}"
        if self.skipped > self.max_skipped:
            before = f", and {self.skipped - 1} steps were skipped before it" if self.skipped > 1 else ""
            raise DivergedError(f"step {step} cannot be taken: {what}{before}. {_ADVICE}")
        log.warning(f"step {step} was skipped: {what} ({self.skipped} of at most {self.max_skipped})")
        for parameter in parameters.values():
            parameter.grad = None  # of which an optimizer takes no step, and keeps its state

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, FinetuneModule)
        if pl_module.stepped:
            self._batches = []
            if self.skipped_in_a_row:
                log_to_all(trainer, {"train/skipped_steps": float(self.skipped)})

    def _where(self, pl_module: FinetuneModule, bad: list[str]) -> str:
        """The first module whose output is not finite, in a sentence; else the layers whose gradient is not."""
        assert pl_module.model is not None
        try:
            found = first_nonfinite_module(pl_module.model, self._batches)
        except Exception as error:  # what goes wrong here, memory first of all, is not what the run is about
            return f"Which module it begins in could not be found out ({reason(error)})"
        if found is not None:
            return f"The first module whose output is not finite is {found}"
        if bad:
            names = ", ".join(name.removeprefix("model.") for name in bad[:3])
            return f"Every module's output is finite; the gradient is not in {names}"
        if pl_module.trainer.world_size > 1:
            return "Every module's output is finite in this process: it is the loss alone, or another process's batch"
        return "Every module's output is finite: it is the loss alone"

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
