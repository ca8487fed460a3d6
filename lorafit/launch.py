"""The door: from a command line to jobs, and from an error to an exit code.

    def main() -> None:
        start("train", run)                 # run(config, folder) is called once per job

One run, or the jobs of a sweep (`-m`, or a file of conf/sweep). What goes wrong in a job of a sweep is recorded and the
others go on: jobs run in a process that is watched (supervisor.py), or where Hydra's launcher puts them. With
halving.factor the grid is searched by successive halving (Jamieson and Talwalkar 2016): all jobs train a little, the
better ones go on from where they stand.
"""

from __future__ import annotations

import gc
import io
import json
import logging
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import hydra
import hydra.version
import yaml
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lorafit.config import VERSION_BASE, postpone, prepare, quoted, typed
from lorafit.errors import InputError, LorafitError, Stopped, near_path, reason
from lorafit.explain import explain
from lorafit.schema import CONF, Config, check, to_dict
from lorafit.supervisor import IN_PROCESS, Roll, death, serve, supervise

Run = Callable[[Config, Path], float | None]
RunJob = Callable[[Config, Path, Path, float | None], float | None]
_failures = logging.getLogger("lorafit.failure")  # goes to the log file alone, see conf/train.yaml


def start(name: str, run: Run, job: RunJob | None = None, *, folder_key: str | None = None) -> None:
    """Run the program `name` with the overrides of the command line; `run` is called once per job.

    job: called in place of `run` for the jobs of a sweep, with the sweep's folder and the share of its steps to train.
    folder_key: of a program that works on a folder; it may be given without the key, and is the program's run folder.

    Returns when all jobs are done. Otherwise the process ends with the exit code of what went wrong: 2 for
    the user's errors (one message), 130 or 143 for a signal; a bug has its traceback.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach this function as they are
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of another encoding than the data
    hydra.version.setbase(VERSION_BASE)
    parser = get_args_parser()
    arguments = parser.parse_intermixed_args()
    overrides = arguments.overrides
    if arguments.experimental_rerun:
        _end(name, "--experimental-rerun is not supported: use resume=RUN", InputError.exit_code)
    own = import_module(f"lorafit.{name}") if _is_main(name) else None
    if own is not None:  # the workers of a parallel launcher find what it calls under the module's own name
        run, job = getattr(own, run.__name__), job and getattr(own, job.__name__)
    jobs = _Jobs(run, job)
    try:
        if folder_key is not None:
            overrides = _on_folder(overrides, folder_key)
        overrides = prepare(overrides)
        overrides, arguments.multirun = _replay(overrides, arguments.multirun)
        plan = None if _only_shows(arguments) else _plan(arguments, overrides)
        first = [f"hydra.job.name={name}", *_name_jobs(overrides)]
        if arguments.multirun or plan is not None:
            overrides = postpone(overrides)
        if plan is not None:
            overrides = [text for text in overrides if not text.startswith("hydra.sweep.dir=")]
            overrides.append(f"hydra.sweep.dir={quoted(plan.folder)}")
        arguments.overrides = [*first, *overrides]
        if plan is None:
            _run_hydra(arguments, parser, jobs, str(CONF), "train")
            if jobs.error is not None:
                raise jobs.error
            if jobs.roll is not None:
                try:
                    _conclude(name, jobs)
                finally:
                    jobs.roll.end()
        else:
            _sweep(name, plan, jobs, lambda: _run_hydra(arguments, parser, jobs, str(CONF), "train"))
    except LorafitError as error:
        _end(name, str(error), error.exit_code)
    except Stopped as stop:
        _end(name, f"{stop}{_way_on(name, jobs)}", stop.exit_code)
    except KeyboardInterrupt:
        _end(name, f"interrupted{_way_on(name, jobs)}", 130)
    except Exception as error:
        if hasattr(error, "__notes__"):  # it comes out of a job: a bug
            raise
        _end(name, explain(error, overrides, arguments.config_dir), InputError.exit_code)


def _is_main(name: str) -> bool:
    """Whether this is `python -m lorafit.NAME`, whose module is called __main__."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name == f"lorafit.{name}"


