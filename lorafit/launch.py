"""The door: from a command line to jobs, and from an error to an exit code.

    def main() -> None:
        start("train", run)                 # run(config, folder) is called once per job

One run, or the jobs of a sweep (`-m`, or a file of conf/sweep). What goes wrong in a job of a sweep is recorded and the
others go on: jobs run in a process that is watched (supervisor.py), or where Hydra's launcher puts them. With
halving.factor the grid is searched by successive halving (Jamieson and Talwalkar 2016): all jobs train a little, the
better ones go on from where they stand.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import hydra
import hydra.version
import yaml
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from lorafit.config import VERSION_BASE, compose, config_sha256, postpone, prepare, quoted, unquoted
from lorafit.errors import InputError, LorafitError, Stopped, near_path
from lorafit.explain import explain
from lorafit.files import write_json
from lorafit.jobs import Jobs, Run, RunJob
from lorafit.recorded import trusted_overrides
from lorafit.redact import redact_logs, redact_tracebacks, redact_values
from lorafit.rescue import only_told, require_own_folder, require_own_sweep, unwritable
from lorafit.schema import CONF
from lorafit.stopping import signal_name, stopped_by, stopping
from lorafit.supervisor import IN_PROCESS, ROLL, Roll, handling, serve, supervise
from lorafit.sweep import has_checkpoint
from lorafit.terminal import say

_AUTO = "resume=auto"
_NO_SWEEP = ("hydra.run.dir=", "hydra.job.name=", "hydra.output_subdir=", "hydra.mode=RUN")  # what these say
_LARGEST = 2**20  # bytes of recorded overrides: far more than a command line has
_COMMANDS = "sweep.json"  # in a sweep's folder: the commands that began it


def start(name: str, run: Run, job: RunJob | None = None, *, folder_key: str | None = None) -> None:
    """Run the program `name` with the overrides of the command line; `run` is called once per job.

    job: called in place of `run` for the jobs of a sweep, with the sweep's folder and the share of its steps to train.
    folder_key: of a program that works on a folder; it may be given without the key, and is the program's run folder.

    Returns when all jobs are done. Otherwise the process ends with the exit code of what went wrong: 2 for
    the user's errors (one message), 129, 130 or 143 for a signal; a bug has its traceback.
    """
    with stopping() as signals:
        try:
            _start(name, run, job, folder_key)
        except Stopped as stop:  # where there is no more to say of it
            _end(name, str(stop), stop.exit_code)
        finally:
            if _is_main(name):
                signals.leave()


def _start(name: str, run: Run, job: RunJob | None, folder_key: str | None) -> None:
    redact_logs()
    redact_tracebacks()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach this function as they are
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of another encoding than the data
    hydra.version.setbase(VERSION_BASE)
    parser = get_args_parser()
    jobs = Jobs(run, job)
    try:
        arguments = parser.parse_intermixed_args(_replay_sweep(sys.argv[1:]))
    except LorafitError as error:
        _end(name, str(error), error.exit_code)
    overrides = arguments.overrides
    if arguments.experimental_rerun:
        _end(name, "--experimental-rerun is not supported: use resume=RUN", InputError.exit_code)
    own = import_module(f"lorafit.{name}") if _is_main(name) else None
    if own is not None:  # the workers of a parallel launcher find what it calls under the module's own name
        jobs = Jobs(getattr(own, run.__name__), job and getattr(own, job.__name__))
    try:
        if folder_key is not None:
            overrides = _on_folder(overrides, folder_key)
        overrides = prepare(overrides)
        require_one_sweep(overrides)
        if _AUTO in overrides:
            sought = _seek(overrides, arguments)
            if sought is None:
                return
            overrides = sought
        else:
            overrides = _replay(overrides, arguments.multirun)
        shows = _only_shows(arguments)
        writes = job is not None and not shows
        plan = None if shows else _plan(arguments, overrides)
        first = [f"hydra.job.name={name}", *_name_jobs(overrides, plan.params if plan is not None else ())]
        if arguments.multirun or plan is not None:
            overrides = postpone(overrides)
        if plan is not None:
            if _resumed(overrides) is not None and job is not None:
                raise InputError(
                    "resume=RUN goes on with one run, and this command sweeps: leave resume out (a sweep with the same "
                    "hydra.sweep.dir goes on by itself), or give resume=SWEEP, the folder of a sweep"
                )
            overrides = [text for text in overrides if not text.startswith("hydra.sweep.dir=")]
            overrides.append(f"hydra.sweep.dir={quoted(plan.folder)}")
            if writes:
                require_own_sweep(Path(plan.folder))
        elif writes and (given := _run_folder(overrides)) is not None and "${" not in given:
            require_own_folder(Path(given))
        if not shows:  # Hydra would write down secrets as they are: jobs.py writes its files
            jobs.records = "hydra.output_subdir=null" not in overrides
            overrides = [*overrides, "hydra.output_subdir=null"]
        arguments.overrides = [*first, *overrides]
        if plan is None:
            with _single(arguments, overrides):
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
        if (asked := stopped_by()) is not None:  # a library has made another error of it
            _end(name, f"{asked}{_way_on(name, jobs)}", asked.exit_code)
        if hasattr(error, "__notes__"):  # it comes out of a job: a bug
            raise
        if (said := unwritable(error)) is not None:  # Hydra makes the run folder
            _end(name, said, InputError.exit_code)
        _end(name, explain(error, overrides, arguments.config_dir), InputError.exit_code)


def _is_main(name: str) -> bool:
    """Whether this is `python -m lorafit.NAME`, whose module is called __main__."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name == f"lorafit.{name}"


