"""What a run folder says of the command that began it, read as a stranger's.

A run that goes on is given its old overrides again. The folder may have come from somebody else, and Hydra's overrides
can start programs, set environment variables and read secrets; so only plain settings of lorafit are taken over. What
is not is named, to be given again by whoever means it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from pathlib import Path

from lorafit.errors import InputError
from lorafit.redact import MASK
from lorafit.terminal import say

# a key as lorafit's are spelled: no quotes, no "group@package", no "hydra" at its head
_KEY = re.compile(r"~?\+{0,2}(?P<key>[A-Za-z_][\w.]*(?:/\w+)*)(?:=(?P<value>.*))?", re.DOTALL)
_RESOLVER = re.compile(r"\$\{\s*([^\s:{}]+)\s*:")
_OWN = {"mul", "embedded_or"}
_MOST, _LONGEST = 1000, 10_000  # overrides, and characters in one: far more than a command line has


def is_plain(text: str) -> bool:
    """Whether an override is a setting of lorafit that reads and starts nothing."""
    found = _KEY.fullmatch(text)
    if found is None or len(text) > _LONGEST:
        return False
    key, value = found["key"], found["value"]
    if re.split(r"[./]", key)[0].lower() == "hydra" or (value is None and not text.startswith("~")):
        return False
    # a name of a resolver that is itself put together, as in ${${a}:b}, has no match: it is refused with the others
    calls = _RESOLVER.findall(value or "")
    plain = re.sub(r"\$\{\s*[\w.]+\s*\}", "", value or "")
    return set(calls) <= _OWN and plain.count("${") == len(calls)


def trusted_overrides(given: object, folder: Path, again: Collection[str] = ()) -> list[str]:
    """Those of the overrides recorded in a run's or a sweep's folder that are taken over; the others are named.

    again: what the command line of now gives, of which nothing is named.

    Raises InputError where `given` is no list of texts, where a secret in them was masked (redact.py), or where
    model.trust_remote_code is among them: that code of a model is run is never taken from a file, and `again` has to
    say it.
    """
    if not isinstance(given, list) or len(given) > _MOST or not all(isinstance(text, str) for text in given):
        raise InputError(f"resume: what {str(folder)!r} says of its overrides is no list of texts: give them again")
    # what was once allowed to change has changed, and the checkpoints know it
    given = [text for text in given if _key(text) != "allow_changed"]
    taken = [text for text in given if is_plain(text)]
    masked = [text for text in taken if MASK in text]
    if missing := {_key(text) for text in masked} - {_key(text) for text in again}:
        raise InputError(
            f"resume: {str(folder)!r} holds no secrets: {' and '.join(sorted(missing))} was masked: give it again"
        )
    given, taken = ([text for text in texts if text not in masked] for texts in (given, taken))
    said = any(text.startswith("model.trust_remote_code=") for text in again)
    if not said and any("trust_remote_code" in text and _is_on(text) for text in given):
        raise InputError(
            f"resume: {str(folder)!r} asks for the model's own code to be run, which is not taken from a file: "
            "where you trust it, give model.trust_remote_code=true again"
        )
    taken = [text for text in taken if "trust_remote_code" not in text]
    if left := [text for text in given if text not in (*taken, *again) and "trust_remote_code" not in text]:
        say(f"not taken over from {folder}, so give it again where it is to hold: {shlex.join(left)}")
    return taken


def _key(text: str) -> str:
    """The key of an override, however it is given."""
    return text.partition("=")[0].lstrip("+~")


def _is_on(text: str) -> bool:
    """Whether an override that speaks of trust_remote_code may switch it on: it is anything but a plain `false`."""
    return re.fullmatch(r"\+{0,2}model\.trust_remote_code=false", text, re.IGNORECASE) is None
