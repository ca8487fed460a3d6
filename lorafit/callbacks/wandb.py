"""Weights & Biases: one run a job, offline unless asked otherwise, and never a question on the terminal.

The run is made here rather than by Lightning's logger, which in a sweep would go on writing into the first job's run;
`WandbLogger` is then given it. Whoever opens a run closes it (`finish`), also when training fails.

    JOB/wandb/run.json                 the run's id, by which a resumed job goes on in the same run
    JOB/wandb/offline-run-TIME-ID/     all of the run; artifacts/ in it holds the files of its artifacts
    SWEEP/wandb/offline-run-TIME-ID    a link to it: `wandb leet SWEEP/wandb` shows the sweep, and `wandb sync` takes
                                       the runs from either place
    JOB/wandb/replaced/                what a killed process left, until the run that goes on has ended

An offline run cannot be appended to. So a resumed job writes a new one, which first takes over what had been logged
up to the checkpoint: what is synced later is one run, complete, and no step of it comes twice.

W&B notes the files of artifacts by absolute path. `wandb sync` on a copy of the folder, where those paths do not
exist, sends everything but these files, and says nothing of it: `scripts/sync_wandb.py` puts the paths right first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger

from lorafit.errors import InputError, Paused, reason
from lorafit.files import write_atomically
from lorafit.redact import redact, redact_values

log = logging.getLogger(__name__)
FINISH_SECONDS = {False: 60.0, True: 1800.0}  # by whether it is sent to a server: an adapter may be large
_LARGEST_NOTE = 2**16  # bytes of a run.json
STEP = "trainer/global_step"  # what everything is drawn over, in the words of Lightning's logger


@contextlib.contextmanager
def wandb_logger(
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    mode: str = "offline",
    project: str = "lorafit",
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    job_type: str = "train",
    sweep: str | Path | None = None,
    history: Sequence[Mapping[str, Any]] = (),
) -> Iterator[WandbLogger | None]:
    """A Lightning logger over the W&B run of a run folder, finished on leaving: after an error with its exit code.

    sweep: the folder of the sweep that the run is a job of. history: what a resumed run has logged so far, points
    like {"step": 10, "train/loss": 1.2}. Without it the run begins anew, and is another one where the folder's run had
    ended well. None in place of a logger, and a warning, where W&B cannot be opened: its disk is full, its service does
    not start. Raises InputError when mode is "online" and no key is known, instead of asking for one.
    """
    folder = Path(folder).resolve()
    home = folder / "wandb"
    shared = Path(sweep).resolve() / "wandb" if sweep is not None else home
    with _environment(mode, shared):
        import wandb

        if mode == "online":
            _log_in()
        run = None
        try:
            home.mkdir(parents=True, exist_ok=True)
            run_id = _known_id(home, going_on=bool(history)) or secrets.token_hex(4)
            if mode != "disabled":
                _remember(home, run_id, None)
            with _arguments_redacted():
                run = wandb.init(
                    **redact_values({"project": project, "name": name, "group": group}),
                    tags=redact_values(tags),
                    job_type=job_type,
                    config=redact_values(config),
                    dir=folder,
                    mode=mode,  # type: ignore[arg-type]
                    id=run_id,
                    resume="allow" if mode == "online" else None,
                    reinit="create_new",
                    # a killed process loses what is not written yet, by default up to 15 seconds or 32 KiB
                    settings=wandb.Settings(console="off", silent=True, x_transaction_log_flush_interval=0.1),
                )
            place = Path(run.dir).parent
            os.environ["WANDB_DATA_DIR"] = str(place)
            run.define_metric(STEP)
            run.define_metric("*", step_metric=STEP, step_sync=True)
            run.define_metric("eval/loss", step_metric=STEP, step_sync=True, summary="min,last")
            if not run.resumed:  # no server has this run yet: all of it is told here
                for row in history:
                    run.log(_point(row))
                _set_aside(run_id, home, place)
            if mode != "disabled" and sweep is not None:
                _show(run_id, place, shared)
        except Exception as error:  # a full disk, a service that does not start: no training is lost over it
            log.warning(f"W&B cannot be opened ({reason(error)}): the run goes on without it")
            if run is not None:
                _finish(run, 1, mode)
            yield None
            return
        exit_code = 1
        try:
            yield WandbLogger(experiment=run)
            exit_code = 0
        except Paused:  # the run goes on later, or was not worth it: no failure
            exit_code = 0
            raise
        except BaseException as error:
            exit_code = getattr(error, "exit_code", 1)
            with contextlib.suppress(Exception):  # `error` is what is to be told
                run.summary.update({"status": getattr(error, "status", "failed"), "error": redact(reason(error))})
            raise
        finally:
            if _finish(run, exit_code, mode):
                with contextlib.suppress(OSError):
                    if mode != "disabled":
                        _remember(home, run_id, exit_code)
                shutil.rmtree(home / "replaced", ignore_errors=True)


def _finish(run: Any, exit_code: int, mode: str) -> bool:
    """Finish a run, unless its service has died or does not answer. Whether it is finished."""

    def finish() -> None:
        run.summary["exit_code"] = exit_code
        run.finish(exit_code=exit_code)

    error = _within(FINISH_SECONDS[mode == "online"], finish)
    if error is None:
        return True
    log.warning(
        f"W&B cannot finish its run ({reason(error)}): what it has not written is lost; history.jsonl holds the curves"
    )
    _end_service()
    return False


def _within(seconds: float, call: Callable[[], object]) -> BaseException | None:
    """Call what may never return, as anything of W&B when its service hangs. What it raises; TimeoutError where it has
    not returned in time, and is left to itself."""
    raised: list[BaseException] = []

    def called() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=called, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return TimeoutError(f"no answer in {seconds:g} s")
    return raised[0] if raised else None


def _end_service() -> None:
    """End a service that fails, or W&B would wait for it when the program ends; the next run starts one of its own."""
    with contextlib.suppress(Exception):
        from wandb.sdk import wandb_setup

        connection: Any = wandb_setup.singleton()._connection
        connection._proc._process.kill()
        _within(5, wandb_setup.teardown)


def log_summary(logger: Any, metrics: Mapping[str, Any]) -> None:
    """Put what metrics.json holds into the summary of the logger's run, so that charts can set runs against each other.

    The keys of `model` and `lora` stand alone ("parameters_trainable"), the others behind their part ("after/loss").
    "quant" is a word: "nf4", or "none".
    """
    if not isinstance(logger, WandbLogger):
        return
    parts = ("before", "after", "retention", "saved", "speed", "memory", "data", "rungs")
    flat = {f"{part}/{key}": value for part in parts for key, value in (metrics.get(part) or {}).items()}
    flat |= {key: value for part in ("model", "lora") for key, value in (metrics.get(part) or {}).items()}
    for rank, loss in (metrics.get("ladder") or {}).get("losses", {}).items():
        flat[f"ladder/{rank}"] = loss
    flat["status"] = metrics.get("status")
    flat["quant"] = ((metrics.get("model") or {}).get("quant") or {}).get("type", "none")
    kept = {key: value for key, value in flat.items() if isinstance(value, str | int | float)}
    logger.experiment.summary.update(redact_values(kept))


def log_adapter(logger: Any, folder: str | Path) -> None:
    """Keep an adapter's folder, with its card, as an artifact of the logger's run, of type "model" and named after it.

    Its files are copied into the run, where `wandb sync` finds them also after the adapter has changed.
    """
    if not isinstance(logger, WandbLogger):
        return
    import wandb

    folder, run = Path(folder), logger.experiment
    peft = json.loads((folder / "adapter_config.json").read_text())
    record = folder / "lorafit.json"
    measured = json.loads(record.read_text()).get("metrics", {}) if record.is_file() else {}
    metadata = {"base_model": peft["base_model_name_or_path"], "rank": peft["r"], "alpha": peft["lora_alpha"]}
    metadata |= {f"after/{key}": value for key, value in measured.get("after", {}).items()}
    metadata |= {f"retention/{key}": value for key, value in measured.get("retention", {}).items()}
    artifact = wandb.Artifact(artifact_name(run.name, run.id), type="model", metadata=redact_values(metadata))
    artifact.add_dir(str(folder))
    run.log_artifact(artifact)


def artifact_name(name: str | None, run_id: str) -> str:
    """What a run's adapter is called: W&B takes letters, digits, dots, dashes and underscores, 128 of them."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", name or "adapter").strip("-") or "adapter"
    return f"{words[:100]}-{run_id}"