def _end(name: str, message: str, code: int) -> NoReturn:
    say(f"lorafit {name}: {message}", error=True)
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------- the command line


def _replay(overrides: list[str], multirun: bool) -> list[str]:
    """`resume=RUN` means RUN's own overrides, then the ones given now, and goes on in RUN's own folder."""
    folder = _resumed(overrides)
    if multirun or folder is None:
        return overrides
    recorded = folder / ".hydra" / "overrides.yaml"
    if not os.path.isfile(recorded):
        if not has_checkpoint(folder):  # it is refused later, as no run
            return overrides
        say(f"{recorded} is not there: {folder} goes on with the settings of this command alone", error=True)
        return [f"hydra.run.dir={quoted(str(folder))}", *overrides, "hydra.mode=RUN"]
    try:
        given = yaml.safe_load(recorded.read_text()) if recorded.stat().st_size < _LARGEST else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        given = None
    if isinstance(given, list):  # of anything: the text of a few lines of YAML may have no end
        given = [text for text in given if not isinstance(text, str) or text[:7] != "resume="]
    before = trusted_overrides(given, recorded, overrides)
    # the run may be one job of a sweep file, which is not to be swept again
    # and what it was started with stays as it is: these overrides may turn out to be wrong
    return [f"hydra.run.dir={quoted(str(folder))}", *before, *overrides, "hydra.mode=RUN", "hydra.output_subdir=null"]


def require_one_sweep(overrides: list[str]) -> None:
    """Raise InputError where several files of conf/sweep are given as one sweep over them."""
    for text in overrides:
        value = text.removeprefix("sweep=")
        if value != text and "," in value and not value.startswith("["):
            raise InputError(f"sweep={value} would run each file as one job: give 'sweep=[{value}]' for both at once")


def _run_folder(overrides: list[str]) -> str | None:
    """The folder that the command gives to its run."""
    given = _given(overrides, "hydra.run.dir")
    return os.path.expanduser(given) if given is not None else None


def _resumed(overrides: list[str]) -> Path | None:
    """The folder that the command resumes."""
    given = _given(overrides, "resume")
    return Path(os.path.expanduser(given)) if given not in (None, "", "auto") else None


def _given(overrides: list[str], key: str) -> str | None:
    """What the command gives for a key, quoted or not; of several, as in Hydra, the last."""
    given = [text for text in overrides if text.startswith(f"{key}=")]
    return unquoted(prepare(given[-1:])[0].partition("=")[2]) if given else None


