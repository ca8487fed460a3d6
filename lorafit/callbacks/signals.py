"""StopOnSignal: SIGTERM and SIGINT end a run with a checkpoint and an exit code that says so.

Lightning by itself ends a terminated run with exit code 0. Here the step under way is finished, the checkpoint written,
and `Stopped` raised, which a program turns into 143 or 130. Outside of training it is raised at once; a
second signal does not wait for anything.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L

from lorafit.callbacks.checkpoints import Checkpoints
from lorafit.errors import Stopped
from lorafit.module import FinetuneModule

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(L.Callback):
    """A context manager around a whole run, and a callback within it."""

    def __init__(self, checkpoints: Checkpoints | None = None) -> None:
        self.checkpoints = checkpoints
        self.signum: int | None = None
        self._training = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
            self._install()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def _install(self) -> None:
        for signum in self._handlers:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._training and self.signum is None:
            self.signum = signum  # the step under way is finished first
        else:
            raise Stopped(signum)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._install()  # over those that Lightning has put there, which would end the run its own way
        self._training = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._stop_if_asked(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_asked(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = False
        self.check()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._training = False  # nobody looks at `signum` any more

    def check(self) -> None:
        """Raise Stopped where a signal came in the last moment of training."""
        if self.signum is not None:
            raise Stopped(self.signum)

    def _stop_if_asked(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, FinetuneModule)
        if self.signum is not None and pl_module.stepped:
            if self.checkpoints is not None:
                self.checkpoints.save(trainer)
            self._training = False
            raise Stopped(self.signum)
