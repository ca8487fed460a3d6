"""The processes of a run on several devices: begun with a command of our own, watched, and ended together.

Of a group that shares its gradients each process waits for the others. Where one fails alone the first, which writes
the run's files, is to say so and to end with that one's exit code; Lightning would kill it in the middle of its work.
It notices by itself where its end of a collective breaks, and is ended from a thread where it would wait for ever.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from lorafit.errors import DivergedError, GroupFailed, LorafitError, MemoryExhausted, NotLearning, Stopped
from lorafit.stopping import is_urgent, signal_name, stopped_by

log = logging.getLogger(__name__)
WAIT_SECONDS = 60.0  # how long the other processes of a group may take to end after the first one
NOTICE_SECONDS = 5.0  # how long it may take until one notices that another is gone
STOP_SECONDS = 15.0  # how long the others may take to end after a signal, of which they have heard as well
HURRY_SECONDS = 2.0  # and after a second one, which leaves five seconds to all of it
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
        except Stopped:
            patience = HURRY_SECONDS if is_urgent() else STOP_SECONDS
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
    said = (
        f"was killed by {signal_name(number)}" if code < 0 else f"has failed with exit code {code}, and says above why"
    )
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
