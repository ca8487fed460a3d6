"""checkpoints/last.ckpt and checkpoints/best.ckpt: adapter, optimizer, schedule, random state and data position.

Only written where an optimizer step has just been taken: in the middle of an accumulation there are gradients that no
checkpoint holds, and a resumed run would lose them.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lorafit.datamodule import FinetuneDataModule
from lorafit.evaluation import evaluate_loss
from lorafit.files import write_atomically
from lorafit.module import FinetuneModule
from lorafit.trainer import log_to_all


class Checkpoints(L.Callback):
    """Writes `last.ckpt` after each validation, every `every_n_steps` optimizer steps and at the end; `best.ckpt` is
    the one with the lowest held-out loss.

    A run may be stopped between a step's checkpoint and the validation after that step, which Lightning does not make
    up for when it is resumed; here it is."""

    def __init__(self, folder: str | Path, every_n_steps: int | None = None) -> None:
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self.best_loss = math.inf
        self._last_step = self._validated_step = -1

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.folder / "best.ckpt"

    def save(self, trainer: L.Trainer) -> None:
        """Write last.ckpt now, unless this step's is there already."""
        if trainer.global_step != self._last_step:
            trainer.save_checkpoint(self.last)
            self._last_step = trainer.global_step

    def keep_best(self, loss: float) -> None:
        """Keep the checkpoint written last as the best one if its held-out loss is the lowest."""
        if loss < self.best_loss:
            self.best_loss = loss
            self._copy_to_best(self.last)

    def _copy_to_best(self, checkpoint: Path) -> None:
        with checkpoint.open("rb") as source:
            write_atomically(self.best, lambda target: shutil.copyfileobj(source, target))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # a run that goes on in another folder takes the best checkpoint so far with it
        if self.best_loss < math.inf and not self.best.exists():
            before = Path(str(trainer.ckpt_path)).with_name(self.best.name)
            if before.is_file():
                self._copy_to_best(before)
            else:
                self.best_loss = math.inf
        self.make_up(trainer, pl_module)

    def make_up(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate where a resumed run was stopped before it could. A run that has taken all of its steps does not
        train, so that the program asks for it."""
        if trainer.global_step > max(0, self._validated_step) and self._due(trainer):
            self._validate(trainer, pl_module)

    def _due(self, trainer: L.Trainer) -> bool:
        """Whether a validation belongs to the last batch before a resumed run goes on."""
        every, batches = trainer.val_check_batch, trainer.fit_loop.epoch_loop.total_batch_idx + 1
        return isinstance(every, int) and bool(trainer.ckpt_path) and batches % every == 0

    def _validate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, FinetuneDataModule):
            return
        assert isinstance(pl_module, FinetuneModule) and pl_module.model is not None
        loss = evaluate_loss(pl_module.model, data.eval_batches())["loss"]
        loss = torch.tensor(loss, dtype=torch.float64).float().item()  # as the module logs it
        log_to_all(trainer, {"eval/loss": loss})
        self._validated_step = trainer.global_step
        best = Path(str(trainer.ckpt_path))
        if loss < self.best_loss and best.is_file():
            self.best_loss = loss
            self._copy_to_best(best)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, FinetuneModule)
        if pl_module.stepped and self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, FinetuneModule)
        if pl_module.stepped and not trainer.sanity_checking:
            loss = float(trainer.callback_metrics["eval/loss"])
            self._validated_step = trainer.global_step
            # written anew even where this step's is there, and with the loss in it: what resumes has to know it
            best = loss < self.best_loss
            self.best_loss = loss if best else self.best_loss
            self._last_step = -1
            self.save(trainer)
            if best:
                self._copy_to_best(self.last)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "validated_step": self._validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss = state_dict["best_loss"]
        self._validated_step = state_dict.get("validated_step", -1)
