"""history.jsonl: every number that a run logs, one line of JSON a point, beside whatever else it logs to.

It is a file of the run folder, so that curves can be drawn without any service (`lorafit.report`), and it is what a
resumed run begins with: the points after the checkpoint are cut off, since they are logged again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lorafit.files import write_atomically

NAME = "history.jsonl"


def history_rows(folder: str | Path, until: int) -> list[dict[str, Any]]:
    """The points in a run folder's history up to a step; none where there is no such file. They end at a line that is
    not whole, since the process was killed while it wrote."""
    rows: list[dict[str, Any]] = []
    try:
        lines = (Path(folder) / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return rows
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= until:
            rows.append(row)
    return rows


class History(Logger):
    """A logger of Lightning that writes `folder`/history.jsonl: first `rows`, then each point as it comes.

    A number that is not finite is written as null.
    """

    def __init__(self, folder: str | Path, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self.path = Path(folder) / NAME
        self._began = False
        self._rows = list(rows)

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
        self._begin()
        row = {"step": step} | {
            key: float(value) if math.isfinite(value) else None for key, value in metrics.items() if key != "epoch"
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _begin(self) -> None:
        if not self._began:  # what an earlier run left here is replaced when this one has something to say
            text = "".join(json.dumps(row) + "\n" for row in self._rows)
            write_atomically(self.path, lambda file: file.write(text.encode()))
            self._began = True
