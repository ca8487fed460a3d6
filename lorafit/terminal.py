"""How things are said to a person: numbers, bytes, texts of strangers. Nothing here imports torch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from lorafit.redact import redact

# what would move the cursor, clear the screen, or turn the direction of the text around it
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """A text of somebody's data for the terminal: what is not to be printed is shown as what it is."""
    return _CONTROLS.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)


def shorten(text: str, width: int) -> str:
    """The text, its middle left out when it is longer than width."""
    text = text.strip()
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"


def number(value: Any) -> str:
    """Four digits, or a dash for what was not measured."""
    return "–" if value is None else f"{value:.4g}"


class _Patient(Console):
    def print(self, *objects: Any, **how: Any) -> None:
        try:
            super().print(*objects, **how)
        except OSError:  # it goes into a file on a full disk
            _silence(sys.stdout)

    def on_broken_pipe(self) -> None:
        _silence(sys.stdout)  # rich would end the program without a word

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Every text comes by here whole, also those of a table's cells: secrets become *** before lines are broken."""
        if isinstance(renderable, str):
            renderable = redact(renderable)
        elif isinstance(renderable, Text) and (clean := redact(renderable.plain)) != renderable.plain:
            renderable = Text(clean, renderable.style, justify=renderable.justify, overflow=renderable.overflow)
        return super().render(renderable, options)


def console(quiet: bool = False) -> Console:
    """The terminal; in a file or a pipe lines are wide enough not to break tables."""
    terminal = _Patient(quiet=quiet)
    return terminal if terminal.is_terminal else _Patient(width=140, highlight=False, quiet=quiet)


def say(text: str, *, error: bool = False) -> None:
    """Print a line at once, secrets as ***; where nobody reads any more (`| head`), or its disk is full, the work goes
    on."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(redact(text), file=stream, flush=True)
    except OSError:
        _silence(stream)


def _silence(stream: Any) -> None:
    """Send what is printed from here on nowhere: whoever read it has gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def human(count: float) -> str:
    """Bytes for a person: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
