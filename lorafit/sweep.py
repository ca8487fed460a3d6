"""The jobs of a sweep: what is done is not done again, what was begun goes on, and what jobs share is made once.

A job is known by its folder. `metrics.json` there says how it ended; while it trains, and after a SIGKILL, it says
"interrupted". So the same command with the same sweep folder takes up where the last one was stopped.

What the jobs of one process share (`Shared`) is the base model, the data as it was read, and what the base gave on the
held-out rows. An adapter is taken off when its job is over, and the base is proven to be as it was loaded before the
next job gets it; where that fails, it is loaded anew.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lorafit.build import build_data, device_name, load_base
from lorafit.config import Config, config_sha256, to_dict
from lorafit.errors import BusyError, DivergedError, InputError, MemoryExhausted
from lorafit.rescue import before_training, require_own_folder
from lorafit.schema import NO_PART_OF_A_RUN, flat, settings_sha256

if TYPE_CHECKING:
    from lorafit.datamodule import FinetuneDataModule

LOCK_SECONDS = 10.0  # how long a job waits for a process that is just ending
_LARGEST = 64 * 2**20  # bytes of a metrics.json; those of large models with all ranks are a few million
_MOST_PARTS = 5_000_000  # values in it
IDLE_SHARE = 0.25  # of the memory that is free: so much may bases take that the job at hand does not use


class Beyond(Exception):
    """A job stands beyond the step at which it was to be looked at."""


@dataclass
class Job:
    """One job of a sweep, beyond its own configuration.

    sweep: the sweep's folder. until: stop after this share of the steps, in (0, 1); None: train to the end. rungs:
    held-out losses of earlier stops, by the share.
    """

    sweep: Path
    until: float | None = None
    rungs: dict[str, float] = field(default_factory=dict)

    def steps(self, total: int) -> int | None:
        """After how many of its steps the run is to stop; None where it is not."""
        stop = total if self.until is None else max(1, round(self.until * total))
        return stop if stop < total else None


def sweep_of(folder: Path) -> Path | None:
    """The folder of the sweep that a run folder is a job of."""
    return folder.parent if (folder.parent / "multirun.yaml").is_file() else None


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of a folder; empty where there is none that can be read. It may be a stranger's: what the programs
    go on from is of its kind there, or left out."""
    found = _read(folder / "metrics.json", json.loads)
    if not isinstance(found, dict):
        return {}
    rungs = found.get("rungs", {})
    rungs = rungs if isinstance(rungs, dict) else {}
    numbers = {key: float(loss) for key, loss in rungs.items() if _is_number(loss)}
    kinds = {"status": str, "config_sha256": str, "after": dict}
    kept = {key: value for key, value in found.items() if isinstance(value, kinds.get(key, object))}
    return kept | ({"rungs": numbers} if "rungs" in kept else {})


def has_checkpoint(folder: Path) -> bool:
    """Whether there is one in a run folder that the run could go on from."""
    return any((folder / "checkpoints").glob("*.ckpt"))


def is_completed(folder: Path) -> bool:
    """Whether a run has come to its end in a folder, its adapter with it."""
    return _is_completed(folder, read_metrics(folder))


def _is_completed(folder: Path, metrics: dict[str, Any]) -> bool:
    return metrics.get("status") == "completed" and (folder / "adapter" / "adapter_config.json").is_file()


