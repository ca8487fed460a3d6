"""The wiring of Lightning's Trainer: what of it is used, and what is answered otherwise.

Lightning writes a checkpoint to $TMPDIR and moves it; where that is another file system, a kill in between leaves half
a file and the old one is gone. `AtomicCheckpointIO` writes beside the target and renames. The progress bar, the model
summary and the checkpoint callback are our own (callbacks/), since Lightning's count packed 4-bit weights and padding.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.plugins.io import TorchCheckpointIO
from transformers.utils import logging as hf_logging

from lorafit.checkpoint import load_run, save_checkpoint
from lorafit.errors import reason

log = logging.getLogger(__name__)
_told: weakref.WeakSet[Any] = weakref.WeakSet()  # the loggers of whose failing a warning was given


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all, and are read back as plain data only.

    `error` is what the disk said to the last one, None where it took it: raised, it would leave the other processes
    of a group waiting. storage_options: {"keep": where the checkpoint goes that was there}.
    """

    def __init__(self) -> None:
        super().__init__()
        self.error: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.error = None
        try:
            save_checkpoint(path, checkpoint, **(storage_options or {}))
        except OSError as error:
            self.error = error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        return load_run(path, map_location)


def total_steps(batches: int, accumulate: int, max_steps: int | None, max_epochs: int | None) -> int:
    """How many optimizer steps a run takes: the smaller of the limits that are given (None and -1 give none), or one
    epoch where neither is."""
    # the last batch of an epoch always steps, even in the middle of an accumulation
    epoch = math.ceil(batches / accumulate)
    limits = [max_steps] if max_steps is not None and max_steps > 0 else []
    limits += [max_epochs * epoch] if max_epochs is not None and max_epochs > 0 else []
    return min(limits, default=epoch)


def validation_interval(interval: int | float | None, *, batches: int, accumulate: int, steps: int) -> int:
    """Batches between two validations: from optimizer steps (int), a fraction of an epoch (float), or four (None)."""
    if interval is None:
        return max(1, steps // 4) * accumulate
    if isinstance(interval, float):
        return max(1, round(interval * batches))
    return interval * accumulate


def build_trainer(
    folder: str | Path,
    *,
    batches: int,
    max_steps: int | None = None,
    max_epochs: int | None = None,
    accumulate_grad_batches: int = 1,
    val_check_interval: int | float | None = None,
    accelerator: str = "auto",
    devices: int | str = 1,
    log_every_n_steps: int = 10,
    callbacks: list[L.Callback] | None = None,
    logger: Any = False,
    strategy: Any = "auto",
) -> L.Trainer:
    """A Trainer for FinetuneModule that writes below `folder`; `batches` is the number of batches in an epoch."""
    steps = total_steps(batches, accumulate_grad_batches, max_steps, max_epochs)
    return L.Trainer(
        default_root_dir=folder,
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        precision="32-true",
        max_steps=steps,
        max_epochs=-1,  # counted in steps already
        accumulate_grad_batches=accumulate_grad_batches,
        val_check_interval=validation_interval(
            val_check_interval, batches=batches, accumulate=accumulate_grad_batches, steps=steps
        ),
        check_val_every_n_epoch=None,  # the interval counts across epochs
        num_sanity_val_steps=0,
        log_every_n_steps=log_every_n_steps,
        callbacks=callbacks or [],
        logger=logger,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # our loader shares the batches out itself
    )


def log_to_all(trainer: L.Trainer, numbers: Mapping[str, float]) -> None:
    """Hand numbers of the step that was just taken to every logger of a trainer. One that fails is told of and left
    out from then on: no training is lost over what draws its curves."""
    for logger in list(trainer.loggers):
        with still_logging(logger) as logged:
            logger.log_metrics(dict(numbers), step=trainer.global_step)
            logged.append(True)
        if not logged:
            trainer.loggers = [other for other in trainer.loggers if other is not logger]


@contextlib.contextmanager
def still_logging(logger: Any) -> Iterator[list[bool]]:
    """A warning in place of the first error of a logger: its service may have died, its disk may be full."""
    try:
        yield []
    except Exception as error:
        if logger not in _told:
            log.warning(f"{type(logger).__name__} fails ({reason(error)}): the run goes on without it")
        _told.add(logger)


def quiet_libraries() -> None:
    """Keep hints about products, about choices made on purpose, and bars that last a blink off the terminal."""
    hf_logging.disable_progress_bar()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",  # the first step is logged in any case
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
        ".*GPU available but not used.*",
        ".*Trainer.fit.* stopped.*",
        ".*isn't supported on CPU.*",
        ".*found .* module.* in eval mode.*",
        ".*all_gather is deprecated.*",
        ".*sync_dist=True.*",  # the sum over processes is taken before it is logged
    ):
        warnings.filterwarnings("ignore", message=message)