def _seek(overrides: list[str], arguments: Any) -> list[str] | None:
    """`resume=auto`: see to it that what the command asks for is done. The overrides with which the newest run of
    these settings, or sweep of this command, goes on, or those of a new one; None where it is done already."""
    from lorafit.resuming import find_run, is_done

    rest = [text for text in overrides if text != _AUTO]
    if arguments.multirun or any(text.startswith(("sweep=", "hydra.mode=")) for text in rest):
        return _seek_sweep(rest)
    values = [text for text in rest if not text.startswith("hydra.")]
    given = _run_folder(rest)
    if given is not None and "${" in given:
        raise InputError(f"resume=auto: hydra.run.dir={given} is a new folder each time: give a fixed one, or none")
    if given is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("resume=auto: several processes must find the same run: give hydra.run.dir=FOLDER as well")
    sha256 = config_sha256(compose(values, arguments.config_dir))
    found = find_run(sha256, Path(given) if given is not None else None)
    if found is None:
        where = given or "outputs"
        say(f"resume=auto: in {where} there is no run of these settings: a new one begins")
        return rest
    if is_done(found, sha256):
        say(f"resume=auto: the run of these settings in {found} is done already")
        return None
    say(f"resume=auto: it goes on in {found}")
    folder = quoted(str(found))
    return [*rest, f"resume={folder}", f"hydra.run.dir={folder}", "hydra.mode=RUN", "hydra.output_subdir=null"]


