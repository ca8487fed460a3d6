"""From overrides to one checked, typed `Config`.

    config = compose(["rank=8", "quant=nf4"])

Hydra composes `conf/`, schema.py says which keys and values there may be, explain.py puts errors into words; launch.py
does the same for a command line and runs its jobs. Nothing here imports torch, so that a typing error is answered at
once.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from lorafit.errors import InputError, LorafitError
from lorafit.explain import explain, one_line, unknown_key
from lorafit.schema import CONF, Config, check, config_sha256, is_number, to_dict

__all__ = ["CONF", "Config", "check", "compose", "config_sha256", "settings_to_record", "to_dict"]

VERSION_BASE = "1.3"
# more values, or deeper ones, than any setting has, and about as many as OmegaConf takes seconds for
_MOST, _DEEPEST = 5000, 20


# --- resolvers: the few values in conf/ that follow from others -----------------------------------


def _mul(factor: float, value: Any) -> Any:
    """`${mul:2,${rank}}`. A value that is no number passes through, for `check` to name."""
    return factor * value if is_number(value) else value


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
    named = varied or [pair for pair in pairs if pair[0] != "sweep"]
    parts, exact = [], True
    for key, _, value in named:
        plain = re.sub(r"['\"\[\] ]", "", value).replace(",", "+")
        safe = re.sub(r"[^\w.+-]", "_", plain)
        # an outer bracket or quotation mark says nothing; any other sign that is left out may tell two jobs apart
        same = value in (plain, f"[{plain.replace('+', ',')}]", f"'{plain}'", f'"{plain}"')
        exact = exact and safe == plain and same and not ("+" in value and "," in value)
        parts.append(f"{key.replace('/', '.')}={safe}")
    name = ",".join(parts)
    if not exact or len(name) > 120:
        digest = hashlib.sha256(",".join(map("".join, named)).encode()).hexdigest()
        name = f"{name[:112]}-{digest[:6]}"
    return name or str(number)


# At import, so that the worker processes of a parallel launcher have them too.
OmegaConf.register_new_resolver("mul", _mul, replace=True)
OmegaConf.register_new_resolver("embedded_or", _embedded_or, replace=True)
# cached: a folder is new only once, and all readers of one config mean the same
OmegaConf.register_new_resolver("new_folder", _new_folder, replace=True, use_cache=True)
OmegaConf.register_new_resolver("job_folder", _job_folder, replace=True)
ConfigStore.instance().store(name="lorafit_schema", node=Config)


# --- from Hydra's config to ours ------------------------------------------------------------------


def compose(overrides: Iterable[str] = (), config_dir: str | None = None) -> Config:
    """The checked config that a command with these overrides gives, or an InputError. config_dir: a folder with more
    files of settings."""
    arguments = prepare(list(overrides))
    if config_dir is not None:
        arguments.append(f"hydra.searchpath=[{quoted('file://' + os.path.abspath(config_dir))}]")
    try:
        with hydra.initialize_config_dir(str(CONF), version_base=VERSION_BASE):
            config = typed(hydra.compose("train", arguments), arguments)
    except LorafitError:
        raise
    except Exception as error:
        raise InputError(explain(error, arguments)) from error
    check(config)
    return config


def typed(values: DictConfig, overrides: Sequence[str]) -> Config:
    """Our dataclasses. A merge into a fresh schema refuses the keys that `+` brought past Hydra."""
    try:
        plain: Any = OmegaConf.to_container(values)
        if plain.get("adapter"):
            _take_over(plain, {text.lstrip("+~").partition("=")[0] for text in overrides})
        typed = OmegaConf.merge(OmegaConf.structured(Config), plain)
        if missing := sorted(OmegaConf.missing_keys(typed)):
            raise InputError("\n".join(f"{key} is not set: give {key}=VALUE" for key in missing))
        config = OmegaConf.to_object(typed)
    except ConfigKeyError as error:
        raise InputError(unknown_key(error.full_key or str(error.key))) from error
    except OmegaConfBaseException as error:
        raise InputError(one_line(error)) from error
    assert isinstance(config, Config)
    for node, key in (
        (config, "resume"),
        (config, "out"),
        (config.merge, "unmerge"),
        (config.generate, "prompts"),
        (config.model, "name"),
        (config.task, "retention_path"),
    ):
        if (value := getattr(node, key)) is not None:
            setattr(node, key, os.path.expanduser(value))  # which a shell does at the start of a word only
    for key in ("path", "eval_path"):
        setattr(config.data, key, _expanded(getattr(config.data, key)))
    return config


# What the file of an adapter may say of the base and the data; running its code is not among it.
_RECORDED = {
    "model": ("name", "revision", "init", "dtype"),
    "data": (
        *("path", "subset", "split", "eval_path", "eval_split", "eval_fraction", "format", "columns", "on_bad_row"),
        *("template", "system", "max_length", "overflow", "max_lost", "train_on", "limit", "allow"),
        *("batch_size", "eval_batch_size"),
    ),
    "task": ("eval_examples", "generate_examples", "samples", "max_new_tokens", "retention_path"),
}


def settings_to_record(config: Config) -> dict[str, Any]:
    """What an adapter should remember of the run that made it, so that `adapter=DIR` alone says base and data."""
    values = to_dict(config)
    settings = {section: {key: values[section][key] for key in keys} for section, keys in _RECORDED.items()}
    return settings | {"quant": values["quant"], "seed": config.seed}


def _take_over(plain: dict[str, Any], given: set[str]) -> None:
    """Put what the (first) adapter recorded of its base and its data where the command says nothing else."""
    from lorafit.adapter import find_adapter, read_config, read_record

    entry = plain["adapter"]
    first = next(iter(entry.values())) if isinstance(entry, dict) else entry[0] if isinstance(entry, list) else entry
    if not isinstance(first, str):
        return  # for `check` to name
    folder = find_adapter(os.path.expanduser(first))
    record = read_record(folder)
    settings = record.get("settings") or {}
    if _is_too_much([settings, record.get("dtype")]):
        raise InputError(
            f"adapter {first!r}: the settings in its lorafit.json are more than {_MOST} values, or nested deeper than "
            f"{_DEEPEST}"
        )
    if "${" in json.dumps([settings, record.get("dtype")]):  # a stranger's file, which is not to be computed with
        raise InputError(f"adapter {first!r}: the settings in its lorafit.json hold an interpolation (${{…}})")
    for section, keys in _RECORDED.items():
        recorded = settings.get(section) or {}
        for key in keys:
            if key in recorded and not given & {section, f"{section}.{key}"}:
                plain[section][key] = recorded[key]
    if not given & {"model", "model.name"}:
        name = (settings.get("model") or {}).get("name") or read_config(folder).base_model
        if not name:
            raise InputError(f"adapter {first!r} names no base model: give model.name=NAME")
        if not isinstance(name, str) or "${" in name:
            raise InputError(f"adapter {first!r} names an impossible base model, {str(name)[:200]!r}")
        plain["model"]["name"] = name
    if not any(key.partition(".")[0] == "quant" for key in given) and "quant" in settings:
        plain["quant"] = settings["quant"]
    if "save.dtype" not in given and record.get("dtype"):
        plain["save"]["dtype"] = record["dtype"]  # a smaller adapter, or several in one, stays as small a file
    if "seed" not in given and "seed" in settings:
        plain["seed"] = settings["seed"]
    for key in ("rank", "alpha"):
        if key not in given and f"lora/{key}" not in given:
            plain[key] = None


def _is_too_much(value: Any) -> bool:
    """Whether nested values are more, or nested deeper, than a configuration can take."""
    level, count = [value], 0
    for _ in range(_DEEPEST):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
        count += len(level)
    return count > _MOST or bool(level)


def _expanded(value: Any) -> Any:
    """A path, or the paths of a list of sources, with ~ as the shell means it."""
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    if isinstance(value, dict):
        return value | {"path": _expanded(value.get("path"))}
    return os.path.expanduser(value) if isinstance(value, str) else value


def quoted(value: str) -> str:
    """A text as Hydra's grammar reads it, whatever it holds."""
    # a backslash escapes before a quote and at the end; elsewhere it stands for itself
    escaped = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), value)
    return f"'{escaped}'"


