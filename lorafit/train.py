"""Fine-tune a language model with LoRA.

    python -m lorafit.train                                       the embedded model, rank 16: a minute
    python -m lorafit.train rank=16 quant=nf4                     the same over a 4-bit base: QLoRA
    python -m lorafit.train model.name=FOLDER data.path=FILE 'data.columns={prompt: question, completion: answer}'
    python -m lorafit.train -m rank=4,8,16,32 quant=none,nf4      eight runs
    python -m lorafit.train resume=RUN                            go on where a stopped run, or sweep, stood

It says what it will do, measures the base, trains, measures again, and leaves a run folder: `adapter/`, `checkpoints/`,
`metrics.json`, `history.jsonl`, `samples.jsonl`, `train.log`. Exit codes: 0 done, 2 wrong input, 3 diverged or an
alarm, 4 out of memory, 5 trained but not saved, 129, 130 and 143 stopped by a signal with a checkpoint saved.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from lorafit.build import is_main_process
from lorafit.config import Config, config_sha256
from lorafit.errors import DivergedError, InputError, LorafitError, MemoryExhausted, NotLearning, NotSaved, Stopped
from lorafit.jobs import record_settings
from lorafit.launch import start
from lorafit.rescue import before_training, remedy, require_within, tried_twice
from lorafit.results import note_metrics, write_metrics
from lorafit.resuming import holds_a_run, set_aside
from lorafit.stopping import stopped_by
from lorafit.sweep import (
    Beyond,
    Job,
    Shared,
    alone,
    has_checkpoint,
    is_completed,
    read_metrics,
    recorded_result,
    resumed,
    sweep_of,
)
from lorafit.terminal import say
from lorafit.training import Run, fine_tune

log = logging.getLogger(__name__)


_SHARED = Shared()  # by the jobs of a sweep in this process


def main() -> None:
    start("train", run, run_job)


def run(config: Config, folder: Path) -> float:
    """One run by itself: returns the held-out loss after training. Whatever happens, metrics.json says how it ended;
    after wrong input nothing half written is left."""
    sweep = sweep_of(folder) if config.resume else None
    job = Job(sweep, rungs=read_metrics(folder).get("rungs", {})) if sweep is not None else None
    with alone(folder) if is_main_process() else contextlib.nullcontext():
        this = Run(config, folder, Shared(), job, _abandon)
        try:
            return _recorded(this)
        except Stopped:
            if this.taken and has_checkpoint(folder):
                log.warning(f"it goes on from its last checkpoint with {shlex.quote(f'resume={folder}')}")
            raise
        except InputError as error:
            if this.taken and has_checkpoint(folder):  # a bad row that a stream has come to
                note_metrics(folder, this.metrics | {"status": error.status, "error": str(error)})
            elif this.taken:
                (folder / "metrics.json").unlink(missing_ok=True)
            raise


def run_job(config: Config, folder: Path, sweep: Path, until: float | None) -> float:
    """One job of a sweep: not run if its result is here, gone on with if it was begun. Returns its held-out loss, or
    NaN where it stands beyond the share of its steps, `until`, at which it was to be looked at.
    """
    with alone(folder) if is_main_process() else contextlib.nullcontext():
        require_within(Path(os.path.realpath(sweep)), folder)
        found = recorded_result(config, folder, until)
        if found is not None:
            say(f"done already: held-out loss {found:.4g}" if math.isfinite(found) else "done already")
            return found
        before, going_on = read_metrics(folder), resumed(config, folder)
        with before_training(folder):
            if going_on.resume is None:  # a checkpoint of nobody knows which settings is not to be found here later
                set_aside(folder)
            record_settings(folder, config)
        try:
            return _recorded(Run(going_on, folder, _SHARED, Job(sweep, until, before.get("rungs", {})), _abandon))
        except Beyond:
            say("it has come further already")
            return math.nan
        except InputError as error:
            refused = {"status": "failed", "error": str(error), "config_sha256": config_sha256(config)}
            note_metrics(folder, before | refused)
            raise
        finally:
            _SHARED.give_back()


def _recorded(this: Run) -> float:
    """`fine_tune`, with metrics.json written however it ends; for wrong input that is left to the caller."""
    if not is_main_process():
        return _in_group(this)
    try:
        loss = fine_tune(this)
    except (InputError, Beyond):
        raise
    except (Exception, Stopped) as error:
        stop = stopped_by()
        if isinstance(error, MemoryExhausted):
            this.shared.forget()
        if isinstance(error, LorafitError | Stopped):
            _note(this, error.status, str(error))
        elif stop is not None:  # a library has made another error of it
            _note(this, stop.status, str(stop))
            raise stop from error
        else:
            _note(this, "failed", f"{type(error).__name__}: {error}")
        raise
    folder = this.folder
    refused = tried_twice(lambda: write_metrics(folder, this.metrics), folder, "metrics.json")
    if refused is not None:
        raise NotSaved(
            f"{folder} does not take metrics.json ({refused.strerror}), without which the run looks unfinished. To "
            f"complete it, {remedy(refused)} and give {shlex.quote(f'resume={folder}')}"
        )
    return loss


def _note(this: Run, status: str, error: str) -> None:
    """Write into metrics.json how a run has failed. Before the folder is its own: not over what another run has left
    there, nor over the result of the run that it was to go on with."""
    if this.taken or not holds_a_run(this.folder):
        note_metrics(this.folder, this.metrics | {"status": status, "error": error})
    elif this.goes_on_here and not is_completed(this.folder):
        note_metrics(this.folder, read_metrics(this.folder) | {"status": status, "error": error})


def _abandon(this: Run, error: LorafitError | Stopped) -> NoReturn:
    """End the process from another thread: this one waits for what will never come."""
    _note(this, error.status, str(error))
    say(f"lorafit train: {error}", error=True)
    os._exit(error.exit_code)


def _in_group(this: Run) -> float:
    """`fine_tune` in a process other than the first of several. It ends well where all of them have come to the same
    end: Lightning kills the first one when another fails, and that has to write down what happened."""
    try:
        return fine_tune(this)
    except (DivergedError, NotLearning):
        sys.exit(0)
    except Stopped as stop:
        sys.exit(0 if this.trains else stop.exit_code)  # the others wait for one that has not begun


if __name__ == "__main__":
    main()