def _read(path: Path, parse: Callable[[bytes], Any]) -> Any:
    """What a plain file of a reasonable size says; None where it says nothing."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        found = parse(path.read_bytes())
        return found if _is_bounded(found) else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def _is_bounded(value: Any) -> bool:
    """Whether a value has a reasonable number of parts, each counted as often as it is reached: a few lines of YAML
    that name one another have more of them than there is time for."""
    seen, waiting = 0, [value]
    while waiting and seen < _MOST_PARTS:
        seen += 1
        part = waiting.pop()
        waiting.extend(part.values() if isinstance(part, dict) else part if isinstance(part, list) else ())
    return not waiting


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def recorded_result(config: Config, folder: Path, until: float | None) -> float | None:
    """The held-out loss of a job that needs no running any more, or None where it does. NaN for one that has ended
    where it was to be looked at before (`until`): it needs no running, and does not compare.

    Raises DivergedError or MemoryExhausted where that is how the job ended, and InputError where the folder holds a job
    of other settings.
    """
    require_own_folder(folder)
    metrics, known = read_metrics(folder), recorded_sha256(folder)
    if known is None or (metrics.get("status") == "failed" and not has_checkpoint(folder)):
        return None
    if known != config_sha256(config):
        raise InputError(
            f"{folder} holds a run of other settings{_differing(config, folder)}: give another hydra.sweep.dir, or "
            "remove that folder"
        )
    status, rungs = metrics.get("status"), metrics.get("rungs", {})
    if until is not None and str(until) in rungs:
        return rungs[str(until)]
    if _is_completed(folder, metrics):
        loss = metrics.get("after", {}).get("loss")
        return float(loss) if until is None and _is_number(loss) else math.nan
    for kind in (DivergedError, MemoryExhausted):
        if status == kind.status:
            raise kind(f"{metrics.get('error')} (recorded earlier; remove {folder} to run it anew)")
    return None


def recorded_sha256(folder: Path) -> str | None:
    """The hash of the settings that the run in a folder goes by; None where nobody knows."""
    recorded = read_metrics(folder).get("config_sha256")
    if isinstance(recorded, str):
        return recorded
    settings = _recorded_settings(folder)  # metrics.json comes later, and may be damaged
    return settings_sha256(settings) if settings else None


def _recorded_settings(folder: Path) -> dict[str, Any]:
    found = _read(folder / ".hydra" / "resolved.yaml", yaml.safe_load)
    return found if isinstance(found, dict) else {}


def _differing(config: Config, folder: Path) -> str:
    """The first settings that are not as recorded: " (trainer.max_steps is 60 there, 4 here)"."""
    here, there = (flat(values) for values in (to_dict(config), _recorded_settings(folder)))
    keys = [key for key in here if key in there and here[key] != there[key]]
    keys = [key for key in keys if key.partition(".")[0] not in NO_PART_OF_A_RUN]
    told = ", ".join(f"{key} is {there[key]} there, {here[key]} here" for key in keys[:3])
    return f" ({told})" if told else ""


def resumed(config: Config, folder: Path) -> Config:
    """The configuration with which the job in `folder` goes on, or begins: where nobody knows by which settings its
    checkpoint came about, it begins anew."""
    if not has_checkpoint(folder) or recorded_sha256(folder) != config_sha256(config):
        return config
    config = copy.copy(config)
    config.resume = str(folder)
    return config


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Raise BusyError where another process is at the job of this folder: both would write the same files."""
    import fcntl

    with before_training(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BusyError(f"another process is at work in {folder}: wait for it, or stop it") from None
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def is_busy(folder: Path) -> bool:
    """Whether a process is at work in a run folder."""
    import fcntl

    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY | os.O_NONBLOCK)  # which does not wait at a pipe
        with open(descriptor) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # no lock was ever made there, or the file system has none
    return False


# ------------------------------------------------------------------------------------------------------- what is shared


@dataclass
class _Base:
    """A base model, and how it was when it had just been loaded."""

    model: Any
    state: dict[str, Any]
    trainable: dict[str, bool]
    bytes: int


class Shared:
    """What the jobs of one process have in common; a single run makes one for itself.

    `base` lends the model, until `give_back`; `idle_bytes` is what other bases occupy meanwhile.
    """

    def __init__(self) -> None:
        self._bases: dict[str, _Base] = {}  # by their settings; the one used last stands last
        self._lent: tuple[str, _Base] | None = None
        self._data: tuple[str, FinetuneDataModule] | None = None
        self._measured: dict[str, Any] = {}
        self.loads = 0  # how many bases were loaded so far

    def base(self, config: Config) -> Any:
        """The base model of a configuration, without an adapter."""
        key = _base_key(config)
        found = self._bases.pop(key, None)
        self._make_room(config)
        if found is None:
            model = load_base(config)
            self.loads += 1
            trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
            found = _Base(model, _state_of(model), trainable, _bytes_of(model))
        self._lent = (key, found)
        return found.model

    def data(self, config: Config) -> FinetuneDataModule:
        """The data module of a configuration, read and proven; each caller gets one of its own."""
        key = _data_key(config)
        if self._data is None or self._data[0] != key:
            data = build_data(config)
            data.setup()
            data.require_proof()
            if data.streaming:
                return data  # it is read while training
            self._data = (key, data)
        return copy.copy(self._data[1])

    def measured(self, config: Config, measure: Callable[[], Any]) -> Any:
        """What `measure()` says of the base on the held-out rows: asked for once for each base, data and task."""
        key = json.dumps([_base_key(config), _data_key(config), to_dict(config)["task"]])
        if key not in self._measured:
            self._measured[key] = measure()
        return copy.deepcopy(self._measured[key])

    @property
    def idle_bytes(self) -> int:
        """What bases occupy that the job at hand does not use."""
        return sum(base.bytes for base in self._bases.values())

    def give_back(self) -> None:
        """Take the adapter off the base that was lent, keep the base if it is as it was, and clear up after the job."""
        if self._lent is None:
            return
        (key, base), self._lent = self._lent, None
        try:
            _take_off(base)
            same = _state_of(base.model) == base.state
        except Exception:  # whatever a run left behind: then the base is not what it was
            same = False
        if same:
            self._bases[key] = base
        _collect()

    def forget(self) -> None:
        """Let go of everything, for the memory."""
        self._lent, self._data = None, None
        self._bases.clear()
        self._measured.clear()
        _collect()

    def _make_room(self, config: Config) -> None:
        """Drop idle bases, the one that was used longest ago first, until they are small beside what is free."""
        while self._bases and self.idle_bytes > IDLE_SHARE * _free_bytes(config):
            self._bases.pop(next(iter(self._bases)))
            _collect()


