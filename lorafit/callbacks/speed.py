"""StepMetrics: loss, learning rate, gradient norm and speed of each step, and the totals of the run.

Time is that of training alone: validation and the writing of checkpoints happen between steps and are not counted.
"""

from __future__ import annotations

import math
import time
from typing import Any

import lightning as L

from lorafit.module import FinetuneModule
from lorafit.trainer import log_to_all


class StepMetrics(L.Callback):
    """Logs `train/loss`, `train/learning_rate`, `train/gradient_norm`, `train/seconds` and tokens a second every
    `every_n_steps` steps, and `eval/loss` after each validation.

    `seconds`, `steps`, `tokens` and `supervised_tokens` are those of the run: one that is resumed goes on counting.
    `losses` are those that this process has seen; `recent` holds the numbers logged last; `began` is when training did,
    by time.perf_counter.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self.seconds = 0.0
        self.steps = self.tokens = self.supervised_tokens = 0
        self.recent: dict[str, float] = {}
        self.losses: list[tuple[int, float]] = []
        self.began = math.nan
        self._since: float | None = None
        self._mark = (0.0, 0, 0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.began = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        # the clock stands still before the first batch and during validation and saving
        if self._since is None:
            self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, FinetuneModule)
        # of this process; the others' batches are about as long
        self.tokens += int(batch["tokens"]) * trainer.world_size
        if not pl_module.stepped:
            return
        self.steps += 1
        supervised = int(pl_module.step_tokens)
        self.supervised_tokens += supervised
        self._stop_clock()
        self._since = time.perf_counter()
        loss = float(pl_module.step_loss) / max(1, supervised)
        self.losses.append((trainer.global_step, loss))
        self.recent = {
            "train/loss": loss,
            # the rate that this step used: the schedule has moved on already
            "train/learning_rate": float(pl_module.used_learning_rate),
            "train/gradient_norm": float(pl_module.gradient_norm),
        }
        if trainer.global_step % self.every_n_steps == 0 or self.steps == 1:
            seconds, tokens, before = (self.seconds - self._mark[0], self.tokens - self._mark[1], self._mark[2])
            self._mark = (self.seconds, self.tokens, self.supervised_tokens)
            self.recent |= {
                "train/tokens_per_second": tokens / max(seconds, 1e-9),
                "train/supervised_tokens_per_second": (self.supervised_tokens - before) / max(seconds, 1e-9),
                "train/seconds": self.seconds,
            }
            log_to_all(trainer, self.recent)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_clock()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            log_to_all(trainer, {"eval/loss": float(trainer.callback_metrics["eval/loss"])})

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._stop_clock()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_clock()

    def _stop_clock(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        self._since = None

    def state_dict(self) -> dict[str, Any]:
        self._stop_clock()
        names = ("seconds", "steps", "tokens", "supervised_tokens")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)
        self._mark = (self.seconds, self.tokens, self.supervised_tokens)

    def totals(self) -> dict[str, float]:
        """The `speed` part of metrics.json."""
        return {
            "steps": self.steps,
            "train_seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else 0.0,
            "supervised_tokens_per_second": round(self.supervised_tokens / self.seconds, 1) if self.seconds else 0.0,
        }
