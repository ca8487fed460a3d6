"""The wiring of Lightning's Trainer: what of it is used, and what is answered otherwise.

Lightning writes a checkpoint to $TMPDIR and moves it; where that is another file system, a kill in between leaves half
a file and the old one is gone. `AtomicCheckpointIO` writes beside the target and renames. The progress bar, the model
summary and the checkpoint callback are our own (callbacks/), since Lightning's count packed 4-bit weights and padding.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import subprocess
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from transformers.utils import logging as hf_logging

from lorafit.checkpoint import load_run, save_checkpoint
from lorafit.errors import DivergedError, GroupFailed, LorafitError, MemoryExhausted, NotLearning, Stopped, reason
from lorafit.stopping import stopped_by

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


WAIT_SECONDS = 60.0  # how long the other processes of a group may take to end after the first one
NOTICE_SECONDS = 5.0  # how long it may take until one notices that another is gone
_LEFT_ALONE = re.compile("gloo|nccl|connection (closed|reset|refused)|broken pipe|socket", re.IGNORECASE)
_OF_A_GROUP = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


class _OneJobLauncher(_SubprocessScriptLauncher):
    """Starts the other processes of a group with a command of our own, and ends the group after the work.

    Lightning repeats the command of the program, which for a sweep would be the sweep; and what it sets in the
    environment would make the next job take itself for a process of this one's group.
    """

    def __init__(
        self,
        environment: ClusterEnvironment,
        processes: int,
        nodes: int,
        command: Sequence[str],
        abandon: Callable[[LorafitError | Stopped], object],
    ) -> None:
        super().__init__(environment, processes, nodes)
        self.command, self.abandon = list(command), abandon
        self._over = threading.Event()  # this process's part of the work

    def launch(self, function: Any, *args: Any, trainer: L.Trainer | None = None, **kwargs: Any) -> Any:
        if self.cluster_environment.creates_processes_externally:  # by torchrun, SLURM, or the process that began
            return super().launch(function, *args, trainer=trainer, **kwargs)
        before = {name: os.environ.get(name) for name in _OF_A_GROUP}
        threads, lightnings = torch.get_num_threads(), subprocess_script._hydra_subprocess_cmd
        watch, patience = subprocess_script._launch_process_observer, WAIT_SECONDS
        subprocess_script._hydra_subprocess_cmd = lambda local_rank: (self.command, os.getcwd())
        subprocess_script._launch_process_observer = self._watch  # type: ignore[assignment]
        try:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        except (DivergedError, NotLearning):  # to which all of them come
            raise
        except Exception as error:
            patience = NOTICE_SECONDS  # the others wait for this one
            # a process whose end of a collective is gone may take a moment to be so itself
            failed = self._failed(NOTICE_SECONDS) if _is_left_alone(error) and stopped_by() is None else None
            if failed is None:
                raise
            raise failed from error
        finally:
            self._over.set()
            subprocess_script._hydra_subprocess_cmd = lightnings
            subprocess_script._launch_process_observer = watch
            self._end_others(patience)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            torch.set_num_threads(threads)

    def _watch(self, processes: list[subprocess.Popen]) -> None:
        """In place of Lightning's watch over the others, which kills this process when one of them has failed."""
        threading.Thread(target=self._abandon, daemon=True, name="group-watch").start()

    def _abandon(self) -> None:
        """Where another process has failed and this one has not noticed some seconds later, it waits for that one
        within a collective, and for ever: end it from here."""
        while not self._over.wait(1.0):
            failed = self._failed(0.0)
            if failed is not None and not self._over.wait(2 * NOTICE_SECONDS):
                for process in self.procs:
                    process.kill()
                self.abandon(failed)
                return

    def _failed(self, seconds: float) -> LorafitError | Stopped | None:
        """What has become of another process that has not ended well; None where within so many seconds none has."""
        deadline = time.monotonic() + seconds
        while True:
            for process in self.procs:
                if code := process.poll():
                    return _failure(code)
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)

    def _end_others(self, seconds: float) -> None:
        """Wait for the others, and kill who still waits for this process, which may have failed alone."""
        for process in self.procs:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                log.warning(f"a process of the group has not ended in {seconds:g} s: it is killed")
            finally:  # a second signal does not wait either
                if process.poll() is None:
                    process.kill()
                    process.wait()


def _is_left_alone(error: Exception) -> bool:
    """Whether an error is what a collective says when another process of the group is gone."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and _LEFT_ALONE.search(str(error)) is not None
    )


def _failure(code: int) -> LorafitError | Stopped:
    """What the exit code of another process of the group says; a negative one is the signal that killed it."""
    number = -code if code < 0 else code - 128
    if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        return Stopped(number)
    if code == MemoryExhausted.exit_code:
        return MemoryExhausted("another process of the group has run out of memory, and says above what it held")
    if number == signal.SIGKILL:
        killed = GroupFailed("another process of the group was killed, as when the host has no memory left")
        killed.exit_code, killed.status = MemoryExhausted.exit_code, Stopped.status
        return killed
    name = signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"
    said = f"was killed by {name}" if code < 0 else f"has failed with exit code {code}, and says above why"
    failed = GroupFailed(f"another process of the group {said}")
    failed.exit_code = max(1, code)
    return failed


class JobDDP(DDPStrategy):
    """Data-parallel training of one run, or job of a sweep.

    command: what runs the same in the other processes. abandon: called from another thread, to end this process, where
    another has failed and this one cannot be reached.
    """

    def __init__(self, command: Sequence[str], abandon: Callable[[LorafitError | Stopped], object]) -> None:
        super().__init__()
        self.command, self.abandon = command, abandon

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = _OneJobLauncher(
            self.cluster_environment, self.num_processes, self.num_nodes, self.command, self.abandon
        )


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
