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
import shlex
from pathlib import Path
from typing import Any

from lorafit.build import is_main_process
from lorafit.config import Config, config_sha256
from lorafit.errors import InputError, LorafitError, MemoryExhausted, NotSaved, Stopped
from lorafit.jobs import record_settings
from lorafit.launch import start
from lorafit.rescue import before_training, remedy, tried_twice
from lorafit.results import begin_metrics, note_metrics, write_metrics
from lorafit.resuming import set_aside
from lorafit.stopping import stopped_by
from lorafit.sweep import Beyond, Job, Shared, alone, read_metrics, recorded_result, resumed, sweep_of
from lorafit.terminal import say
from lorafit.training import fine_tune

log = logging.getLogger(__name__)


_SHARED = Shared()  # by the jobs of a sweep in this process


def main() -> None:
    start("train", run, run_job)


def run(config: Config, folder: Path) -> float:
    """One run by itself: returns the held-out loss after training. Whatever happens, metrics.json says how it ended;
    after wrong input nothing half written is left."""
    sweep, main = sweep_of(folder) if config.resume else None, is_main_process()
    job = Job(sweep, rungs=read_metrics(folder).get("rungs", {})) if sweep is not None else None
    with alone(folder) if main else contextlib.nullcontext():
        try:
            return _recorded(config, folder, Shared(), job)
        except Stopped:
            if main and any((folder / "checkpoints").glob("*.ckpt")):
                log.warning(f"it goes on from its last checkpoint with {shlex.quote(f'resume={folder}')}")
            raise
        except InputError as error:
            left = read_metrics(folder)
            if main and not config.resume and left.get("status") == Stopped.status:
                if any((folder / "checkpoints").glob("*.ckpt")):  # a bad row that a stream has come to
                    note_metrics(folder, left | {"status": error.status, "error": str(error)})
                else:
                    (folder / "metrics.json").unlink(missing_ok=True)
            raise


def run_job(config: Config, folder: Path, sweep: Path, until: float | None) -> float:
    """One job of a sweep: not run if its result is here, gone on with if it was begun. Returns its held-out loss, or
    NaN where it stands beyond the share of its steps, `until`, at which it was to be looked at.
    """
    with alone(folder) if is_main_process() else contextlib.nullcontext():
        found = recorded_result(config, folder, until)
        if found is not None:
            say(f"done already: held-out loss {found:.4g}" if math.isfinite(found) else "done already")
            return found
        before, going_on = read_metrics(folder), resumed(config, folder)
        if going_on.resume is None:  # a checkpoint of nobody knows which settings is not to be found here later
            with before_training(folder):
                set_aside(folder)
        with before_training(folder):
            record_settings(folder, config)
        try:
            return _recorded(going_on, folder, _SHARED, Job(sweep, until, before.get("rungs", {})))
        except Beyond:
            say("it has come further already")
            return math.nan
        except InputError as error:
            refused = {"status": "failed", "error": str(error), "config_sha256": config_sha256(config)}
            note_metrics(folder, before | refused)
            raise
        finally:
            _SHARED.give_back()


def _recorded(config: Config, folder: Path, shared: Shared, job: Job | None) -> float:
    """`fine_tune`, with metrics.json written however it ends; for wrong input that is left to the caller."""
    metrics: dict[str, Any] = {"status": "failed"}
    begin_metrics(metrics, config)
    if job is not None and job.rungs:
        metrics["rungs"] = job.rungs
    if not is_main_process():
        return fine_tune(config, folder, metrics, shared, job)
    try:
        loss = fine_tune(config, folder, metrics, shared, job)
    except (InputError, Beyond):
        raise
    except (LorafitError, Stopped) as error:
        if isinstance(error, MemoryExhausted):
            shared.forget()
        note_metrics(folder, metrics | {"status": error.status, "error": str(error)})
        raise
    except Exception as error:
        if (stop := stopped_by()) is not None:  # a library has made another error of it
            note_metrics(folder, metrics | {"status": stop.status, "error": str(stop)})
            raise stop from error
        note_metrics(folder, metrics | {"status": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    if (refused := tried_twice(lambda: write_metrics(folder, metrics), folder, "metrics.json")) is not None:
        raise NotSaved(
            f"{folder} does not take metrics.json ({refused.strerror}), without which the run looks unfinished. To "
            f"complete it, {remedy(refused)} and give resume={folder}"
        )
    return loss


if __name__ == "__main__":
    main()
