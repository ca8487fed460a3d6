"""Secrets become *** before anything is written down.

A key gets into a log by being part of a name, a path or an error, so each place that writes passes its text through
here. Known are the values of the environment's variables that are named as secrets, the tokens that the hub and
Weights & Biases keep in the home, and texts shaped like their keys. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import json
import logging
import netrc
import os
import re
import sys
import threading
import traceback
import urllib.parse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MASK = "***"
SHORTEST = 8  # characters; a shorter value would be found in words that have nothing to do with it
_NAMES = re.compile(r"(?:API_KEY|TOKEN|SECRET|PASSWORD)$|_SECRET_|PASSWORD", re.IGNORECASE)
_SHAPES = re.compile(r"hf_(?:oauth_)?[A-Za-z0-9]{30,}|wandb_v1_[A-Za-z0-9_-]{8,}")
_IN_URL = re.compile(r"(?<=://)[^\s/:@'\"]*:[^\s/'\"]+(?=@)")
_LARGEST = 65_536  # bytes of a file that holds a token


def redact(text: str) -> str:
    """The text with *** in place of every secret that is known or looks like one."""
    for value in _known():
        text = text.replace(value, MASK)
    return _IN_URL.sub(MASK, _SHAPES.sub(MASK, text))


def redact_values(value: Any) -> Any:
    """The same for a nested value: its texts, and the keys of its mappings. Lists and tuples become lists."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact(key) if isinstance(key, str) else key: redact_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    return value


def redact_logs() -> None:
    """Have every record of Python's logging redacted, its traceback with it. A second call does nothing."""
    before = logging.getLogRecordFactory()
    if getattr(before, "redacts", False):
        return

    def made(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = before(*arguments, **named)
        try:
            said = record.getMessage()
        except (TypeError, ValueError, KeyError):
            return record  # logging tells of it itself
        clean = redact(said)
        if clean != said:
            record.msg, record.args = clean, None
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return record

    made.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(made)


def redact_tracebacks() -> None:
    """Have what Python itself prints redacted: errors that nobody has caught, in any thread, and warnings. A second
    call does nothing."""
    if getattr(sys.excepthook, "redacts", False):
        return

    def uncaught(kind: type[BaseException], error: BaseException | None, trace: Any) -> None:
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))

    def in_thread(given: threading.ExceptHookArgs) -> None:
        if given.exc_type is not SystemExit:
            uncaught(given.exc_type, given.exc_value, given.exc_traceback)

    before = warnings.formatwarning
    uncaught.redacts = True  # type: ignore[attr-defined]
    sys.excepthook, threading.excepthook = uncaught, in_thread
    warnings.formatwarning = lambda *given, **named: redact(before(*given, **named))


def _known() -> tuple[str, ...]:
    """The values that are secret, and how they are spelled in JSON, Python and addresses; the longest first, since one
    may be part of another."""
    return _spelled(tuple(os.environb.items()))


@functools.lru_cache(maxsize=8)  # by the environment, which few calls see changed
def _spelled(environment: tuple[tuple[bytes, bytes], ...]) -> tuple[str, ...]:
    variables = [(os.fsdecode(name), os.fsdecode(value)) for name, value in environment]
    named = [value for name, value in variables if _NAMES.search(name)]
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    token = os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")
    kept = _kept(os.path.expanduser(token), os.path.expanduser(os.environ.get("NETRC") or "~/.netrc"))
    values = [value for value in (*named, *kept) if len(value) >= SHORTEST and not value.isspace()]
    ways = (str, lambda text: json.dumps(text)[1:-1], lambda text: repr(text)[1:-1], urllib.parse.quote_plus)
    found = {way(value) for value in values for way in ways}
    return tuple(sorted(found, key=lambda value: (-len(value), value)))


def _kept(token: str, passwords: str) -> list[str]:
    """What the two files hold that logins have left in the home."""
    found: list[str] = []
    try:
        path = Path(token)
        if path.is_file() and path.stat().st_size <= _LARGEST:
            found.append(path.read_text().strip())
        if Path(passwords).is_file():
            hosts = netrc.netrc(passwords).hosts
            found += [entry[2] for host, entry in hosts.items() if "wandb" in host and entry[2]]
    except (OSError, ValueError, netrc.NetrcParseError):
        pass  # whoever needs them says so
    return found
