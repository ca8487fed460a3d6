"""TrainingProgress: how far it is, the loss, supervised tokens per second and the time left.

A bar on a terminal; where output goes to a file, a line every few seconds. Rates count supervised tokens: padding and
prompts are work, but not what is learned.
"""

from __future__ import annotations

import math
import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lorafit.callbacks.speed import StepMetrics
from lorafit.module import FinetuneModule


def clock(seconds: float) -> str:
    """75 -> "1:15"."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class TrainingProgress(L.Callback):
    """Shows what `metrics`, the StepMetrics of the same run, has counted."""

    def __init__(self, metrics: StepMetrics, console: Console | None = None, line_every_seconds: float = 10.0) -> None:
        self.metrics, self.line_every_seconds = metrics, line_every_seconds
        self.console = console or Console()
        self._bar: Progress | None = None
        self._loss = math.nan
        self._eval_loss = math.nan
        self._printed = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._total = int(trainer.estimated_stepping_batches)
        self._printed = time.monotonic()
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("starting", total=self._total, completed=trainer.global_step)
            self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, FinetuneModule)
        if not pl_module.stepped:
            return
        loss = self.metrics.recent["train/loss"]
        # smoothed, since a step's loss jumps with its batch
        self._loss = loss if math.isnan(self._loss) else 0.9 * self._loss + 0.1 * loss
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, description=self._text(trainer))
        elif time.monotonic() - self._printed >= self.line_every_seconds:
            self._printed = time.monotonic()
            self.console.print(f"step {trainer.global_step}/{self._total}  {self._text(trainer)}", highlight=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._eval_loss = float(trainer.callback_metrics.get("eval/loss", math.nan))

    def _text(self, trainer: L.Trainer) -> str:
        seconds, steps = self.metrics.seconds, self.metrics.steps
        left = (self._total - trainer.global_step) * seconds / max(1, steps)
        held_out = "" if math.isnan(self._eval_loss) else f"held-out {self._eval_loss:.3f}  "
        rate = self.metrics.supervised_tokens / seconds if seconds else 0.0
        return f"loss {self._loss:.3f}  {held_out}{rate:,.0f} supervised tokens/s  {clock(left)} left"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
