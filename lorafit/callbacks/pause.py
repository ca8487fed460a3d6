"""PauseAt: stop training after a number of steps, with a checkpoint from which it goes on as if it had not stopped.

That is how a sweep looks at all of its jobs early (successive halving) and lets only the better ones go on: the
learning rate keeps the schedule of the whole run.
"""

from __future__ import annotations

from typing import Any

import lightning as L

from lorafit.callbacks.checkpoints import Checkpoints
from lorafit.errors import Paused
from lorafit.module import FinetuneModule


class PauseAt(L.Callback):
    """Raises Paused when `step` optimizer steps are taken and the checkpoint is written."""

    def __init__(self, checkpoints: Checkpoints, step: int) -> None:
        self.checkpoints, self.step = checkpoints, step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step >= self.step:  # resumed from a checkpoint that stands here already
            raise Paused

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, FinetuneModule)
        if pl_module.stepped and trainer.global_step >= self.step:
            self.checkpoints.save(trainer)
            raise Paused
