"""The door: from a command line to one checked, typed `Config`, and from an error to an exit code.

    def main() -> None:
        start("train", run)                 # run(config, folder) is called once per job

    config = compose(["rank=8", "quant=nf4"])       # the same path, for notebooks and tests

Hydra composes `conf/`, the dataclasses below say which keys there are, and `check` looks at every
value before anything is loaded. Nothing here imports torch, so a typing error is answered at once.
The values themselves live in `conf/`: a field without a default is one that a file there gives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import hydra
import hydra.version
import yaml
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from lorafit.errors import InputError, LorafitError, Stopped, did_you_mean, nearest

_HERE = Path(__file__).resolve().parent
CONF = next(p for p in (_HERE / "conf", _HERE.parent / "conf") if p.is_dir())  # wheel, checkout

_VERSION_BASE = "1.3"
_failures = logging.getLogger("lorafit.failure")  # goes to the log file alone, see conf/train.yaml


# --- what there is -----------------------------------------------------------------------------


@dataclass
class Quant:
    type: str = MISSING
    double_quant: bool = MISSING
    block_size: int | None = MISSING
    compute_dtype: str = MISSING


@dataclass
class Model:
    name: str = MISSING
    revision: str | None = MISSING
    init: str = MISSING
    dtype: str = MISSING
    attention: str = MISSING
    checkpointing: str = MISSING
    trust_remote_code: bool = MISSING


@dataclass
class Task:
    name: str = MISSING
    eval_examples: int = MISSING
    generate_examples: int = MISSING
    samples: int = MISSING
    max_new_tokens: int = MISSING
    retention_path: str | None = MISSING


@dataclass
class Data:
    path: str = MISSING
    eval_path: str | None = MISSING
    eval_fraction: float = MISSING
    format: str = MISSING
    columns: Any = MISSING  # None or a dict; OmegaConf cannot put a dict where a typed None is
    template: str = MISSING
    max_length: int = MISSING
    batch_size: int = MISSING
    eval_batch_size: int | None = MISSING
    train_on: str = MISSING
    packing: bool = MISSING
    num_workers: int = MISSING
    limit: int | None = MISSING


@dataclass
class Scheduler:
    name: str = MISSING
    warmup: Any = MISSING  # a fraction (float) or a number of steps (int)


@dataclass
class Trainer:
    max_steps: int | None = MISSING
    max_epochs: int | None = MISSING
    accumulate_grad_batches: int = MISSING
    val_check_interval: Any = MISSING  # None, a number of steps (int) or a fraction (float)
    accelerator: str = MISSING
    devices: Any = MISSING  # an int or "auto"
    gradient_clip_val: float | None = MISSING
    log_every_n_steps: int = MISSING
    checkpoint_every_n_steps: int | None = MISSING


@dataclass
class Callbacks:
    progress: bool = MISSING
    memory_every_n_steps: int | None = MISSING


@dataclass
class Logger:
    type: str = MISSING
    mode: str | None = None  # wandb only, as are the next four
    project: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class Config:
    """What a run is. `Any` marks a value that `check` judges better than a type could."""

    rank: Any = MISSING  # an int; untyped so that its error reads the same everywhere
    alpha: Any = MISSING  # an int or a float
    target_modules: Any = MISSING  # a str or a list of str
    dropout: float = MISSING
    variant: str = MISSING
    seed: int = MISSING
    resume: str | None = MISSING
    quant: Quant | None = MISSING
    model: Model = MISSING
    task: Task = MISSING
    data: Data = MISSING
    optimizer: dict[str, Any] = MISSING  # _target_, lr and the arguments of that class
    scheduler: Scheduler = MISSING
    trainer: Trainer = MISSING
    callbacks: Callbacks = MISSING
    logger: Logger | None = MISSING


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts and lists, for JSON and for loggers."""
    return dataclasses.asdict(config)


