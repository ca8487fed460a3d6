"""When memory has run out: what used it, and three settings that would lower it.

The parts are counted at the moment of the error, from the tensors that are there. What the peak has beyond them is, on a
CUDA device, activations and what else a step needs for a while; in a process on a CPU it is the libraries as well. The
settings are such as the run does not have yet, and can be pasted into its command.

A process that reads data and is killed is taken for the same: nobody but the kernel kills those, when the host has no
memory left, and their parent lives on to tell.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit.build import device_name
from lorafit.config import Config
from lorafit.errors import LorafitError, MemoryExhausted, reason
from lorafit.memory import is_out_of_memory, memory_by_part, peak_bytes
from lorafit.quant import is_quantized
from lorafit.terminal import human

LOADING, MEASURING, TRAINING, SAVING = "loading the base", "measuring", "training", "saving the adapter"
SMALLER_BASE = "smollm2-135m"

_KILLED = re.compile(r"DataLoader worker .*(killed by signal: (Killed|Bus error)|exited unexpectedly)")
# what to lower first, by what the run was doing; while it trains that is decided by what was counted
_FIRST = {
    LOADING: ("weights", "adapter", "activations", "evaluation"),
    MEASURING: ("evaluation", "weights", "adapter", "activations"),
    SAVING: ("adapter", "weights", "activations", "evaluation"),
}


def is_killed_reader(error: BaseException) -> bool:
    """Whether an error says that a process which read data was killed, and not by a signal to end."""
    cause = error.__cause__
    ended = cause is not None and "killed by signal" in str(cause) and not _KILLED.search(str(cause))
    return _KILLED.search(str(error)) is not None and not ended


class OutOfMemory:
    """MemoryExhausted in place of what a library says when memory has run out within `told()`.

    metrics: its `memory` is filled with the parts known. checkpoint: the file that the run can go on from, once it is
    there. What a run holds is said here as it comes to have it: `doing`, `model`, `trainer`, and `idle_bytes`, which
    other runs of this process keep.
    """

    def __init__(self, config: Config, metrics: dict[str, Any], checkpoint: Path) -> None:
        self.config, self.metrics, self.checkpoint = config, metrics, checkpoint
        self.doing = LOADING
        self.model: Any = None
        self.trainer: Any = None
        self.idle_bytes = 0
        self._said: MemoryExhausted | None = None

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """May be entered several times, each within another: the innermost tells."""
        try:
            yield
        except Exception as error:
            exhausted = isinstance(error, MemoryExhausted) or not isinstance(error, LorafitError)
            killed = is_killed_reader(error)
            if error is self._said or not (exhausted and (killed or is_out_of_memory(error))):
                raise
            self._said = self._error(error, killed)
            self.model = self.trainer = None  # a sweep goes on, and needs their memory
            raise self._said from error

    def _error(self, error: Exception, killed: bool) -> MemoryExhausted:
        device = torch.device(device_name(self.config))
        parts, peak = self._count(device)
        if self.doing == TRAINING or "memory" not in self.metrics:
            peaks = {"peak_bytes": peak, "predicted_peak_bytes": None}
            self.metrics["memory"] = peaks | {f"{part}_bytes": count for part, count in parts.items()}
        said = reason(error).removeprefix("out of memory: ").rstrip(".")
        what = f"out of memory while {self.doing} ({said})"
        if killed:
            what = f"out of memory: a process that reads data was killed, as when the host has none left ({said})"
        rest = "activations" if device.type == "cuda" else "activations and the process itself"
        sizes = {part: count for part, count in parts.items() if part != "optimizer_paged"}
        sizes |= {rest: peak - sum(sizes.values())} if self.model is not None else {"all of it": peak}
        held = ", ".join(f"{part} {human(size)}" for part, size in by_size(sizes) if size > 0)
        three = "; ".join(advice(self.config, self.doing, sizes, cuda=device.type == "cuda", killed=killed, model=self.model))
        way_on = ""
        if self.doing in (MEASURING, SAVING) and self.checkpoint.exists():
            way_on = f". It is trained: resume={self.checkpoint.parent.parent} goes on from its last checkpoint"
        return MemoryExhausted(f"{what}. At most it held {held}. These lower it, best first: {three}{way_on}")
