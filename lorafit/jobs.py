"""What Hydra calls for each job: its configuration typed and checked, its settings written down, its end recorded.

In a single run errors come back to launch.py, which knows their exit codes. In a sweep nothing that goes wrong in a
job is raised: it is told, and kept in the roll of the command (supervisor.py), so that the other jobs run and
Hydra adds no words of its own.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lorafit.config import typed
from lorafit.errors import BusyError, DivergedError, LorafitError, MemoryExhausted, Stopped
from lorafit.files import write_atomically, write_json
from lorafit.redact import redact, redact_values
from lorafit.rescue import before_training, only_told
from lorafit.schema import Config, check, to_dict
from lorafit.stopping import stopped_by
from lorafit.supervisor import Roll, death
from lorafit.terminal import say

Run = Callable[[Config, Path], float | None]
RunJob = Callable[[Config, Path, Path, float | None], float | None]
_failures = logging.getLogger("lorafit.failure")  # goes to the log file alone, see conf/train.yaml


@dataclass
class _Running:
    """The job at hand: its configuration as composed, and Hydra's own."""

    values: DictConfig
    hydra: Any

    @functools.cached_property
    def files(self) -> dict[str, str]:
        """Hydra's three files of it; they are written more than once, and it takes long to lay them out."""
        given = [text for text in given_overrides() if not text.startswith("allow_changed=")]
        return {
            "overrides.yaml": _yaml(given),
            "config.yaml": _yaml(OmegaConf.to_container(self.values)),
            "hydra.yaml": _yaml({"hydra": OmegaConf.to_container(self.hydra)}),
        }


_running: _Running | None = None


class Jobs:
    """The jobs of one command. run: called with the configuration and the folder of each; job: in its place in a sweep,
    with the sweep's folder and the share of its steps to train as well (see `lorafit.sweep.Job`)."""

    def __init__(self, run: Run, job: RunJob | None = None) -> None:
        self.run, self.job = run, job
        self.error: Exception | None = None  # of a single run
        self.records = True  # whether a single run writes down its settings
        self.roll: Roll | None = None
        self.sweep: Path | None = None
        # of successive halving: which round it is, how far it trains, and who takes part
        self.rung = 0
        self.until: float | None = None
        self.among: set[int] | None = None

    def __call__(self, values: DictConfig) -> float | None:
        global _running
        hydra_config = HydraConfig.get()
        folder = Path(hydra_config.runtime.output_dir)
        _running = _Running(values, hydra_config)
        _log_while_possible()
        try:
            if hydra_config.mode == RunMode.MULTIRUN:
                return self._in_sweep(values, hydra_config, folder)
            return self._alone(values, hydra_config, folder)
        except (Stopped, KeyboardInterrupt) as stop:
            _failures.error("%s", str(stop) or "interrupted")
            raise
        finally:
            _running = None

    def _alone(self, values: DictConfig, hydra_config: Any, folder: Path) -> float | None:
        # in a folder that is another run's, only when it is put aside: this command may be refused
        records = self.records and not _is_taken(folder)
        try:
            if records:  # first of all: a run that is killed, or refused, has it
                with before_training(folder):
                    record_command(folder)
            config = _checked(values, hydra_config)
            if records:
                with before_training(folder):
                    record_settings(folder, config)
            return self.run(config, folder)
        except Exception as error:
            _log_failure(error)
            error.add_note(f"in the job of {folder}")
            self.error = error
            return None

    def _in_sweep(self, values: DictConfig, hydra_config: Any, folder: Path) -> float | None:
        number, self.sweep = hydra_config.job.num, Path(hydra_config.sweep.dir)
        _redact_file(self.sweep / "multirun.yaml")
        if self.roll is None:  # a sweep that some other file than those of conf/sweep asked for
            self.roll = Roll.begin(self.sweep)
        if self.among is not None and number not in self.among:
            return math.inf
        entry = self.roll.read(self.rung, number)
        if entry is not None and entry["name"] != folder.name:
            entry = None  # of a sweeper that does not ask for the same jobs again
        if entry is not None and entry["ended"] and "died" not in entry:
            return entry.get("objective")  # done by a worker that died at a later job
        say(f"\njob {number}: {folder.name}  ->  {folder}")
        said, code = death(entry.pop("died", -9)) if entry is not None else ("", 0)
        if entry is not None and _record_death(folder, said):
            entry |= {"error": said, "exit_code": code}
            say(f"job {number} failed: {said}", error=True)
        else:
            entry = {"name": folder.name, "folder": str(folder), "ended": False}
            self.roll.write(self.rung, number, entry)
            entry |= self._run(values, hydra_config, folder)
        self.roll.write(self.rung, number, entry | {"ended": True})
        return entry.get("objective", math.inf)

    def _run(self, values: DictConfig, hydra_config: Any, folder: Path) -> dict[str, Any]:
        assert self.sweep is not None
        try:
            config = _checked(values, hydra_config)
            if self.job is not None:
                return {"objective": self.job(config, folder, self.sweep, self.until)}
            with before_training(folder):
                record_settings(folder, config)
            return {"objective": self.run(config, folder)}
        except Exception as error:
            if (stop := stopped_by()) is not None:
                raise stop from error
            _log_failure(error)
            said = str(error) if isinstance(error, LorafitError) else traceback.format_exc()
            say(f"job {hydra_config.job.num} failed: {said}", error=True)
            _free(error)
            told = redact(str(error) if isinstance(error, LorafitError) else f"{type(error).__name__}: {error}")
            own = not isinstance(error, BusyError) and not folder.is_symlink()  # what it is refused for may be a link
            refused = self.job is not None and own
            if refused and not (folder / "metrics.json").exists():  # before it was called
                with contextlib.suppress(OSError):  # it may be the disk that was refused
                    _record_refusal(folder, told)
            return {"error": told, "exit_code": getattr(error, "exit_code", 1)}
        except SystemExit as end:
            said = f"something in it ended the program (exit code {end.code})"
            say(f"job {hydra_config.job.num} failed: {said}", error=True)
            return {"error": said, "exit_code": 1}