@contextlib.contextmanager
def _arguments_redacted() -> Iterator[None]:
    """W&B keeps the command line as it finds it, in wandb-metadata.json."""
    given = sys.argv
    sys.argv = redact_values(given)
    try:
        yield
    finally:
        sys.argv = given


def _log_in() -> None:
    """Raise InputError unless the server knows who this is."""
    import wandb

    way_on = "Run `wandb login`, or use logger.mode=offline"
    try:
        known = wandb.login(prompt=False)
    except wandb.Error as error:  # a wrong key, or no network
        raise InputError(f"logger.mode=online: {reason(error).rstrip('.')}. {way_on}") from error
    if not known:
        raise InputError(f"logger.mode=online: no W&B key is known here. {way_on}")


@contextlib.contextmanager
def _environment(mode: str, shared: Path) -> Iterator[None]:
    """W&B is told by variables where to write, and to say nothing; they are put back afterwards."""
    names = ("WANDB_SILENT", "WANDB_MODE", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")
    before = {name: os.environ.get(name) for name in names}
    os.environ.setdefault("WANDB_SILENT", "true")
    if mode == "online":
        os.environ["WANDB_MODE"] = mode  # one that says offline would refuse to log in
    if mode == "offline":  # else artifacts are kept in the user's cache, as wherever W&B is used
        os.environ.setdefault("WANDB_CACHE_DIR", str(shared / "cache"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _known_id(home: Path, going_on: bool) -> str | None:
    """The id of the run that lies here, if it is that which begins now."""
    try:
        path = home / "run.json"
        known = json.loads(path.read_bytes()) if path.is_file() and path.stat().st_size < _LARGEST_NOTE else {}
        # the folder may be a stranger's, and the id becomes a part of names
        good = isinstance(known["id"], str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", known["id"])
        return known["id"] if good and (going_on or known["exit_code"] != 0) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _remember(home: Path, run_id: str, exit_code: int | None) -> None:
    text = json.dumps({"id": run_id, "exit_code": exit_code})
    write_atomically(home / "run.json", lambda file: file.write(text.encode()))


def _point(row: Mapping[str, Any]) -> dict[str, Any]:
    """A point of history.jsonl as it was logged."""
    numbers = {key: math.nan if value is None else value for key, value in row.items() if key != "step"}
    return numbers | {STEP: row["step"]}


def _set_aside(run_id: str, home: Path, place: Path) -> None:
    """Put away what earlier processes left of an offline run; `place` holds all of it now."""
    for older in home.glob(f"offline-run-*-{run_id}*"):  # of two in a second W&B gives the other one a number
        if older != place:
            (home / "replaced").mkdir(exist_ok=True)
            older.rename(home / "replaced" / older.name)


def _show(run_id: str, place: Path, shared: Path) -> None:
    """Link a run's folder into its sweep's, in place of what was linked there of the same run."""
    with contextlib.suppress(OSError):  # a file system without links: then the runs are found in their own folders
        shared.mkdir(parents=True, exist_ok=True)
        for link in shared.glob("*run-*"):  # of this run before, or of one whose folder was removed
            if link.is_symlink() and (run_id in link.name or not link.exists()):
                link.unlink()
        (shared / place.name).symlink_to(os.path.relpath(place, shared))