def config_sha256(config: Config) -> str:
    """Equal for two runs of the same settings; where one started from (`resume`) does not count."""
    values = {key: value for key, value in to_dict(config).items() if key != "resume"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# --- resolvers: the few values in conf/ that follow from others -----------------------------------


def _mul(factor: float, value: Any) -> Any:
    """`${mul:2,${rank}}`. A value that is no number passes through, for `check` to name."""
    return factor * value if _is_number(value) else value


def _embedded_or(name: str, embedded: Any, other: Any) -> Any:
    """`${embedded_or:${model.name},A,B}`: A suits the embedded model, B a real one."""
    return embedded if name == "embedded" else other


def _new_folder(path: str) -> str:
    """`path`, or the first new one of `path-2`, `path-3`…: two runs of one second stay apart."""
    for number in itertools.count(1):
        folder = path if number == 1 else f"{path}-{number}"
        with contextlib.suppress(FileExistsError):
            os.makedirs(folder)
            return folder
    raise AssertionError("unreachable")


def _job_folder(overrides: Sequence[str], fixed: Sequence[str] | None, number: Any) -> str:
    """The name of a job's folder in a sweep, made of what differs: ``rank=8,quant=nf4``.

    `fixed` names the keys that all jobs share. Text that a folder name cannot hold is replaced, and
    then a short hash keeps two jobs apart.
    """
    pairs = [text.lstrip("+~").partition("=") for text in overrides]
    varied = [pair for pair in pairs if pair[0] not in (fixed or ())]
    parts, exact = [], True
    for key, _, value in varied or [pair for pair in pairs if pair[0] != "sweep"]:
        plain = re.sub(r"['\"\[\] ]", "", value).replace(",", "+")
        safe = re.sub(r"[^\w.+-]", "_", plain)
        exact = exact and safe == plain
        parts.append(f"{key.replace('/', '.')}={safe}")
    name = ",".join(parts)
    if not exact or len(name) > 120:
        digest = hashlib.sha256(",".join(map("".join, varied)).encode()).hexdigest()
        name = f"{name[:112]}-{digest[:6]}"
    return name or str(number)


# At import, so that the worker processes of a parallel launcher have them too.
OmegaConf.register_new_resolver("mul", _mul, replace=True)
OmegaConf.register_new_resolver("embedded_or", _embedded_or, replace=True)
# cached: a folder is new only once, and all readers of one config mean the same
OmegaConf.register_new_resolver("new_folder", _new_folder, replace=True, use_cache=True)
OmegaConf.register_new_resolver("job_folder", _job_folder, replace=True)
ConfigStore.instance().store(name="lorafit_schema", node=Config)


# --- is every value one that can work? ------------------------------------------------------------

_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OPTIMIZER = re.compile(r"(torch|bitsandbytes)\.optim\.[A-Za-z]\w*")

_CHOICES = {
    "variant": ("lora", "rslora"),
    "quant.type": ("nf4", "fp4", "int8"),
    "quant.compute_dtype": ("bfloat16", "float16", "float32"),
    "model.init": ("pretrained", "random"),
    "model.dtype": ("auto", "bfloat16", "float16", "float32"),
    "model.attention": ("auto", "sdpa", "eager", "flash_attention_2", "flex_attention"),
    "model.checkpointing": ("none", "full"),
    "task.name": ("causal_lm",),
    "data.format": ("auto", "prompt_completion", "alpaca"),
    "data.template": ("auto", "plain", "chat"),
    "data.train_on": ("completion", "all"),
    "scheduler.name": ("cosine", "linear", "constant"),
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "logger.type": ("wandb", "csv"),
    "logger.mode": ("offline", "online", "disabled"),
}
_POSITIVE = (
    "rank",
    "task.eval_examples",
    "task.max_new_tokens",
    "data.batch_size",
    "data.eval_batch_size",
    "data.limit",
    "trainer.accumulate_grad_batches",
    "trainer.log_every_n_steps",
    "trainer.checkpoint_every_n_steps",
    "callbacks.memory_every_n_steps",
)  # where the type allows null, null is fine
_NOT_NEGATIVE = ("seed", "task.generate_examples", "task.samples", "data.num_workers")


def _hint(word: str, choices: Iterable[str], count: int = 3) -> str:
    """The end of a message: nothing, or a full stop and the nearest names."""
    hint = did_you_mean(word, nearest(word, choices, count))
    return f".{hint}" if hint else ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _within(value: Any, low: float, high: float) -> bool:
    """low <= value < high, and a number at all (not nan)."""
    return _is_number(value) and low <= value < high


def _pick(values: dict[str, Any], key: str) -> Any:
    """`quant.type` out of nested dicts; None where the whole group is null."""
    for part in key.split("."):
        if values is None:
            return None
        values = values[part]
    return values


def check(config: Config) -> None:
    """Raise one InputError with a line for every value that cannot work, or return."""
    problems = [*_check_values(config), *_check_files(config)]
    if problems:
        raise InputError("\n".join(problems))


def _check_values(config: Config) -> Iterable[str]:
    values = to_dict(config)
    for key, choices in _CHOICES.items():
        value = _pick(values, key)
        if value is not None and value not in choices:
            known = ", ".join(choices)
            yield f"{key} must be one of {known}, got {value!r}{_hint(value, choices)}"
    for key in _POSITIVE:
        value = _pick(values, key)
        if not (_is_int(value) and value > 0) and not (value is None and key != "rank"):
            yield f"{key} must be a positive integer, got {value!r}"
    for key in _NOT_NEGATIVE:
        value = _pick(values, key)
        if not (_is_int(value) and value >= 0):
            yield f"{key} must be zero or a positive integer, got {value!r}"

    # alpha usually follows rank: a bad rank is said once, not twice
    follows = config.alpha in (config.rank, _mul(2, config.rank))
    rank_is_bad = not (_is_int(config.rank) and config.rank > 0)
    if not _within(config.alpha, 1e-12, float("inf")) and not (follows and rank_is_bad):
        yield f"alpha must be a positive number, got {config.alpha!r}"
    names = config.target_modules
    names = [names] if isinstance(names, str) else names
    if not (names and isinstance(names, list) and all(isinstance(n, str) and n for n in names)):
        yield (f"target_modules must be all_linear or a list of module names, got {config.target_modules!r}")
    if not _within(config.dropout, 0, 1):
        yield f"dropout must be in [0, 1), got {config.dropout!r}"
    if _is_int(config.seed) and config.seed >= 2**32:
        yield f"seed must be below 2**32, got {config.seed}"

    if quant := config.quant:
        sizes = (32, 64, 128, 256, 512)
        if quant.type == "int8":
            if quant.block_size is not None or quant.double_quant:
                yield "quant.block_size and quant.double_quant belong to nf4 and fp4, not to int8"
        elif quant.block_size not in sizes:
            known = ", ".join(map(str, sizes))
            yield f"quant.block_size must be one of {known}, got {quant.block_size!r}"

    data = config.data
    if not (_is_int(data.max_length) and data.max_length > 1):
        yield f"data.max_length must be an integer above 1, got {data.max_length!r}"
    if data.eval_path is None and not _within(data.eval_fraction, 1e-12, 1):
        yield f"data.eval_fraction must be in (0, 1), got {data.eval_fraction!r}"
    if data.packing:
        yield "data.packing=true is not in this version: use data.packing=false"
    if data.columns is not None and not isinstance(data.columns, dict):
        yield (f"data.columns must be like {{prompt: question, completion: answer}}, got {data.columns!r}")
    elif data.columns:
        for column, source in data.columns.items():
            if column not in ("prompt", "completion"):
                hint = _hint(column, ("prompt", "completion"))
                yield f"data.columns names prompt and completion, got {column!r}{hint}"
            elif not isinstance(source, str):
                yield f"data.columns.{column} must be the name of a column, got {source!r}"

    yield from _check_optimizer(config.optimizer)
    trainer = config.trainer
    for key in ("max_steps", "max_epochs"):
        value = getattr(trainer, key)
        if value is not None and value != -1 and value < 1:
            yield f"trainer.{key} must be a positive integer, or -1 or null for none, got {value!r}"
    interval = trainer.val_check_interval
    if interval is not None and not (interval > 0 if _is_int(interval) else _is_number(interval) and 0 < interval <= 1):
        yield (
            f"trainer.val_check_interval must be a positive number of steps or a fraction in (0, 1], got {interval!r}"
        )
    if trainer.devices != "auto" and not (_is_int(trainer.devices) and trainer.devices > 0):
        yield f"trainer.devices must be a positive integer or auto, got {trainer.devices!r}"
    if trainer.gradient_clip_val is not None and not trainer.gradient_clip_val > 0:
        yield (f"trainer.gradient_clip_val must be a positive number or null, got {trainer.gradient_clip_val!r}")
    warmup = config.scheduler.warmup
    if not (warmup >= 0 if _is_int(warmup) else _within(warmup, 0, 1)):
        yield (f"scheduler.warmup must be a fraction in [0, 1) or a whole number of steps, got {warmup!r}")
    elif _is_int(warmup) and 0 < (trainer.max_steps or 0) <= warmup:
        yield (
            f"scheduler.warmup must be shorter than the run: {warmup} steps of warmup, "
            f"trainer.max_steps is {trainer.max_steps}"
        )
    if logger := config.logger:
        if logger.type == "wandb" and not (logger.mode and logger.project):
            yield "logger.mode and logger.project must be set for wandb: choose logger=wandb"
        if logger.type == "csv" and dataclasses.replace(logger, tags=[]) != Logger(type="csv"):
            yield "logger.type csv takes no other keys: choose logger=wandb with them"


def _check_optimizer(optimizer: dict[str, Any]) -> Iterable[str]:
    target = optimizer.get("_target_")
    if not (isinstance(target, str) and _OPTIMIZER.fullmatch(target)):
        yield (
            "optimizer._target_ must be a class of torch.optim or bitsandbytes.optim, "
            f"such as torch.optim.AdamW, got {target!r}"
        )
    lr = optimizer.get("lr")
    if not _within(lr, 1e-300, float("inf")):
        yield f"optimizer.lr must be a positive number, got {lr!r}"
    weight_decay = optimizer.get("weight_decay", 0)
    if not _within(weight_decay, 0, float("inf")):
        yield f"optimizer.weight_decay must be zero or a positive number, got {weight_decay!r}"
    betas = optimizer.get("betas", [])
    if not (isinstance(betas, list) and all(_within(beta, 0, 1) for beta in betas)):
        yield f"optimizer.betas must be numbers in [0, 1), got {betas!r}"
    eps = optimizer.get("eps", 1)
    if not _within(eps, 1e-300, float("inf")):
        yield f"optimizer.eps must be a positive number, got {eps!r}"


def _check_files(config: Config) -> Iterable[str]:
    for key in ("path", "eval_path"):
        value = getattr(config.data, key)
        if value == "":
            yield f"data.{key} is not set: give data.{key}=FILE, or a name on the hub"
        elif value not in (None, "embedded"):
            yield from _check_source(f"data.{key}", value, _DATA_SUFFIXES)
    if config.task.retention_path is not None and not os.path.isfile(config.task.retention_path):
        yield f"task.retention_path: no file {config.task.retention_path!r}"
    name = config.model.name
    if name != "embedded":
        found = list(_check_source("model.name", name, ()))
        yield from found
        if not found and os.path.exists(name) and not os.path.isfile(os.path.join(name, "config.json")):
            yield f"model.name: {name!r} holds no config.json, so it is no model folder"
    if config.resume is not None:
        if not os.path.isdir(config.resume):
            yield f"resume: no folder {config.resume!r}"
        elif not (Path(config.resume) / "checkpoints" / "last.ckpt").is_file():
            yield f"resume: {config.resume!r} holds no checkpoints/last.ckpt to go on from"


def _check_source(key: str, value: str, suffixes: tuple[str, ...]) -> Iterable[str]:
    """`value` is a path that exists and is not empty, or looks like a name on the hub."""
    path = Path(value)
    if not os.path.exists(value):
        is_path = value.startswith((".", "/", "~")) or path.suffix.lower() in suffixes
        if is_path or not _HUB_NAME.fullmatch(value):
            beside = path.parent.iterdir() if os.path.isdir(path.parent) else ()
            hint = _hint(value, (str(found) for found in beside))
            yield f"{key}: no file or folder {value!r}{hint}"
    elif path.is_file() and path.stat().st_size == 0:
        yield f"{key}: {value!r} is empty"
    elif path.is_dir() and not any(path.iterdir()):
        yield f"{key}: the folder {value!r} is empty"


# --- from Hydra's config to ours ------------------------------------------------------------------


def compose(overrides: Iterable[str] = ()) -> Config:
    """The checked config that a command with these overrides gives, or an InputError."""
    arguments = _prepare(list(overrides))
    try:
        with hydra.initialize_config_dir(str(CONF), version_base=_VERSION_BASE):
            config = _typed(hydra.compose("train", arguments))
    except LorafitError:
        raise
    except Exception as error:
        raise InputError(_explain(error, arguments)) from error
    check(config)
    return config


def _typed(values: DictConfig) -> Config:
    """Our dataclasses. A merge into a fresh schema refuses the keys that `+` brought past Hydra."""
    try:
        plain = OmegaConf.to_container(values)
        typed = OmegaConf.merge(OmegaConf.structured(Config), plain)
        if missing := sorted(OmegaConf.missing_keys(typed)):
            raise InputError("\n".join(f"{key} is not set: give {key}=VALUE" for key in missing))
        config = OmegaConf.to_object(typed)
    except ConfigKeyError as error:
        raise InputError(_unknown_key(error.full_key or str(error.key))) from error
    except OmegaConfBaseException as error:
        raise InputError(_one_line(error)) from error
    assert isinstance(config, Config)
    for node, key in (
        (config, "resume"),
        (config.model, "name"),
        (config.data, "path"),
        (config.data, "eval_path"),
        (config.task, "retention_path"),
    ):
        if (value := getattr(node, key)) is not None:
            setattr(node, key, os.path.expanduser(value))  # which a shell does at the start of a word only
    return config


def _prepare(overrides: list[str]) -> list[str]:
    """Quote the paths that Hydra's grammar cannot read: `~/rows.jsonl`, and the folders of a sweep."""
    prepared = []
    for text in overrides:
        key, _, value = text.partition("=")
        if value.startswith("~/") or (re.search(r"[=,(){}\[\]]", value) and os.path.exists(value)):
            escaped = value.replace("\\", "\\\\").replace("'", "\\'")
            text = f"{key}='{escaped}'"
        prepared.append(text)
    return prepared


def _postpone(overrides: list[str]) -> list[str]:
    """Give keys of `quant` and `logger` to the jobs of a sweep alone, as a choice of one value.

    Hydra also composes the sweep as a whole, where `-m quant=nf4,fp4 quant.block_size=128` finds
    no quant yet that could have a block size.
    """
    return [re.sub(r"^((?:quant|logger)\.\w+)=([^,]+)$", r"\1=choice(\2)", text) for text in overrides]


def _replay(overrides: list[str]) -> list[str]:
    """`resume=RUN` means RUN's own overrides, then the ones given now, and goes on in RUN's own folder."""
    folder = next((text[7:].strip("'\"") for text in overrides if text.startswith("resume=")), "")
    recorded = Path(folder).expanduser() / ".hydra" / "overrides.yaml"
    if not folder or not recorded.is_file():
        return overrides
    before = [text for text in yaml.safe_load(recorded.read_text()) or [] if text[:7] != "resume="]
    here = str(Path(folder).expanduser()).replace("\\", "\\\\").replace("'", "\\'")
    # the run may be one job of a sweep file, which is not to be swept again
    return [f"hydra.run.dir='{here}'", *before, *overrides, "hydra.mode=RUN"]


# --- one line for each error ----------------------------------------------------------------------


def _groups(extra: str | None = None) -> dict[str, list[str]]:
    """Every config group with its options, in conf/ and in the folder of --config-dir."""
    groups: dict[str, list[str]] = {}
    for root in (CONF, Path(extra)) if extra else (CONF,):
        for path in sorted(root.glob("*/**/*.yaml")):
            options = groups.setdefault(path.parent.relative_to(root).as_posix(), [])
            if path.stem not in options:
                options.append(path.stem)
    return groups


def _keys(schema: Any, prefix: str = "") -> Iterable[str]:
    """The dotted keys of a dataclass and of those in it."""
    for name, hint in get_type_hints(schema).items():
        yield prefix + name
        for kind in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(kind):
                yield from _keys(kind, f"{prefix}{name}.")


def _known_keys() -> set[str]:
    found = {*_keys(Config), *_keys(HydraConf, "hydra.")}
    for path in CONF.glob("optimizer/*.yaml"):
        found.update(f"optimizer.{key}" for key in yaml.safe_load(path.read_text()))
    return found


def _unknown_key(key: str) -> str:
    hint = _hint(key, _known_keys() - {key}, count=1)  # the second best key is noise
    if key.startswith("optimizer."):
        hint += f"{'' if hint else '.'} An argument that its file does not list: +{key}=VALUE"
    return f"no config key {key!r}{hint}"


def _choices_of(override: Override) -> list[str]:
    """What the override asks of a group: one option, or those of a sweep."""
    if override.is_sweep_override():
        if not override.is_discrete_sweep():
            return []
        return [text.strip("'\"") for text in override.sweep_string_iterator()]
    value = override.value()
    if isinstance(value, list):
        return [str(item) for item in value]
    return [override.get_value_string().strip("'\"")]


def _explain(error: Exception, overrides: list[str], config_dir: str | None = None) -> str:
    """What was wrong with the command, in one line, with the nearest right name.

    An error that no override explains, of a kind that is not for users, is raised again.
    """
    if isinstance(error, OverrideParseException):
        hint = (
            "quote a value that holds = , ( ) [ ] { } or quotes: \"key='value'\""
            if "=" in error.override
            else "an override is key=value"
        )
        return f"cannot read the override {error.override!r}: {hint}"
    groups = _groups(config_dir)
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            continue  # the error at hand is another one
        said = _explain_override(override, groups, str(error))
        if said:
            return said
    if isinstance(error, HydraException | OmegaConfBaseException | yaml.YAMLError | OSError):
        return _one_line(error)
    raise error


def _explain_override(override: Override, groups: dict[str, list[str]], error: str) -> str | None:
    key, text = override.key_or_group, override.input_line or ""
    keys = _known_keys()
    if override.is_sweep_override() and ("Ambiguous" in error or "--multirun" in error):
        several = f"{text!r} lists several values: add -m to run a job for each"
        return several if key in groups else f"{several} (a list is written in brackets)"
    if key in groups and not override.is_delete():
        for choice in _choices_of(override):
            if choice not in groups[key]:
                hint = _hint("none" if choice == "null" else choice, groups[key])
                if key.startswith("lora/"):
                    hint += f"{'' if hint else '.'} A value has no slash: {key[5:]}={choice}"
                known = ", ".join(groups[key])
                return f"no choice {choice!r} in config group {key!r} ({known}){hint}"
    if override.is_add() and ("append" in error or "Multiple values" in error):
        return f"{key!r} is there already: write {text.lstrip('+')!r}, without the +"
    group = key.partition(".")[0]
    if key in keys and group in ("quant", "logger") and key != group and "NoneType" in error:
        usual = {"quant": "nf4", "logger": "wandb"}.get(group, "NAME")
        others = ", ".join(name for name in groups.get(group, []) if name not in ("none", usual))
        return f"{key} cannot be set, {group} is none: choose {group}={usual} (or {others}) as well"
    if key in keys or key in groups or key.startswith("hydra/"):
        # an argument of another optimizer is known, and still not one of this optimizer's
        return _unknown_key(key) if f"Could not override '{key}'" in error else None
    if key.startswith("optimizer.") and override.is_add():
        return None
    if "." in key:
        return _unknown_key(key)
    near = nearest(key, {*groups, *keys}, count=1)
    if not near:
        return f"no config group or key {key!r}"
    kind = "group" if "/" in key or near[0] in groups else "key"
    return f"no config {kind} {key!r}{_hint(key, near)}"


def _one_line(error: BaseException) -> str:
    """An error of Hydra or OmegaConf that no override explains: their first words, and the key."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    first = str(cause).strip().partition("\n")[0] or type(cause).__name__
    key = getattr(cause, "full_key", None)
    wrong = re.match(r"Value (.*) of type '\w+' could not be converted to (\w+)", first)
    if key and wrong:
        kinds = {"Integer": "an integer", "Float": "a number", "String": "a text"}
        return f"{key} must be {kinds.get(wrong[2], wrong[2].lower())}, got {wrong[1]}"
    wrong = re.match(r"Value (.*) is not a valid bool", first)
    if key and wrong:
        return f"{key} must be true or false, got {wrong[1]}"
    if key and "is not Optional" in first:
        return f"{key} cannot be null"
    return f"{key}: {first}" if key and key not in first else first


# --- a program ------------------------------------------------------------------------------------

Run = Callable[[Config, Path], float | None]


class _Jobs:
    """What Hydra calls for each job: type the config, check it, run. It keeps what failed.

    A failure is kept, not raised, so that the other jobs of a sweep run and Hydra adds no words of
    its own. In the worker processes of a parallel launcher it is raised: keeping it would lose it.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.process = os.getpid()
        self.count = 0
        self.failed: list[tuple[str, Exception]] = []

    def __call__(self, values: DictConfig) -> float | None:
        job = HydraConfig.get()
        folder = Path(job.runtime.output_dir)
        sweeping = job.mode == RunMode.MULTIRUN
        self.count += 1
        if sweeping:
            print(f"\njob {job.job.num}: {folder.name}  ->  {folder}", flush=True)
        try:
            config = _typed(values)
            check(config)
            if job.output_subdir is not None:
                resolved = folder / job.output_subdir / "resolved.yaml"
                resolved.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
            return self.run(config, folder)
        except Exception as error:
            known = isinstance(error, LorafitError)
            _failures.error("%s", error, exc_info=not known)
            if sweeping:
                said = str(error) if known else traceback.format_exc()
                print(f"job {job.job.num} failed: {said}", file=sys.stderr, flush=True)
                _free(error)
            error.add_note(f"in the job of {folder}")
            if os.getpid() != self.process:
                raise
            self.failed.append((folder.name, error))
            return None
        except (Stopped, KeyboardInterrupt) as stop:
            _failures.error("%s", str(stop) or "interrupted")
            raise


def start(name: str, run: Run) -> None:
    """Run the program `name` with the overrides of the command line; `run` is called once per job.

    Returns when all jobs are done. Otherwise the process ends with the exit code of what went
    wrong: 2 for the user's errors (one message), 130 or 143 for a signal; a bug has its traceback.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach this function as they are
    hydra.version.setbase(_VERSION_BASE)
    parser = get_args_parser()
    arguments = parser.parse_intermixed_args()
    overrides = _prepare(arguments.overrides)
    if arguments.experimental_rerun:
        _end(name, "--experimental-rerun is not supported: use resume=RUN", InputError.exit_code)
    jobs = _Jobs(run)
    try:
        if not arguments.multirun:
            overrides = _replay(overrides)
        first = [f"hydra.job.name={name}", *_name_jobs(overrides)]
        if arguments.multirun or any(text.startswith("sweep=") for text in overrides):
            overrides = _postpone(overrides)
        arguments.overrides = [*first, *overrides]
        _run_hydra(arguments, parser, jobs, str(CONF), "train")
        if jobs.failed:
            raise jobs.failed[0][1]
    except LorafitError as error:
        _end(name, _tell(jobs) if jobs.count > 1 else str(error), error.exit_code)
    except Stopped as stop:
        _end(name, str(stop), stop.exit_code)
    except KeyboardInterrupt:
        _end(name, "interrupted", 130)
    except Exception as error:
        if hasattr(error, "__notes__"):  # it comes out of a job: a bug
            raise
        _end(name, _explain(error, overrides, arguments.config_dir), InputError.exit_code)


def _free(error: BaseException | None) -> None:
    """Let go of what a failed job held: its traceback would keep the model while the others run."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _name_jobs(overrides: list[str]) -> list[str]:
    """Which keys all jobs of a sweep share: the names of their folders leave those out."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    fixed = [item.key_or_group for item in parsed if not item.is_sweep_override()]
    return [f"hydra.job.config.override_dirname.exclude_keys={json.dumps(fixed)}"] if fixed else []


def _tell(jobs: _Jobs) -> str:
    lines = [f"  {folder}: {error}" for folder, error in jobs.failed]
    return "\n".join([f"{len(jobs.failed)} of {jobs.count} jobs failed:", *lines])


def _end(name: str, message: str, code: int) -> NoReturn:
    print(f"lorafit {name}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
