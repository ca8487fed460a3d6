"""What a signal to end does, from the first moment of a program to its last.

SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal was closed) raise `Stopped`, which a program turns into its exit code.
While a run trains the first is only noted, so that the step under way ends and its checkpoint is written. The second
raises at once and leaves five seconds to clean up; the third ends the process where it stands. A signal that was
ignored when the program began (`nohup`) stays ignored.

Processes that are forked inherit the handlers and are not asked: those of a DataLoader are ended by their parent, which
at a terminal gets the same Ctrl-C. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from lorafit.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE_SECONDS = 5.0  # from the second signal on
WORKER_SECONDS = 30  # so long may a worker outlive a SIGTERM of its own, while its parent writes a checkpoint
_current: Stopping | None = None


class Stopping:
    """What has been asked of this process. deferring: whether somebody looks at `asked` by himself."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.deferring = False
        self._ending = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    def begin(self) -> None:
        """Handle the signals; outside of the main thread, where Python cannot, nothing."""
        if threading.current_thread() is threading.main_thread():
            found = {signum: signal.getsignal(signum) for signum in SIGNALS}
            self._before = {signum: old for signum, old in found.items() if old not in (signal.SIG_IGN, None)}
            self.install()

    def install(self) -> None:
        """Put the handlers in place, over those that a library has set since."""
        for signum in self._before:
            signal.signal(signum, self._handle)

    def end(self) -> None:
        """Put back what was there before; but not in a program that only has to leave."""
        if self._ending:
            return
        if self._timer is not None:
            self._timer.cancel()
        for signum, old in self._before.items():
            signal.signal(signum, old)

    def leave(self) -> None:
        """From here on the interpreter ends: there is nothing to save, and a signal ends the process at once."""
        self._ending = True

    def check(self) -> None:
        """Raise Stopped where a signal was noted, or was lost in a library that swallows exceptions."""
        if self.asked:
            raise Stopped(self.asked[0])

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            if signum != signal.SIGINT:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        if signum == signal.SIGHUP:
            _leave_terminal()
        self.asked.append(signum)
        if self._ending or len(self.asked) > 2:
            os._exit(128 + signum)
        if len(self.asked) == 2:
            self._timer = threading.Timer(GRACE_SECONDS, os._exit, [128 + signum])
            self._timer.daemon = True
            self._timer.start()
        elif self.deferring:
            return
        self.deferring = False
        raise Stopped(signum)


@contextlib.contextmanager
def stopping() -> Iterator[Stopping]:
    """Handle signals in this context. Inside of another one, it is that one."""
    global _current
    if _current is not None:
        yield _current
        return
    _current = Stopping()
    _current.begin()
    try:
        yield _current
    finally:
        _current.end()
        _current = None


def stopped_by() -> Stopped | None:
    """What ends the program that a signal has asked to end; None where none has. A library may have made another error
    of it."""
    return Stopped(_current.asked[0]) if _current is not None and _current.asked else None


def is_urgent() -> bool:
    """Whether a second signal has come."""
    return _current is not None and len(_current.asked) > 1


def signal_name(number: int) -> str:
    """SIGTERM for 15; of a number that has no name, such as a real-time signal, the number."""
    return signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"


def in_worker(_: int) -> None:
    """The worker_init_fn of a DataLoader: its processes end with their parent, not by the signals of a whole group, or
    the parent would miss them in the step that it still ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_SECONDS) and None)


def _leave_terminal() -> None:
    """What is printed after a hangup would fail; from here on it goes nowhere."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            if stat.S_ISCHR(os.fstat(number).st_mode):
                os.dup2(nowhere, number)
        os.close(nowhere)
