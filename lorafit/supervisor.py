"""A sweep outlives its jobs: they run in a process of their own, and when one of them is killed the others go on.

The kernel kills what takes too much memory, without a word and without a chance to clean up; a bug in a driver does the
same. So the process of the command only watches. The jobs run one after another in a worker, which keeps the base
model between them; when it dies, the job it was at is recorded as killed, and a new worker goes on with the next one.

Which jobs have begun and how they ended stands in a `Roll`, a small folder that all processes of one command see, on
other machines too. Nothing here knows Hydra or torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorafit.stopping import signal_name

ROLL = "LORAFIT_ROLL"  # in the environment of a worker: the roll of the command that it works for
IN_PROCESS = "LORAFIT_IN_PROCESS"  # set by hand: the jobs run in the process of the command, for a debugger
_KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Roll:
    """The jobs of one command: an entry each, by (rung, number), as a file that is written whole.

    An entry holds name and folder of the job from its beginning, and at its end either its objective or error and
    exit_code; "died" where its process ended with it: an exit code, or minus a signal, until the job is told of.

    What the disk does not take is kept in this process alone: the sweep goes on, and where the process dies as well,
    its jobs are looked at again by the next one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._kept: dict[tuple[int, int], dict[str, Any]] = {}

    @classmethod
    def begin(cls, sweep: str | Path) -> Roll:
        """A new roll in the folder of a sweep. Those of commands that were killed on this machine are removed."""
        host = socket.gethostname()
        Path(sweep).mkdir(parents=True, exist_ok=True)
        for left in Path(sweep).glob(f".roll-{host}-*"):
            pid = left.name.removeprefix(f".roll-{host}-").partition("-")[0]
            # in a container that was started again, this process may well have the number of the one that was killed
            if pid.isdecimal() and (int(pid) == os.getpid() or not _alive(int(pid))):
                shutil.rmtree(left, ignore_errors=True)
        return cls(tempfile.mkdtemp(prefix=f".roll-{host}-{os.getpid()}-", dir=sweep))

    def end(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, rung: int, number: int, entry: dict[str, Any]) -> None:
        """Keep an entry; nothing where the command has ended before its job, and nobody will read it."""
        draft, path = self.folder / f".{rung}-{number}", self.folder / f"{rung}-{number}.json"
        try:
            draft.write_text(json.dumps(entry))
            draft.replace(path)
            self._kept.pop((rung, number), None)
        except FileNotFoundError:
            pass
        except OSError:
            self._kept[rung, number] = dict(entry)
            with contextlib.suppress(OSError):  # what it said before would be taken for a job that its process died at
                path.unlink(missing_ok=True)
                draft.unlink(missing_ok=True)

    def read(self, rung: int, number: int) -> dict[str, Any] | None:
        if (rung, number) in self._kept:
            return dict(self._kept[rung, number])
        path = self.folder / f"{rung}-{number}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def entries(self, rung: int | None = None) -> dict[tuple[int, int], dict[str, Any]]:
        """All entries by (rung, number), in their order."""
        places = [path.stem.partition("-") for path in self.folder.glob("[0-9]*.json")]
        known = {(int(at), int(number)) for at, _, number in places} | self._kept.keys()
        found = sorted(place for place in known if rung in (None, place[0]))
        return {place: entry for place in found if (entry := self.read(*place)) is not None}

    def unfinished(self) -> dict[tuple[int, int], dict[str, Any]]:
        return {place: entry for place, entry in self.entries().items() if not entry["ended"]}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def supervise(command: Sequence[str], roll: Roll) -> int:
    """Run the command of a worker until it ends by itself, anew each time it is killed at a job. Returns its exit code,
    or minus the signal that it died by where no new one was started.

    A signal to end is passed on to the worker, which saves a checkpoint first, and no new one is started.
    """
    asked: list[int] = []
    passed_on = 0
    worker: subprocess.Popen[bytes] | None = None

    def pass_on(signum: int, _: object) -> None:
        nonlocal passed_on
        asked.append(signum)
        if worker is not None:
            passed_on = len(asked)
            # while it still imports, an interrupt would show where it stood; and nothing else knows a hangup
            begun = signum == signal.SIGTERM or (signum == signal.SIGINT and roll.entries())
            worker.send_signal(signum if begun else signal.SIGTERM)

    with handling((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), pass_on):
        while True:
            # a group of its own, or a terminal would send it the signals of its keys a second time
            worker = subprocess.Popen(
                command, env=os.environ | {ROLL: f"{os.getpid()}:{roll.folder.resolve()}"}, process_group=0
            )
            if len(asked) > passed_on:  # it came before there was anybody to pass it on to
                worker.terminate()
            code = worker.wait()
            begun = roll.unfinished()
            if asked and code == -signal.SIGTERM:  # it had nothing to save yet
                return -asked[0]
            if code == 128 + signal.SIGTERM and asked and asked[0] == signal.SIGINT:  # told it as the other
                return 128 + signal.SIGINT
            if asked or not begun:
                return code
            for place, entry in begun.items():  # it ended in the middle of a job, by a signal or by itself
                roll.write(*place, entry | {"ended": True, "died": code})


def serve() -> Roll | None:
    """The roll of the command that this process works for, or None where it is no worker. A worker ends with the
    process that watches it, or two would write the same files when the sweep is gone on with."""
    value = os.environ.get(ROLL)
    if value is None:
        return None
    parent, _, folder = value.partition(":")
    with contextlib.suppress(OSError, AttributeError):  # known to Linux alone; elsewhere jobs are locked all the same
        ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(1)  # it died before
    return Roll(folder)


@contextlib.contextmanager
def handling(signums: Sequence[int], handler: Any) -> Iterator[None]:
    """Handle signals so; those that are ignored (`nohup`) stay so."""
    before = {signum: signal.getsignal(signum) for signum in signums}
    for signum, old in before.items():
        if old is not signal.SIG_IGN:
            signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def death(code: int) -> tuple[str, int]:
    """What is said of a job whose process ended with it, and the exit code that is told for it.

    code: that of the process, or minus the signal that it died by.
    """
    way_on = "Called again, it goes on from its checkpoint"
    if code >= 0:
        return f"its process ended with exit code {code} in the middle of it. {way_on}", code or 1
    if -code == signal.SIGKILL:
        return f"killed by SIGKILL: perhaps the machine ran out of memory. {way_on}", 128 - code
    return f"its process died by {signal_name(-code)}. {way_on}", 128 - code