def _base_key(config: Config) -> str:
    values = to_dict(config)
    model = {key: value for key, value in values["model"].items() if key not in ("checkpointing", "fused", "compile")}
    drawn = config.seed if config.model.init == "random" else None
    return json.dumps([model, values["quant"], drawn, device_name(config), _file_state(config.model.name)])


def _data_key(config: Config) -> str:
    values, model = to_dict(config), config.model
    streamed = (config.trainer.max_steps or 0) * config.trainer.accumulate_grad_batches if config.data.streaming else 0
    tokenizer = (model.name, model.revision, model.trust_remote_code)
    files = [_file_state(path) for path in (model.name, *_paths(config.data.path), *_paths(config.data.eval_path))]
    return json.dumps([values["data"], config.seed, config.task.eval_examples, streamed, tokenizer, files])


def _paths(value: Any) -> list[str]:
    """The paths in data.path, which may be one, or a list of paths and of dicts with a path."""
    if isinstance(value, list):
        return [path for entry in value for path in _paths(entry)]
    return _paths(value.get("path")) if isinstance(value, dict) else [value] if isinstance(value, str) else []


def _file_state(path: str) -> list[Any]:
    """Size and time of a file, and of all in a folder, so that a job reads anew what has changed."""
    found = []
    places = [path, *(os.path.join(home, name) for home, _, names in os.walk(path) for name in sorted(names))]
    for place in places:
        with contextlib.suppress(OSError):
            state = os.stat(place)
            found.append([place, state.st_size, state.st_mtime_ns])
    return found


def _take_off(base: _Base) -> None:
    """Undo what a run does to its base: the fast path, recomputation, the adapter, gradients."""
    from lorafit.fastpath import leave_fast_path
    from lorafit.inject import detach_adapter

    model = base.model
    leave_fast_path(model)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        model.gradient_checkpointing_disable()
    detach_adapter(model)
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(base.trainable.get(name, False))
    model.eval()


def _state_of(model: Any) -> dict[str, Any]:
    """What a base must still be when it is lent again: kinds and hooks of its modules, its configuration, its
    parameters, one by one, and a sample of their values."""
    from lorafit.fingerprint import fingerprint_of

    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": [
            (name, type(module), [len(getattr(module, kind, ())) for kind in hooks], "forward" in vars(module))
            for name, module in model.named_modules()
        ],
        "config": json.dumps(model.config.to_dict(), default=str, sort_keys=True),
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)],
        "values": fingerprint_of(model.named_parameters()),
    }


def _bytes_of(model: Any) -> int:
    from lorafit.memory import memory_by_part

    parts = memory_by_part(model)
    return parts["weights"] + parts["adapter"] + parts["quant_state"]  # whether or not its weights are frozen yet


def _free_bytes(config: Config) -> int:
    """What is free where the model of a configuration goes."""
    import torch

    if device_name(config) != "cpu":
        return torch.cuda.mem_get_info(device_name(config))[0]
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _collect() -> None:
    """Give back what the last job has left."""
    import torch

    from lorafit.machine import return_free_memory

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return_free_memory()
