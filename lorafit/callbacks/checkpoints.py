"""checkpoints/last.ckpt and checkpoints/best.ckpt: adapter, optimizer, schedule, random state and data position.

Only written where an optimizer step has just been taken: in the middle of an accumulation there are gradients that no
checkpoint holds, and a resumed run would lose them. Nor after a step that was skipped, since its loss or gradient was
not finite: the weights that gave it are no good place to go on from, and even less are weights that are not finite.

previous.ckpt is the one before the last. A checkpoint that the disk does not take costs the run nothing but that
checkpoint: it is told, and the next one is tried.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lorafit.checkpoint import BEST, LAST, PREVIOUS, Unfit, load_run, require_like, save_checkpoint
from lorafit.datamodule import FinetuneDataModule
from lorafit.errors import InputError, reason
from lorafit.evaluation import evaluate_loss
from lorafit.files import copy_atomically
from lorafit.module import FinetuneModule
from lorafit.trainer import AtomicCheckpointIO, log_to_all

log = logging.getLogger(__name__)


class Skips(Protocol):
    """What counts the steps that are skipped (SkipNonFinite)."""

    skipped_in_a_row: int


class Checkpoints(L.Callback):
    """Writes `last.ckpt` after each validation, every `every_n_steps` optimizer steps and at the end; `best.ckpt` is
    the one with the lowest held-out loss.

    identity: what each checkpoint says of the run that it belongs to, plain values. held_out: which rows it is judged
    by; the best of others is none of these. Both may be set later. finite: the callback that skips steps. `failed` says
    why the last one could not be written; None when it was.

    A run may be stopped between a step's checkpoint and the validation after that step, which Lightning does not make
    up for when it is resumed; here it is."""

    def __init__(
        self,
        folder: str | Path,
        every_n_steps: int | None = None,
        *,
        identity: Mapping[str, Any] | None = None,
        finite: Skips | None = None,
    ) -> None:
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self.identity, self.finite = dict(identity or {}), finite
        self.held_out = ""
        self.best_loss, self.best_step = math.inf, -1
        self.failed: str | None = None
        self._last_step = self._tried_step = self._validated_step = -1

    @property
    def last(self) -> Path:
        return self.folder / LAST

    @property
    def previous(self) -> Path:
        return self.folder / PREVIOUS

    @property
    def best(self) -> Path:
        return self.folder / BEST

    def save(self, trainer: L.Trainer) -> None:
        """Write last.ckpt now, unless this step's is there already, or this step was skipped."""
        # what only one process knows, that the disk did not take it, must not make it alone try again
        again = self.failed is not None and trainer.world_size == 1
        if trainer.global_step != self._tried_step or again:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> bool:
        """Write last.ckpt; whether it was written."""
        if self.finite is not None and self.finite.skipped_in_a_row:
            return False
        module = trainer.lightning_module
        assert isinstance(module, FinetuneModule)
        if module.not_finite():
            log.warning(f"there is no checkpoint of step {trainer.global_step}: the adapter is not finite any more")
            return False
        writer = trainer.strategy.checkpoint_io
        assert isinstance(writer, AtomicCheckpointIO)
        self._tried_step = trainer.global_step
        again = trainer.global_step == self._last_step  # then the one before the last stays what it is
        trainer.save_checkpoint(self.last, storage_options=None if again else {"keep": self.previous})
        return self._told(writer.error, trainer.global_step)

    def _told(self, error: OSError | None, step: int) -> bool:
        """Say what has become of a checkpoint, where that is news. Whether it was written."""
        if error is None:
            if self.failed is not None:
                log.warning(f"the checkpoint of step {step} is written again")
            self.failed, self._last_step = None, step
            return True
        said = f"{self.folder} ({error.strerror or reason(error)})"
        if self.failed is None:
            kept = "; the one before it stays" if os.path.exists(self.last) else ", and there is none before it"
            if step == self._last_step:
                kept = " once more, with its held-out loss; it stays as it was"
            log.warning(
                f"the checkpoint of step {step} cannot be written to {said}{kept}. The training goes on; what happens "
                "after the last checkpoint is lost if it is stopped"
            )
        self.failed = f"step {step}: {said}"
        return False

    def keep_best(self, loss: float) -> None:
        """Keep the checkpoint written last as the best one if its held-out loss is the lowest."""
        behind = self.failed is not None or (self.finite is not None and self.finite.skipped_in_a_row > 0)
        if loss < self.best_loss and not behind and os.path.exists(self.last):
            try:
                state = load_run(self.last)
                self.best_loss, self.best_step = loss, state["global_step"]
                state["callbacks"][self.state_key] = self.state_dict()  # what resumes has to know it
                save_checkpoint(self.last, state)
            except OSError as error:
                log.warning(f"{self.last} cannot be written ({error.strerror}): it does not know that it is the best")
            self._copy_to_best(self.last)

    def keep_good(self, bad_from: int) -> tuple[Path, int] | None:
        """After divergence: see to it that last.ckpt is a good one, and return it and its step; None where none is
        left.

        bad_from: the first of the steps that ended the run. Weights from which the very next step was one of them are
        not gone on with: their checkpoint becomes diverged.ckpt.
        """
        good = []
        for path in (self.last, self.previous, self.best):
            step = _step_of(path)  # one that is damaged is told when it is to be gone on with
            if step is not None and step < bad_from - 1:
                good.append((path, step))
            elif step is not None:
                try:
                    os.replace(path, self.folder / "diverged.ckpt")
                except OSError as error:
                    log.warning(f"{path} is not to be gone on from: remove it ({error.strerror})")
        if not good:
            return None
        path, step = good[0]
        with contextlib.suppress(OSError):
            if path == self.previous:
                os.replace(path, self.last)  # which a full disk takes as well
            elif path == self.best:
                copy_atomically(path, self.last)
            return self.last, step
        return path, step  # of which a resumed run finds it, too

    @rank_zero_only
    def _copy_to_best(self, checkpoint: Path) -> None:
        try:
            copy_atomically(checkpoint, self.best)
        except OSError as error:
            log.warning(f"{self.best} cannot be written ({error.strerror}): the best checkpoint is not kept")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.best_loss < math.inf:
            self._find_best(Path(str(trainer.ckpt_path)), trainer.global_step)
        self.make_up(trainer, pl_module)

    def _find_best(self, came: Path, step: int) -> None:
        """See to it that best.ckpt is what the checkpoint that a run goes on from takes for it. The run may have been
        killed before it was copied, have gone on from there to a better one that diverged, or go on in another folder.
        """
        if _step_of(self.best) == self.best_step:
            return
        before = came.with_name(self.best.name)
        if step == self.best_step:
            self._copy_to_best(came)
        elif _step_of(before) == self.best_step:
            self._copy_to_best(before)
        else:
            self.best_loss, self.best_step = math.inf, -1

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
        if loss < self.best_loss and os.path.isfile(best):
            self.best_loss, self.best_step = loss, trainer.global_step
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
            best, before = loss < self.best_loss, (self.best_loss, self.best_step)
            if best:
                self.best_loss, self.best_step = loss, trainer.global_step
            if not self._save(trainer):
                self.best_loss, self.best_step = before
            elif best:
                self._copy_to_best(self.last)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    # ---------------------------------------------------------------------------------------------- the state

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self.identity

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at what the callbacks are about to take over: a checkpoint may be a stranger's, or another version's."""
        states = checkpoint.get("callbacks")
        if not isinstance(states, dict):
            raise Unfit(f"callbacks is {type(states).__name__}, where dict belongs")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callback.state_key in states:
                require_like(states[callback.state_key], callback.state_dict(), callback.state_key)

    def state_dict(self) -> dict[str, Any]:
        best = {"best_loss": self.best_loss, "best_step": self.best_step, "held_out": self.held_out}
        return best | {"validated_step": self._validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validated_step = state_dict["validated_step"]
        if state_dict["held_out"] == self.held_out:
            self.best_loss, self.best_step = state_dict["best_loss"], state_dict["best_step"]
        else:
            log.warning("it was judged by other held-out rows before: the best checkpoint is sought anew from here on")


def _step_of(checkpoint: Path) -> int | None:
    """The step of a checkpoint; None where there is none that can be read."""
    try:
        return int(load_run(checkpoint)["global_step"])
    except (OSError, InputError):
        return None
