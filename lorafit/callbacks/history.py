"""history.jsonl: every number that a run logs, one line of JSON a point, beside whatever else it logs to.

It is a file of the run folder, so that curves can be drawn without any service (`lorafit.report`), and it is what a
resumed run begins with: the points after the checkpoint are cut off, since they are logged again.

A disk that takes no more costs the run nothing: points are kept, and written in their order when it takes them again.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lorafit.errors import reason
from lorafit.files import require_regular, write_atomically

NAME = "history.jsonl"
KEPT = 10_000  # points that wait for the disk, a megabyte or two; of more the oldest are lost
log = logging.getLogger(__name__)


def history_rows(folder: str | Path, until: int, validated: int | None = None) -> list[dict[str, Any]]:
    """The points in a run folder's history up to a step; none where there is no such file. They end at a line that is
    not whole, since the process was killed while it wrote.

    validated: the last step whose held-out loss the checkpoint of step `until` knows of; None where it does not say. A
    validation after that is made once more, and so logged again.
    """
    rows: list[dict[str, Any]] = []
    require_regular(Path(folder) / NAME)
    try:
        lines = (Path(folder) / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        if until:
            log.warning(f"{Path(folder) / NAME} is not there: the curves begin at step {until}")
        return rows
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            cut = re.search(r'"step": (\d+)[,}]', line)
            if cut is not None and int(cut[1]) <= until:  # else a process was killed while it wrote what comes again
                log.warning(f"{Path(folder) / NAME} is cut off before step {until}: the curves lack what is missing")
            break
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= until:
            rows.append(row)
    if validated is None:
        return rows
    held_out = [row for row in rows if row["step"] == until and "eval/loss" in row]
    again = held_out[validated >= until :]  # of several after one step the first is the one that it knows
    return [row for row in rows if not any(row is other for other in again)]


class History(Logger):
    """A logger of Lightning that writes `folder`/history.jsonl: first `rows`, then each point as it comes.

    A number that is not finite is written as null.
    """

    def __init__(self, folder: str | Path, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self.path = Path(folder) / NAME
        self._began = False
        self._rows = list(rows)
        self._waiting: deque[bytes] = deque(maxlen=KEPT)
        self._whole = 0  # bytes of the file that are whole lines
        self._lost = 0
        self._failing = False

    @property
    def name(self) -> str:
        return "history"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They are in .hydra already."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step} | {
            key: float(value) if math.isfinite(value) else None for key, value in metrics.items() if key != "epoch"
        }
        self._lost += len(self._waiting) == KEPT
        self._waiting.append((json.dumps(row) + "\n").encode())
        self._write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Try once more to write what waits, and tell what is lost."""
        if self._waiting:
            self._write()
        if lost := self._lost + len(self._waiting):
            log.warning(f"{self.path} lacks {lost} points that could not be written")

    def _write(self) -> None:
        """Write what waits; where the disk does not take it, it waits on."""
        try:
            self._begin()
            text = memoryview(b"".join(self._waiting))
            with self.path.open("ab", buffering=0) as file:
                self._whole = min(self._whole, file.tell())
                file.truncate(self._whole)  # half a line may be there from when it failed
                while text:
                    text = text[file.write(text) :]
                self._whole = file.tell()
            self._waiting.clear()
        except OSError as error:
            if not self._failing:
                log.warning(
                    f"{self.path} cannot be written ({error.strerror or reason(error)}): the training goes on, and "
                    "what is logged is kept until it can"
                )
            self._failing = True
        else:
            if self._failing:
                log.warning(f"{self.path} is written again")
            self._failing = False

    def _begin(self) -> None:
        if not self._began:  # what an earlier run left here is replaced when this one has something to say
            text = "".join(json.dumps(row) + "\n" for row in self._rows).encode()
            write_atomically(self.path, lambda file: file.write(text))
            self._began, self._whole = True, len(text)
