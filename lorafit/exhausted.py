"""When memory has run out: what used it, and three settings that would lower it.

The parts are counted at the moment of the error, from the tensors that are there. What the peak has beyond them is, on
a CUDA device, activations and what else a step needs for a while; in a process on a CPU it is the libraries as well.
The settings are such as the run does not have yet, and can be pasted into its command.

A process that reads data and is killed is taken for the same: nobody but the kernel kills those, when the host has no
memory left, and their parent lives on to tell.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorafit.build import device_name
from lorafit.config import Config
from lorafit.errors import LorafitError, MemoryExhausted, reason
from lorafit.memory import is_out_of_memory, memory_by_part, peak_bytes
from lorafit.quant import is_quantized
from lorafit.stopping import stopped_by
from lorafit.terminal import human

LOADING, MEASURING, TRAINING, SAVING = "loading the base", "measuring", "training", "saving the adapter"
_SMALL = 400_000_000  # parameters, as they are counted of a base in 4 bits as well: 135 million are no gain then

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
            killed = (
                is_killed_reader(error) and stopped_by() is None
            )  # one that was asked to end takes its readers along
            if error is self._said or not (exhausted and (killed or is_out_of_memory(error))):
                raise
            self._said = self._error(error, killed)
            self.model = self.trainer = None  # a sweep goes on, and needs their memory
            raise self._said from error

    def _error(self, error: Exception, killed: bool) -> MemoryExhausted:
        device = torch.device(device_name(self.config))
        parts: dict[str, int] = {}
        if self.model is not None:
            optimizers = self.trainer.optimizers if self.trainer is not None else []
            parts = memory_by_part(self.model, optimizers[0] if optimizers else None)
        peak = peak_bytes(device) - self.idle_bytes
        if self.doing == TRAINING or "memory" not in self.metrics:  # later it is that of the training
            peaks = {"peak_bytes": peak, "predicted_peak_bytes": None}
            self.metrics["memory"] = peaks | {f"{part}_bytes": count for part, count in parts.items()}
        paged = parts.pop("optimizer_paged", 0)  # a part of the optimizer's, which the device's allocator knows not of
        rest = max(0, peak - (sum(parts.values()) - paged))
        cuda = device.type == "cuda"
        settings = advice(self.config, self._first(parts, rest), cuda=cuda, killed=killed, model=self.model)

        sizes = parts | {("activations" if cuda else "activations and the process itself") if parts else "so far": rest}
        if killed and cuda:  # it is the host's memory that has run out
            sizes = {"the process that trains": peak_bytes(torch.device("cpu"))}
        held = [f"{part} {human(size)}" for part, size in _largest_first(sizes) if size]
        said = reason(error).removeprefix("out of memory: ").rstrip(".")
        what = f"out of memory while {self.doing} ({said})"
        if killed:
            what = f"out of memory: a process that reads data was killed, as when the host has none left ({said})"
        way_on = ""
        if self.doing in (MEASURING, SAVING) and os.path.exists(self.checkpoint):
            resume = shlex.quote(f"resume={self.checkpoint.parent.parent}")
            way_on = f". The run goes on from its last checkpoint with {resume}"
        return MemoryExhausted(
            f"{what}. It held {', '.join(held)}. Any of these lowers it, best first: {'; '.join(settings)}{way_on}"
        )

    def _first(self, parts: Mapping[str, int], rest: int) -> tuple[str, ...]:
        """What to lower first: of a training what is largest, else what the run was at."""
        if self.doing != TRAINING:
            return _FIRST[self.doing]
        weights = parts.get("weights", 0) + parts.get("quant_state", 0)
        sizes = {"activations": rest, "weights": weights, "adapter": sum(parts.values()) - weights}
        return (*(part for part, _ in _largest_first(sizes)), "evaluation")


def _largest_first(sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(sizes.items(), key=lambda item: -item[1])


def advice(config: Config, first: Sequence[str], *, cuda: bool, killed: bool, model: Any = None) -> list[str]:
    """Three settings that a run of this configuration does not have and that lower what it needs, best first.

    first: which part to lower first, of "activations", "weights", "adapter" and "evaluation". killed: what ran out is
    the host's memory, under the processes that read. model: the base, if it is there.
    """
    found = list(_settings(config, cuda=cuda, killed=killed, model=model))
    order = ("readers", *first, "other")
    found.sort(key=lambda item: order.index(item[0]))
    return [setting for _, setting in found[:3]]


def _settings(config: Config, *, cuda: bool, killed: bool, model: Any) -> Iterator[tuple[str, str]]:
    """(the part that it lowers, the setting) for all that this configuration may have otherwise, the best of each part
    first."""
    data, base, task, trainer = config.data, config.model, config.task, config.trainer
    if killed:
        yield "readers", "data.num_workers=0"
        if data.streaming and data.window > 1:
            yield "readers", f"data.window={data.window // 2}"

    rows = data.batch_size
    if rows > 1 and (trainer.on_oom == "stop" or killed):  # else it has come down to single examples by itself
        parts = next(number for number in range(2, rows + 1) if rows % number == 0)
        batches = trainer.accumulate_grad_batches * parts
        same = f"data.batch_size={rows // parts} trainer.accumulate_grad_batches={batches} (the same gradient)"
        yield "activations", same
    if not (killed and cuda):  # what is on the device has no part in it
        several = rows > 1 or data.packing
        if trainer.on_oom == "stop" and trainer.devices == 1 and several and not killed:
            yield "activations", "trainer.on_oom=halve (the same gradient, from halves of what does not fit)"
        if base.checkpointing == "none":
            yield "activations", "model.checkpointing=selective"
        if base.checkpointing in ("none", "selective"):
            yield "activations", "model.checkpointing=full"
        if base.checkpointing == "full" and cuda:
            yield "activations", "model.checkpointing=offload"
        if base.attention == "eager":
            yield "activations", "model.attention=sdpa"
    if data.max_length > 3:
        yield "activations", f"data.max_length={data.max_length // 2}"

    given = model is not None and config.quant is None and any(is_quantized(module) for module in model.modules())
    if config.bias == "none" and not given:  # biases are not trained in 16 bits
        if config.quant is None or config.quant.type == "int8":
            yield "weights", "quant=nf4"
        if base.dtype == "float32":
            yield "weights", "model.dtype=bfloat16"
    if config.quant is not None and config.quant.type != "int8" and not config.quant.double_quant:
        yield "weights", "quant.double_quant=true"

    name = config.optimizer["_target_"].rpartition(".")[2]
    if "8bit" not in name and "Adam" in name:
        yield "adapter", "optimizer=paged_adamw_8bit" if cuda else "optimizer=adamw_8bit"
    if config.modules_to_save:
        yield "adapter", "modules_to_save=[]"
    if config.rank > 1 and config.ladder is None:
        yield "adapter", f"rank={config.rank // 2}"

    measured = data.eval_batch_size or rows
    if measured > 1:
        yield "evaluation", f"data.eval_batch_size={measured // 2}"
    if max(task.generate_examples, task.samples) > 0 and task.max_new_tokens > 1:
        yield "evaluation", f"task.max_new_tokens={task.max_new_tokens // 2}"

    small = base.name == "embedded" or (model is not None and sum(p.numel() for p in model.parameters()) < _SMALL)
    if not small:
        yield "other", "model=smollm2-135m (a smaller base)"
    if cuda:
        yield "other", "trainer.accelerator=cpu (slow)"
    llama = model is None or any(name.endswith("q_proj") for name, _ in model.named_modules())
    if config.target_modules == "all_linear" and llama:
        yield "other", "target_modules=[q_proj,v_proj]"
    if config.dropout:
        yield "other", "dropout=0.0"
    if task.eval_examples > 1:
        yield "other", f"task.eval_examples={task.eval_examples // 2}"
    if data.limit is None or data.limit > 1:
        yield "other", f"data.limit={1000 if data.limit is None else data.limit // 2}"