def _is_taken(folder: Path) -> bool:
    """Whether a folder holds a run, or a process is at work in it."""
    from lorafit.resuming import holds_a_run
    from lorafit.sweep import is_busy

    return holds_a_run(folder) or is_busy(folder)


def _log_while_possible() -> None:
    """A line that train.log does not take is left out, where Python's logging would print a traceback for each."""

    def missed(handler: logging.Handler, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            logging.Handler.handleError(handler, record)

    for handler in {*logging.getLogger().handlers, *_failures.handlers}:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = functools.partial(missed, handler)  # type: ignore[method-assign]


def _checked(values: DictConfig, hydra_config: Any) -> Config:
    config = typed(values, _as_given(hydra_config))
    check(config)
    return config


def is_program() -> bool:
    """Whether a run is that of a command line, and not of a function that somebody calls."""
    return _running is not None


def record_settings(folder: Path, config: Config) -> None:
    """Write down in .hydra by what settings the run in `folder` goes, secrets as ***. Hydra would do so with the
    secrets, and before anybody has looked at what is in the folder; so it is told not to."""
    if is_program():
        record_command(folder)
        _write(folder / ".hydra" / "resolved.yaml", _yaml(to_dict(config)))


def record_command(folder: Path) -> None:
    """The part of `record_settings` that is known before the configuration is checked: Hydra's three files."""
    if _running is None:
        return
    for name, text in _running.files.items():
        _write(folder / ".hydra" / name, text)


def given_overrides() -> list[str]:
    """The overrides of the job at hand as they were given, secrets and all; without resume, and of what was said twice
    the last."""
    assert _running is not None
    given = [text for text in _as_given(_running.hydra) if not text.startswith("resume=")]
    return list({text.partition("=")[0]: text for text in given}.values())


def _as_given(hydra_config: Any) -> list[str]:
    """The overrides of a job, in which an interpolation stands as it was written: to iterate would compute it."""
    given: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    return given


def _yaml(value: Any) -> str:
    """A value as YAML, secrets as ***."""
    # before it becomes YAML, where a bare *** is an error
    return OmegaConf.to_yaml(OmegaConf.create(redact_values(value)))


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _redact_file(path: Path) -> None:
    """Put *** for secrets in a YAML file of Hydra's, which lists overrides and settings of a sweep."""
    with contextlib.suppress(OSError, ValueError):
        text = path.read_text()
        if redact(text) != text:
            _write(path, _yaml(yaml.safe_load(text)))


def config_folder() -> str | None:
    """The user's own folder of settings that the job at hand was composed with (--config-dir)."""
    sources = [] if _running is None else _running.hydra.runtime.config_sources
    return next((source.path for source in sources if source.provider == "command-line"), None)


def _log_failure(error: Exception) -> None:
    _failures.error("%s", error, exc_info=not isinstance(error, LorafitError))


def _record_death(folder: Path, said: str) -> bool:
    """Put into metrics.json why the process of a job died. False where the job had ended before that."""
    from lorafit.sweep import read_metrics

    metrics = read_metrics(folder)
    if metrics.get("status") in ("completed", DivergedError.status, MemoryExhausted.status):
        return False
    if metrics:  # else it had not begun to train
        with only_told(folder / "metrics.json", "it does not say how the job ended"):
            write_json(folder / "metrics.json", metrics | {"status": Stopped.status, "error": said})
    return True


def _record_refusal(folder: Path, said: str) -> None:
    if _running is not None:
        _write(folder / ".hydra" / "overrides.yaml", _yaml(_as_given(_running.hydra)))
    write_json(folder / "metrics.json", {"status": "failed", "error": said})


def _free(error: BaseException | None) -> None:
    """Let go of what a failed job held: its traceback would keep the model while the others run."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
