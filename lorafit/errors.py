"""What can go wrong that a user can do something about, and the exit code each becomes.

    LorafitError                 never raised itself
    ├── InputError        2      wrong configuration or input: one message, no traceback
    │   └── BusyError     2      another process is at work there
    ├── DivergedError     3      losses or weights are no longer finite
    ├── NotLearning       3      training runs, but does not do what it should
    ├── MemoryExhausted   4      the device or the host has no memory left
    ├── NotSaved          5      trained, but what was to be kept could not be written
    └── GroupFailed     its own  another of the processes that train together has failed
    Stopped         130, 143     a signal asked the run to end (a BaseException: nothing swallows it)
    Paused                       training was to stop here; the run takes it from there (a BaseException as well)

Anything else that escapes a program is a bug and shows its traceback. An error names the thing,
the value it had and the way out, and helps with the nearest right name where a name was wrong.
"""

from __future__ import annotations

import difflib
import os
import signal
from collections.abc import Iterable


class LorafitError(Exception):
    """The root of the errors that lorafit raises on purpose. `exit_code` is what a program returns."""

    exit_code = 1
    status = "failed"


class InputError(LorafitError, ValueError):
    """The configuration or the input is wrong; nothing was started."""

    exit_code = 2


class BusyError(InputError):
    """Another process is at work where this one was to work."""


class DivergedError(LorafitError):
    """Training produced a loss or a weight that is not finite."""

    exit_code = 3
    status = "diverged"


class NotLearning(LorafitError):
    """A layer does not learn, or the frozen base has changed: what comes out would not be what it is taken for.

    sound: where the base has changed, the last step after which it was still what it is.
    """

    exit_code = 3
    sound: int | None = None


class MemoryExhausted(LorafitError):
    """The device or the host ran out of memory."""

    exit_code = 4
    status = "out_of_memory"


class NotSaved(LorafitError):
    """The adapter could not be written where it belongs."""

    exit_code = 5


class GroupFailed(LorafitError):
    """Another of the processes that train together has failed alone, and has said why; `exit_code` is its own."""


class Stopped(BaseException):
    """A signal ended the run. Like KeyboardInterrupt it is no Exception, so that it also ends a sweep."""

    status = "interrupted"

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.exit_code = 128 + signum

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self.signum,)  # from a worker of a parallel launcher


class Paused(BaseException):
    """Training has come to the step at which it was to stop, and its checkpoint is written."""


def nearest(word: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The names among `choices` that `word` most likely meant, best first; empty when none is near."""
    lowered = {str(choice).lower(): str(choice) for choice in choices}
    found = difflib.get_close_matches(str(word).lower(), list(lowered), n=count, cutoff=0.55)
    return [lowered[name] for name in found]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A sentence to end a message with: ``" Did you mean 'nf4'?"``, or nothing when no name is near."""
    found = nearest(word, choices)
    return f" Did you mean {' or '.join(repr(name) for name in found)}?" if found else ""


def near_path(name: str) -> str:
    """`did_you_mean` for a path that is not there, among those that lie beside it."""
    folder = os.path.dirname(os.path.expanduser(name)) or "."
    found = sorted(os.listdir(folder)) if os.path.isdir(folder) and os.access(folder, os.R_OK) else ()
    return did_you_mean(name, (os.path.normpath(os.path.join(folder, other)) for other in found))


def shortened(text: str) -> str:
    """A message without the middle of a value of thousands of letters."""
    return text if len(text) <= 2000 else f"{text[:1000]} … {text[-500:]}"


def reason(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing: for a message that goes on from it."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