def _seek_sweep(overrides: list[str]) -> list[str]:
    """The same for a sweep, whose jobs that are done are not run again in any case."""
    if any(text.startswith("hydra.sweep.dir=") for text in overrides):
        return overrides
    given = redact_values([text for text in sys.argv[1:] if text != _AUTO])
    for path in sorted(Path().glob(f"multirun/*/*/{_COMMANDS}"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(OSError, ValueError, LookupError):
            if json.loads(path.read_text())[-1] == given:
                say(f"resume=auto: the sweep goes on in {path.parent}")
                return [*overrides, f"hydra.sweep.dir={quoted(str(path.parent))}"]
    say("resume=auto: there is no sweep of this command in multirun: a new one begins")
    return overrides


def _replay_sweep(arguments: list[str]) -> list[str]:
    """`resume=SWEEP` means the command that began the sweep (the last one, of several), then what is given now.

    Only settings of lorafit are taken over: Hydra's own, such as the commands that a launcher runs on a node, are not
    to come out of a folder that may be a stranger's.
    """
    folder = _resumed(arguments)
    if folder is None or not os.path.isfile(folder / _COMMANDS):
        return arguments
    try:
        before = json.loads((folder / _COMMANDS).read_text())[-1]
        assert isinstance(before, list) and all(isinstance(text, str) for text in before)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, AssertionError):
        raise InputError(f"resume: {folder / _COMMANDS} does not say what was swept: give the command again") from None
    named = [text for text in before if text[:19] == "hydra.sweep.subdir=" and not re.search(r":|\.\.|=/", text)]
    own = ("-m", "--multirun", *named)
    before = [text for text in before if text not in own and text[:16] != "hydra.sweep.dir="]
    # a worker's command has said what is not taken over
    again = [*arguments, *(before if ROLL in os.environ else ())]
    mine = [*trusted_overrides(before, folder / _COMMANDS, again), *named]
    given = [text for text in arguments if not text.startswith("resume=")]
    return ["-m", *mine, *given, f"hydra.sweep.dir={quoted(str(folder))}"]


def _note_command(folder: Path, roll: Roll, at_end: bool = False) -> None:
    """Keep in a sweep's folder by which command it goes on: the first from its beginning, a later one when some of its
    jobs were not refused. One that came to no job is forgotten."""
    path, before = folder / _COMMANDS, []
    if at_end and not roll.entries():
        with contextlib.suppress(OSError, ValueError):
            if len(json.loads(path.read_text())) == 1 and not any(folder.glob("*/metrics.json")):
                path.unlink()
        return
    accepted = any(entry.get("exit_code") != InputError.exit_code for entry in roll.entries().values())
    if path.is_file() and not accepted:
        return
    if path.is_file():
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(path.read_text())
            before = found if isinstance(found, list) else []
    given = redact_values([text for text in sys.argv[1:] if not text.startswith("resume=")])
    if _resumed(sys.argv[1:]) is None and given not in before[-1:]:
        with only_told(path, "resume=SWEEP does not know this command") if at_end else contextlib.nullcontext():
            write_json(path, [*before, given])


def _on_folder(overrides: list[str], key: str) -> list[str]:
    """The overrides with the folder that was given without its key, and with the run folder there."""
    # a folder's name may hold a "=", as those of a sweep's jobs do
    plain = [
        text
        for text in overrides
        if os.path.isdir(text) or "/" in text.partition("=")[0] or ("=" not in text and not text.startswith("~"))
    ]
    plain = [text for text in plain if not text.startswith(("hydra/", "lora/"))]
    if len(plain) > 1:
        raise InputError(f"one folder at a time, got {', '.join(plain)}")
    overrides = [text for text in overrides if text not in plain] + [f"{key}={quoted(text)}" for text in plain]
    given = _given(overrides, key)
    if given is None:
        return overrides
    folder = os.path.expanduser(plain[0] if plain else given)
    if not os.path.isdir(folder):
        if os.path.exists(folder):
            raise InputError(f"{key}: {folder!r} is a file: give the folder of a sweep or of a run")
        raise InputError(f"{key}: {folder!r}: there is no such folder.{near_path(folder)}")
    overrides = [text for text in overrides if not text.startswith(f"{key}=")] + [f"{key}={quoted(folder)}"]
    if not any(text.startswith("hydra.run.dir=") for text in overrides):
        if not os.access(folder, os.W_OK):
            raise InputError(
                f"{key}: {folder!r} cannot be written to: give hydra.run.dir=OTHER for what is to be written"
            )
        overrides.append(f"hydra.run.dir={quoted(folder)}")
    if not any(text.startswith("hydra.output_subdir=") for text in overrides):
        overrides.append("hydra.output_subdir=null")  # it may be a run itself, whose settings stay
    overrides.append("++hydra.job_logging.handlers.file.delay=true")  # no file in it where there is nothing to log
    return overrides


def _name_jobs(overrides: list[str], params: Collection[str] = ()) -> list[str]:
    """Which keys all jobs of a sweep share: the names of their folders leave those out.

    params: what the file of a sweep varies, also where the command gives it one value. A sweep of one job is named by
    its rank and its quant, where those are given.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    varied = {*params, *(item.key_or_group for item in parsed if item.is_sweep_override())}
    varied = varied or {"rank", "quant"}
    fixed = [item.key_or_group for item in parsed if item.key_or_group not in varied]
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
    params: tuple[str, ...] = ()  # what the file of a sweep varies


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
        params = tuple(map(str, values.hydra.sweeper.get("params") or ()))
        return _Plan(os.path.expanduser(values.hydra.sweep.dir), basic, factor, first, params)
    except Exception:
        return None


@contextlib.contextmanager
def _single(arguments: Any, overrides: list[str]) -> Iterator[None]:
    """Hydra composes all of the configuration once more, only to ask whether it is a sweep: not where it cannot be one,
    since every file that may say so is ours."""
    strange = arguments.multirun or arguments.config_dir or arguments.config_path or arguments.config_name
    strange = strange or any(text.lstrip("+").startswith("experiment") for text in overrides)  # one of the user's own
    if strange or any(text.lstrip("+~").startswith("hydra") and not text.startswith(_NO_SWEEP) for text in overrides):
        yield
        return
    asked = Hydra.get_mode
    Hydra.get_mode = lambda *_, **__: RunMode.RUN  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = asked  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------------------------ the sweep


def _sweep(name: str, plan: _Plan, jobs: Jobs, run_hydra: Callable[[], None]) -> None:
    """Run the jobs of a sweep, here or in a process that is watched, and tell how it went."""
    roll = serve()
    if roll is None:
        try:
            roll = Roll.begin(plan.folder)
        except OSError as error:
            raise InputError(f"hydra.sweep.dir: {plan.folder!r} cannot be written to ({error.strerror})") from error
        try:
            if jobs.job is not None:
                _note_command(Path(plan.folder), roll)
            # torchrun starts each process of a group, and watches them itself
            if plan.basic and jobs.job is not None and not {IN_PROCESS, "LOCAL_RANK"} & os.environ.keys():
                folder = f"hydra.sweep.dir={quoted(plan.folder)}"
                jobs.sweep = Path(plan.folder)
                code = supervise([sys.executable, "-m", f"lorafit.{name}", *sys.argv[1:], folder], roll)
                if code < 0:
                    _end(name, f"stopped by {signal_name(-code)}{_way_on(name, jobs)}", 128 - code)
                if code:
                    sys.exit(code)
                return
            _run_jobs(name, plan, jobs, roll, run_hydra)
        finally:
            if jobs.job is not None:
                _note_command(Path(plan.folder), roll, at_end=True)
            roll.end()
    else:
        _run_jobs(name, plan, jobs, roll, run_hydra)


def _run_jobs(name: str, plan: _Plan, jobs: Jobs, roll: Roll, run_hydra: Callable[[], None]) -> None:
    jobs.roll, jobs.sweep = roll, Path(plan.folder)
    jobs.until = None if plan.factor is None or jobs.job is None else plan.first
    while True:
        try:
            # the jobs of another launcher run elsewhere: an end of this process is to reach them too
            with contextlib.nullcontext() if plan.basic else handling((signal.SIGTERM,), _stop):
                run_hydra()
        except Exception as error:
            if not roll.entries():
                raise
            said, code = unwritable(error), InputError.exit_code
            if said is None:  # a parallel launcher has lost a worker
                said, code = " ".join(str(error).split())[:400] or type(error).__name__, 1
                said = f"the launcher gave up: {said}\n{_tell(roll)}"
            _end(name, f"{said}{_way_on(name, jobs)}", code)
        if jobs.until is None:
            break
        _next_rung(plan, jobs, roll)
    _conclude(name, jobs)


def _stop(signum: int, _: object) -> NoReturn:
    raise Stopped(signum)


def _conclude(name: str, jobs: Jobs) -> None:
    """Tell how the sweep went; after a failure the process ends with the exit code of the first."""
    assert jobs.roll is not None and jobs.sweep is not None
    entries = jobs.roll.entries()
    failed = [entry for entry in entries.values() if "error" in entry]
    if failed:
        several = len({number for _, number in entries}) > 1
        _end(name, _tell(jobs.roll) if several else failed[0]["error"], failed[0]["exit_code"])
    if jobs.job is not None:
        others = _not_ended(jobs.sweep, {entry["name"] for entry in entries.values()})
        if others:
            say(f"\nbegun by another command, and not at their end: {', '.join(others)}")
        say(f"\nall jobs are done. What they say together: python -m lorafit.report {shlex.quote(str(jobs.sweep))}")


def _not_ended(sweep: Path, asked: set[str]) -> list[str]:
    """The jobs of a sweep's folder that this command did not ask for, and that were stopped before their end."""
    from lorafit.sweep import read_metrics

    folders = sorted(path.parent for path in sweep.glob("*/metrics.json") if path.parent.name not in asked)
    return [folder.name for folder in folders if read_metrics(folder).get("status") == Stopped.status]


def _next_rung(plan: _Plan, jobs: Jobs, roll: Roll) -> None:
    """Choose who goes on: the better 1 / factor of those that stand at this rung, and those that stand beyond it."""
    assert plan.factor is not None and jobs.until is not None
    results = {number: entry for (_, number), entry in roll.entries(jobs.rung).items() if "error" not in entry}
    beyond = {number for number, entry in results.items() if math.isnan(entry["objective"])}
    ranked = sorted((results[number]["objective"], number) for number in results.keys() - beyond)
    ranked = [item for item in ranked if math.isfinite(item[0])]
    going = ranked[: math.ceil(len(ranked) / plan.factor)]
    jobs.among = {number for _, number in going} | beyond
    until = jobs.until * plan.factor
    jobs.until = None if until >= 1 or len(jobs.among) <= 1 else until
    jobs.rung += 1
    if len(ranked) > len(going):
        chosen = ", ".join(f"{results[number]['name']} ({loss:.4g})" for loss, number in going)
        say(f"\nhalving: {len(going)} of {len(ranked)} jobs go on: {chosen}")


def _tell(roll: Roll) -> str:
    entries = roll.entries()
    failed = {number: entry for (_, number), entry in entries.items() if "error" in entry or not entry["ended"]}
    lines = [f"  {entry['name']}: {entry.get('error', 'it has not ended, or still runs')}" for entry in failed.values()]
    return "\n".join([f"{len(failed)} of {len({number for _, number in entries})} jobs failed:", *lines])


def _way_on(name: str, jobs: Jobs) -> str:
    """How a sweep that was stopped goes on."""
    if jobs.job is None or jobs.sweep is None:
        return ""
    kept = [text for text in sys.argv[1:] if not text.startswith(("hydra.sweep.dir=", "resume="))]
    if _resumed(sys.argv[1:]) is not None:
        kept = []  # the command that began it is in the folder
        where = f"resume={jobs.sweep}"
    else:
        folder = str(jobs.sweep)
        simple = re.fullmatch(r"[\w./-]+", folder, re.ASCII)
        where = f"hydra.sweep.dir={folder if simple else quoted(folder)}"
    return f"\nThe sweep goes on with: python -m lorafit.{name} {shlex.join([*kept, where])}"