def _end(name: str, message: str, code: int) -> NoReturn:
    print(f"lorafit {name}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------- the command line


def _replay(overrides: list[str], multirun: bool) -> tuple[list[str], bool]:
    """`resume=RUN` means RUN's own overrides, then the ones given now, and goes on in RUN's own folder; the same with
    the folder of a sweep. Also returns whether this is one."""
    folder = next((text[7:].strip("'\"") for text in overrides if text.startswith("resume=")), "")
    path = Path(folder).expanduser()
    recorded, swept = path / ".hydra" / "overrides.yaml", path / "multirun.yaml"
    here = quoted(str(path))
    if folder and recorded.is_file() and not multirun:
        before = [text for text in yaml.safe_load(recorded.read_text()) or [] if text[:7] != "resume="]
        # the run may be one job of a sweep file, which is not to be swept again
        # and what it was started with stays as it is: these overrides may turn out to be wrong
        return [f"hydra.run.dir={here}", *before, *overrides, "hydra.mode=RUN", "hydra.output_subdir=null"], False
    if folder and swept.is_file():
        try:
            before = yaml.safe_load(swept.read_text())["hydra"]["overrides"]["task"]
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise InputError(f"resume: {swept} does not say what was swept ({reason(error)})") from None
        given = [text for text in overrides if not text.startswith("resume=")]
        # hydra.* is not among what a sweep records; the file of a sweep is, by its name
        return [*before, *given, f"hydra.sweep.dir={here}"], True
    return overrides, multirun


def _on_folder(overrides: list[str], key: str) -> list[str]:
    """The overrides with the folder that was given without its key, and with the run folder there."""
    plain = [text for text in overrides if "=" not in text and not text.startswith("~")]
    if len(plain) > 1:
        raise InputError(f"one folder at a time, got {', '.join(plain)}")
    overrides = [text for text in overrides if text not in plain] + [f"{key}={quoted(text)}" for text in plain]
    given = [text.partition("=")[2].strip("'\"") for text in overrides if text.startswith(f"{key}=")]
    if not given:
        return overrides
    folder = os.path.expanduser(plain[0] if plain else given[-1])
    if not os.path.isdir(folder):
        what = "is no folder" if os.path.exists(folder) else "there is no such folder"
        raise InputError(f"{key}: {folder!r}: {what}.{near_path(folder)}")
    overrides = [text for text in overrides if not text.startswith(f"{key}=")] + [f"{key}={quoted(folder)}"]
    if not any(text.startswith("hydra.run.dir=") for text in overrides):
        overrides.append(f"hydra.run.dir={quoted(folder)}")
    if not any(text.startswith("hydra.output_subdir=") for text in overrides):
        overrides.append("hydra.output_subdir=null")  # it may be a run itself, whose settings stay
    overrides.append("++hydra.job_logging.handlers.file.delay=true")  # no file in it where there is nothing to log
    return overrides


def _name_jobs(overrides: list[str]) -> list[str]:
    """Which keys all jobs of a sweep share: the names of their folders leave those out."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    fixed = [item.key_or_group for item in parsed if not item.is_sweep_override()]
    return [f"hydra.job.config.override_dirname.exclude_keys={json.dumps(fixed)}"] if fixed else []


def _only_shows(arguments: Any) -> bool:
    """Whether the command asks for nothing to be run (--help, --cfg and the like)."""
    names = ("help", "hydra_help", "cfg", "info", "version", "shell_completion")
    return any(getattr(arguments, name, None) for name in names)


@dataclass
class _Plan:
    """How a command sweeps. folder: of the sweep; basic: whether its jobs are those of a grid, run one after another
    here."""

    folder: str
    basic: bool
    factor: int | None
    first: float


def _plan(arguments: Any, overrides: list[str]) -> _Plan | None:
    """The plan of a sweep; None for a single run, and where the command is wrong: what runs it then says why."""
    if not arguments.multirun and not any(text.startswith(("sweep=", "hydra.mode=")) for text in overrides):
        return None
    if arguments.config_dir:
        path = "file://" + os.path.abspath(arguments.config_dir)
        overrides = [*overrides, f"hydra.searchpath=[{quoted(path)}]"]
    try:
        with hydra.initialize_config_dir(str(CONF), version_base=VERSION_BASE):
            composed = GlobalHydra.instance().hydra
            assert composed is not None
            values = composed.compose_config("train", postpone(overrides), RunMode.MULTIRUN, from_shell=False)
        if not arguments.multirun and values.hydra.mode != RunMode.MULTIRUN:
            return None
        parts = (values.hydra.launcher.get("_target_"), values.hydra.sweeper.get("_target_"))
        basic = [str(part).rpartition(".")[2] for part in parts] == ["BasicLauncher", "BasicSweeper"]
        factor, first = values.halving.factor, values.halving.first
        if factor is not None and not (isinstance(factor, int) and factor >= 2 and 0 < first < 1):
            factor = None  # which the check of each job names
        return _Plan(os.path.expanduser(values.hydra.sweep.dir), basic, factor, first)
    except Exception:
        return None


# ------------------------------------------------------------------------------------------------------------- the jobs


class _Jobs:
    """What Hydra calls for each job: type the config, check it, run; and what is known of them all.

    In a sweep nothing that goes wrong in a job is raised: it is told, and kept in the roll. Then the other jobs run,
    and Hydra adds no words of its own.
    """

    def __init__(self, run: Run, job: RunJob | None = None) -> None:
        self.run, self.job = run, job
        self.error: Exception | None = None  # of a single run
        self.roll: Roll | None = None
        self.sweep: Path | None = None
        # of successive halving: which round it is, how far it trains, and who takes part
        self.rung = 0
        self.until: float | None = None
        self.among: set[int] | None = None

    def __call__(self, values: DictConfig) -> float | None:
        hydra_config = HydraConfig.get()
        folder = Path(hydra_config.runtime.output_dir)
        if hydra_config.mode == RunMode.MULTIRUN:
            return self._in_sweep(values, hydra_config, folder)
        try:
            return self.run(_checked(values, hydra_config, folder), folder)
        except Exception as error:
            _log_failure(error)
            error.add_note(f"in the job of {folder}")
            self.error = error
            return None
        except (Stopped, KeyboardInterrupt) as stop:
            _failures.error("%s", str(stop) or "interrupted")
            raise

    def _in_sweep(self, values: DictConfig, hydra_config: Any, folder: Path) -> float | None:
        number, self.sweep = hydra_config.job.num, Path(hydra_config.sweep.dir)
        if self.roll is None:  # a sweep that some other file than those of conf/sweep asked for
            self.roll = Roll.begin(self.sweep)
        if self.among is not None and number not in self.among:
            return math.inf
        entry = self.roll.read(self.rung, number)
        if entry is not None and entry["name"] != folder.name:
            entry = None  # of a sweeper that does not ask for the same jobs again
        if entry is not None and entry["ended"] and "killed" not in entry:
            return entry.get("objective")  # done by a worker that was killed at a later job
        print(f"\njob {number}: {folder.name}  ->  {folder}", flush=True)
        if entry is None:
            entry = {"name": folder.name, "folder": str(folder), "ended": False}
            self.roll.write(self.rung, number, entry)
            entry |= self._run(values, hydra_config, folder)
        else:  # the worker before this one died while it ran this job
            entry |= {"error": death(entry.get("killed", 9)), "exit_code": 128 + entry.get("killed", 9)}
            _record_death(folder, entry["error"])
            print(f"job {number} failed: {entry['error']}", file=sys.stderr, flush=True)
        self.roll.write(self.rung, number, entry | {"ended": True})
        return entry.get("objective", math.inf)

    def _run(self, values: DictConfig, hydra_config: Any, folder: Path) -> dict[str, Any]:
        assert self.sweep is not None
        try:
            config = _checked(values, hydra_config, folder)
            if self.job is None:
                return {"objective": self.run(config, folder)}
            return {"objective": self.job(config, folder, self.sweep, self.until)}
        except Exception as error:
            _log_failure(error)
            said = str(error) if isinstance(error, LorafitError) else traceback.format_exc()
            print(f"job {hydra_config.job.num} failed: {said}", file=sys.stderr, flush=True)
            _free(error)
            told = str(error) if isinstance(error, LorafitError) else f"{type(error).__name__}: {error}"
            return {"error": told, "exit_code": getattr(error, "exit_code", 1)}
        except (Stopped, KeyboardInterrupt) as stop:
            _failures.error("%s", str(stop) or "interrupted")
            raise


def _checked(values: DictConfig, hydra_config: Any, folder: Path) -> Config:
    config = typed(values, hydra_config.overrides.task)
    check(config)
    if hydra_config.output_subdir is not None:
        resolved = folder / hydra_config.output_subdir / "resolved.yaml"
        resolved.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
    return config


def _log_failure(error: Exception) -> None:
    _failures.error("%s", error, exc_info=not isinstance(error, LorafitError))


def _record_death(folder: Path, said: str) -> None:
    """Put into metrics.json, which says "interrupted" since the job began to train, why it ended."""
    from lorafit.files import write_json
    from lorafit.sweep import read_metrics

    if (metrics := read_metrics(folder)).get("status") == Stopped.status:
        write_json(folder / "metrics.json", metrics | {"error": said})


def _free(error: BaseException | None) -> None:
    """Let go of what a failed job held: its traceback would keep the model while the others run."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


# ------------------------------------------------------------------------------------------------------------ the sweep


def _sweep(name: str, plan: _Plan, jobs: _Jobs, run_hydra: Callable[[], None]) -> None:
    """Run the jobs of a sweep, here or in a process that is watched, and tell how it went."""
    roll = serve()
    if roll is None:
        roll = Roll.begin(plan.folder)
        try:
            # torchrun starts each process of a group, and watches them itself
            if plan.basic and jobs.job is not None and not {IN_PROCESS, "LOCAL_RANK"} & os.environ.keys():
                folder = f"hydra.sweep.dir={quoted(plan.folder)}"
                jobs.sweep = Path(plan.folder)
                code = supervise([sys.executable, "-m", f"lorafit.{name}", *sys.argv[1:], folder], roll)
                if code < 0:
                    _end(name, f"stopped by {signal.Signals(-code).name}{_way_on(name, jobs)}", 128 - code)
                if code:
                    sys.exit(code)
                return
            _run_jobs(name, plan, jobs, roll, run_hydra)
        finally:
            roll.end()
    else:
        _run_jobs(name, plan, jobs, roll, run_hydra)


def _run_jobs(name: str, plan: _Plan, jobs: _Jobs, roll: Roll, run_hydra: Callable[[], None]) -> None:
    jobs.roll, jobs.sweep = roll, Path(plan.folder)
    jobs.until = None if plan.factor is None else plan.first
    while True:
        try:
            run_hydra()
        except Exception as error:
            if not roll.entries():
                raise
            # a parallel launcher has lost a worker
            _end(name, f"the launcher gave up: {reason(error)}\n{_tell(roll)}{_way_on(name, jobs)}", 1)
        if jobs.until is None:
            break
        _next_rung(plan, jobs, roll)
    _conclude(name, jobs)


def _conclude(name: str, jobs: _Jobs) -> None:
    """Tell how the sweep went; after a failure the process ends with the exit code of the first."""
    assert jobs.roll is not None
    entries = jobs.roll.entries()
    failed = [entry for entry in entries.values() if "error" in entry]
    if failed:
        several = len({number for _, number in entries}) > 1
        _end(name, _tell(jobs.roll) if several else failed[0]["error"], failed[0]["exit_code"])
    if jobs.job is not None:
        print(f"\nall jobs are done. What they say together: python -m lorafit.report {jobs.sweep}", flush=True)


def _next_rung(plan: _Plan, jobs: _Jobs, roll: Roll) -> None:
    """Choose who goes on: the better 1 / factor of those that came so far."""
    assert plan.factor is not None and jobs.until is not None
    results = {number: entry.get("objective") for (_, number), entry in roll.entries(jobs.rung).items()}
    ranked = sorted((loss, number) for number, loss in results.items() if loss is not None and math.isfinite(loss))
    going = ranked[: math.ceil(len(ranked) / plan.factor)]
    jobs.among = {number for _, number in going}
    until = jobs.until * plan.factor
    jobs.until = None if until >= 1 or len(going) <= 1 else until
    jobs.rung += 1
    if len(ranked) > len(going):
        names = {number: entry["name"] for (_, number), entry in roll.entries(jobs.rung - 1).items()}
        chosen = ", ".join(f"{names[number]} ({loss:.4g})" for loss, number in going)
        print(f"\nhalving: {len(going)} of {len(ranked)} jobs go on: {chosen}", flush=True)


def _tell(roll: Roll) -> str:
    entries = roll.entries()
    failed = {number: entry for (_, number), entry in entries.items() if "error" in entry or not entry["ended"]}
    lines = [f"  {entry['name']}: {entry.get('error', 'it did not end')}" for entry in failed.values()]
    return "\n".join([f"{len(failed)} of {len({number for _, number in entries})} jobs failed:", *lines])


def _way_on(name: str, jobs: _Jobs) -> str:
    """How a sweep that was stopped goes on."""
    if jobs.job is None or jobs.sweep is None:
        return ""
    return f"\nThe sweep goes on with: python -m lorafit.{name} resume={jobs.sweep}"
