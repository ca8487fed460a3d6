"""StopOnSignal: a signal ends a run with a checkpoint and an exit code that says so.

Lightning by itself ends a terminated run with exit code 0, and one whose terminal was closed without a checkpoint.
Here the step under way is finished, the checkpoint written, and `Stopped` raised, which a program turns into 143, 130
or 129. A validation is not finished, since it may take long: a resumed run makes up for it. Outside of training, and at
a second signal, `Stopped` is raised at once (`lorafit.stopping`).
"""

from __future__ import annotations

import contextlib
import signal
from typing import Any

import lightning as L

from lorafit.callbacks.checkpoints import Checkpoints
from lorafit.errors import Stopped
from lorafit.module import FinetuneModule
from lorafit.stopping import Stopping, stopping


class StopOnSignal(L.Callback):
    """A context manager around a whole run, and a callback within it."""

    def __init__(self, checkpoints: Checkpoints | None = None) -> None:
        self.checkpoints = checkpoints
        self._stack = contextlib.ExitStack()
        self.stopping = Stopping()

    def __enter__(self) -> StopOnSignal:
        self.stopping = self._stack.enter_context(stopping())
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.deferring = False
        self._stack.close()

    @property
    def signum(self) -> int | None:
        """The signal that the run is to end by."""
        return next(iter(self.stopping.asked), None)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.check()
        self.stopping.install()  # over those that Lightning has put there, which would end the run its own way
        self.stopping.deferring = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._stop_if_asked(trainer, pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._stop_if_asked(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_asked(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stopping.deferring = False
        self.check()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.stopping.deferring = False  # nobody looks at what was asked any more

    def check(self) -> None:
        """Raise Stopped where a signal came in the last moment of training."""
        self.stopping.check()

    def _stop_if_asked(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, FinetuneModule)
        if not pl_module.stepped:
            return
        asked = self.signum is not None
        if trainer.world_size > 1:  # one that is told alone would leave the others waiting for it
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            if self.checkpoints is not None:
                self.checkpoints.save(trainer)
            self.stopping.deferring = False
            self.check()
            raise Stopped(signal.SIGTERM)  # another process of the group was told
