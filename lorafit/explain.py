"""An error of Hydra or OmegaConf as one line that names the thing and the nearest right name.

Hydra's own words are made for its developers. Here the overrides of the command are looked at again, one by one,
against the groups in `conf/` and the keys of the schema, and the first that is wrong is named.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from lorafit.errors import nearest, reason, shortened
from lorafit.schema import CONF, Config, near_names


def config_groups(extra: str | None = None) -> dict[str, list[str]]:
    """Every config group with its options, in conf/ and in the folder of --config-dir."""
    groups: dict[str, list[str]] = {}
    for root in (CONF, Path(extra)) if extra else (CONF,):
        for path in sorted(root.glob("*/**/*.yaml")):
            options = groups.setdefault(path.parent.relative_to(root).as_posix(), [])
            if path.stem not in options:
                options.append(path.stem)
    return groups


def schema_keys(schema: Any, prefix: str = "") -> Iterable[str]:
    """The dotted keys of a dataclass and of those in it."""
    for name, hint in get_type_hints(schema).items():
        yield prefix + name
        for kind in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(kind):
                yield from schema_keys(kind, f"{prefix}{name}.")


def _known_keys() -> set[str]:
    found = {*schema_keys(Config), *schema_keys(HydraConf, "hydra.")}
    for path in CONF.glob("optimizer/*.yaml"):
        found.update(f"optimizer.{key}" for key in yaml.safe_load(path.read_text()))
    return found


def unknown_key(key: str) -> str:
    hint = near_names(key, _known_keys() - {key}, count=1)  # the second best key is noise
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


def explain(error: Exception, overrides: list[str], config_dir: str | None = None) -> str:
    """What was wrong with the command, in one line, with the nearest right name.

    An error that no override explains, of a kind that is not for users, is raised again.
    """
    if isinstance(error, OverrideParseException):
        hint = (
            "quote a value that holds other signs than letters from a to z, digits and . _ - / : \"key='value'\""
            if "=" in error.override
            else "an override is key=value"
        )
        return shortened(f"cannot read the override {error.override!r}: {hint}")
    groups = config_groups(config_dir)
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            continue  # the error at hand is another one
        except (ValueError, RecursionError) as wrong:  # a number of thousands of digits
            return f"cannot read the override {text[:80]!r}: {reason(wrong)}"
        said = _explain_override(override, groups, str(error))
        if said:
            return shortened(said)
    for_users = (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, RecursionError)
    if isinstance(error, for_users):
        return one_line(error)
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
                hint = near_names("none" if choice == "null" else choice, groups[key])
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
        return unknown_key(key) if f"Could not override '{key}'" in error else None
    if key.startswith("optimizer.") and override.is_add():
        return None
    if "." in key:
        return unknown_key(key)
    near = nearest(key, {*groups, *keys}, count=1)
    if not near:
        return f"no config group or key {key!r}"
    kind = "group" if "/" in key or near[0] in groups else "key"
    return f"no config {kind} {key!r}{near_names(key, near)}"


def one_line(error: BaseException) -> str:
    """An error of Hydra or OmegaConf that no override explains: their first words, and the key."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    first = shortened(str(cause).strip().partition("\n")[0]) or type(cause).__name__
    key = getattr(cause, "full_key", None)
    wrong = re.match(r"Value (.*) of type '\w+' could not be converted to (\w+)", first)
    if key and wrong:
        kinds = {"Integer": "an integer", "Float": "a number", "String": "a text"}
        return f"{key} must be {kinds.get(wrong[2], wrong[2].lower())}, got {wrong[1]}"
    wrong = re.match(r"Value (.*) is not a valid bool", first)
    if key and wrong:
        return f"{key} must be true or false, got {wrong[1]}"
    if key and "Cannot merge DictConfig with ListConfig" in first:  # whichever of them it was
        return f"{key} is of another kind: a list is given as '{key}=[A,B]', a section by its keys, '{key}.KEY=A'"
    if key and "is not a ListConfig" in first:
        return f"{key} must be a list, in brackets also where it has one entry: '{key}=[A]', '{key}=[A,B]'"
    if key and "is not Optional" in first:
        return f"{key} cannot be null"
    return f"{key}: {first}" if key and key not in first else first