def unquoted(value: str) -> str | None:
    """The text that Hydra's grammar reads in a value, None for null. What is no text there, or cannot be read, is taken
    as it stands."""
    if re.fullmatch(r"[\w./-]*", value, re.ASCII):
        return None if value.lower() == "null" else value
    try:
        read = OverridesParser.create().parse_override(f"key={value}").value()
    except HydraException:
        return value
    return read if isinstance(read, str) else value


def prepare(overrides: list[str]) -> list[str]:
    """Quote the paths that Hydra's grammar cannot read: `~/rows.jsonl`, and the folders of a sweep."""
    prepared = []
    for text in overrides:
        depths = itertools.accumulate((sign in "[{(") - (sign in ")}]") for sign in text)
        if max(depths, default=0) > _DEEPEST or text.count(",") > _MOST:
            raise InputError(
                f"cannot read the override {text[:80]!r}…: more than {_MOST} values, or deeper than {_DEEPEST} brackets"
            )
        key, _, value = text.partition("=")
        if value.startswith("~/") or (not re.fullmatch(r"[\w./-]*", value, re.ASCII) and _is_path(value)):
            text = f"{key}={quoted(value)}"
        prepared.append(text)
    return prepared


def _is_path(value: str) -> bool:
    """Whether a value is a path that is there, or one to be made in a folder that is, whatever signs its name has; of
    the latter none that has a meaning to Hydra."""
    folder = os.path.dirname(value)
    return os.path.exists(value) or (os.path.isdir(folder) and not re.search(r"[][,(){}$\\]", value))


def postpone(overrides: list[str]) -> list[str]:
    """Give keys of `quant` and `logger` to the jobs of a sweep alone, as a choice of one value.

    Hydra also composes the sweep as a whole, where `-m quant=nf4,fp4 quant.block_size=128` finds
    no quant yet that could have a block size.
    """
    return [re.sub(r"^((?:quant|logger)\.\w+)=([^,]+)$", r"\1=choice(\2)", text) for text in overrides]
