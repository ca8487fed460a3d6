"""A run that was stopped: which one it is, where it goes on, and whether it still is the same run.

Every checkpoint says of what it is a part: the settings that decide what is trained, the base by its fingerprint, the
training tokens and the template by a hash. A run whose settings, base or data have become others would go on without a
word, at a place in data that is no longer the same data; so it is refused, and what differs is named. `allow_changed`
lets it go on all the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.config import Config
from lorafit.errors import InputError
from lorafit.files import copy_atomically
from lorafit.redact import redact_values
from lorafit.rescue import clear_run_drafts, only_told
from lorafit.schema import training_settings
from lorafit.sweep import has_checkpoint, is_busy, is_completed, read_metrics, recorded_sha256

if TYPE_CHECKING:
    from lorafit.checkpoint import Found
    from lorafit.datamodule import FinetuneDataModule

log = logging.getLogger(__name__)

# what a run leaves that the next one would replace or take for its own; that which tells that there was one comes last,
# so that a second start completes what a killed one has begun
_LEFT = (
    *("samples.jsonl", "history.jsonl", "csv", "wandb/run.json", ".hydra", "metrics.json"),
    *("checkpoints", "adapter"),
)
# what decides the shape of an adapter, that of a checkpoint with it
_SHAPE = ("rank", "rank_pattern", "target_modules", "modules_to_save", "bias")
RUNS = "outputs/*/*"  # where runs lie that were given no folder (conf/train.yaml)


# ------------------------------------------------------------------------------------------------ is it the same run?


def identity(config: Config, data: FinetuneDataModule, model: Any, devices: int) -> dict[str, Any]:
    """What a checkpoint says of the run that it belongs to, in plain values. devices: how many processes train, which
    trainer.devices=auto does not say."""
    import torch

    from lorafit.adapter import base_fingerprint

    device = next(model.parameters()).device
    settings, rounding = training_settings(config)
    settings["trainer.devices"] = devices
    fingerprint = base_fingerprint(model)
    found = {
        "settings": settings,
        "rounding": rounding,
        # a model that somebody else has quantized has none
        "base": {"fingerprint": fingerprint or config.model.name, "config": _config_hash(model)},
        "data": data.data_hash(),
        "template": data.template_hash(),
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processor": platform.machine(),
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
        }
        | {name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
    }
    return {key: redact_values(value) for key, value in found.items()}


def _config_hash(model: Any) -> str:
    """Of what a base does beside its weights: its configuration, without what says only where it comes from."""
    values = model.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "quantization_config", "use_cache", "dtype", "torch_dtype"):
        values.pop(key, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two identities in a way that changes what is trained: by its name, in words."""
    found: dict[str, str] = {}
    before, after = then["settings"], now["settings"]
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and (key in before.keys() & after.keys() or _weighs(key, before, after)):
            found[key] = f"{key} is {before.get(key)} there, {after.get(key)} here"
    same_library = then["machine"].get("transformers") == now["machine"].get("transformers")
    if then["base"]["fingerprint"] != now["base"]["fingerprint"]:
        found["base"] = "the base model has other weights"
    elif same_library and then["base"]["config"] != now["base"]["config"]:
        found["base"] = "the base model has another configuration"
    if then["template"] != now["template"]:
        found["template"] = "the template is another one"
    # which any other change of how rows become tokens brings with it
    elif then["data"] != now["data"] and not any(key.startswith("data.") for key in found):
        found["data"] = "the training data are others"
    return found


def _weighs(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a key that only one side has says more than that quant or the optimizer is another one."""
    kind = {"quant": "quant.type", "optimizer": "optimizer._target_"}.get(key.partition(".")[0], "")
    return before.get(kind) == after.get(kind)


def require_same(config: Config, found: Found, now: Mapping[str, Any]) -> None:
    """Raise InputError naming what has changed since the checkpoint was written, unless `allow_changed` names it."""
    then = found.run
    allowed = config.allow_changed
    if not _is_identity(then):
        if "all" in allowed:
            log.warning(f"resume: {found.path} does not say what it was trained with, and is gone on with all the same")
            return
        raise InputError(
            f"resume: {found.path} does not say what it was trained with. To go on all the same: 'allow_changed=[all]'"
        )
    assert isinstance(then, Mapping)
    changed = changes(then, now)
    refused = [name for name in changed if not _allows(allowed, name)]
    if refused:
        shape = [name for name in refused if name.partition(".")[0] in _SHAPE]
        others = [name for name in changed if name not in shape]
        way_on = f"or to go on all the same: 'allow_changed=[{','.join(others)}]'"
        if shape:
            way_on = f"{' and '.join(shape)} in any case: the adapter that is to go on is of another shape"
        raise InputError(
            f"resume: {config.resume!r} was trained otherwise: {'; '.join(changed[name] for name in refused)}. Put it "
            f"back, {way_on}"
        )
    for name, said in changed.items():
        log.warning(f"resume: {said} ({name} is in allow_changed: it goes on from there, as another run than it was)")
    parts = [(then["rounding"], now["rounding"]), (then["machine"], now["machine"])]
    others = [
        f"{key} was {before.get(key)} and is {after[key]}"
        for before, after in parts
        for key in after
        if before.get(key) != after[key]
    ]
    if others:
        log.warning(f"resume: {'; '.join(others)}: the same is computed, but not to the last bit")


def take_over(folder: Path, found: Found, now: Mapping[str, Any]) -> None:
    """Write the checkpoint that a run goes on from down as its own: into its folder, with the best one and the curves,
    where it comes from another one, and under its settings, where something has changed. Killed before its next one it
    goes on like that again, without being allowed again what it was allowed.

    Not where it may turn out that it cannot be loaded under them: it stays what it is.
    """
    from lorafit.checkpoint import BEST, LAST, load_run, save_checkpoint

    home = folder / "checkpoints"
    here = found.path.parent.resolve() == home.resolve()
    if not _is_identity(found.run):
        return
    changed = changes(found.run, now)
    unsure = any(name.partition(".")[0] in _SHAPE or name == "optimizer._target_" for name in changed)
    if unsure or (here and not changed):
        return
    place = found.path if here else home / LAST
    with only_told(place, "until its next checkpoint the run cannot be gone on with as it is now"):
        home.mkdir(parents=True, exist_ok=True)
        if not here:
            best, curves = found.path.with_name(BEST), found.path.parent.parent / "history.jsonl"
            for path, copy in ((best, home / BEST), (curves, folder / curves.name)):
                if path.is_file():
                    copy_atomically(path, copy)
        save_checkpoint(place, load_run(found.path) | {"run": dict(now)})


def _is_identity(then: object) -> bool:
    """Whether an identity that comes out of a file has the parts of one."""
    if not isinstance(then, Mapping):
        return False
    parts = [then.get(key) for key in ("settings", "rounding", "base", "machine")]
    good = all(isinstance(part, Mapping) and all(isinstance(key, str) for key in part) for part in parts)
    return good and {"fingerprint", "config"} <= set(then["base"]) and {"data", "template"} <= set(then)


def _allows(allowed: Iterable[str], name: str) -> bool:
    return bool({"all", name, name.partition(".")[0]} & set(allowed))


# ------------------------------------------------------------------------------------------------ where does it go on?


def find_checkpoint(config: Config) -> Found | None:
    """From where a run goes on: its newest checkpoint that can be read. None where there is none yet, since it was
    stopped before its first; it begins anew then. Damaged ones are told."""
    from lorafit.checkpoint import newest_checkpoint

    assert config.resume is not None
    found = newest_checkpoint(Path(config.resume) / "checkpoints")
    if found is None:
        log.warning(f"resume: {config.resume!r} has no checkpoint to go on from: it begins anew")
        return None
    for said in found.damaged.values():
        log.warning(f"resume: {said.partition(': remove')[0]}")
    if found.damaged:
        log.warning(f"resume: it goes on from the checkpoint before, {found.path}, of step {found.step}")
    return found


def settle(folder: Path, found: Found | None) -> None:
    """Before a run writes into its folder: take away what killed writers have left. Where it goes on there, put damaged
    checkpoints aside, lest one be kept as the one before the last; where it begins anew, put aside what an earlier run
    has left. Raises OSError where the folder does not let it."""
    home = folder / "checkpoints"
    try:
        clear_run_drafts(folder)
    except OSError as error:
        log.warning(f"{folder} cannot be cleared up ({error.strerror})")
    if found is None or found.path.parent.resolve() != home.resolve():
        set_aside(folder)
        return
    for path in found.damaged:
        os.replace(path, path.with_suffix(".damaged"))
    if os.path.lexists(folder / "adapter") and not (folder / "adapter").is_dir():
        _rename([folder / "adapter"])  # a file, where the adapter's folder is to be


def holds_a_run(folder: Path) -> bool:
    """Whether a folder holds what a run was for, an adapter or a checkpoint, or a metrics.json of something else."""
    foreign = os.path.lexists(folder / "metrics.json") and "status" not in read_metrics(folder)
    return foreign or os.path.lexists(folder / "adapter") or has_checkpoint(folder)


def set_aside(folder: Path) -> None:
    """Rename what a run would replace in its folder, where that holds a run: adapter/ becomes adapter.old/,
    metrics.json metrics.old.json, or .old2 where that is taken."""
    if not holds_a_run(folder):
        return
    aside = _rename([path for name in _LEFT if os.path.lexists(path := folder / name)])
    names = ", ".join(place.name for place in aside if place.name[0] != "." and place.parent == folder)
    log.warning(f"{folder} held an earlier run, which is not replaced: what it left is called {names} now")


def _rename(there: list[Path]) -> list[Path]:
    """Put .old into the names of files and folders, or .old2 where one of those is taken, so that nothing is replaced.
    Returns their new paths."""
    for number in itertools.chain([""], itertools.count(2)):
        aside = [path.with_name(f"{path.stem}.old{number}{path.suffix}") for path in there]
        if not any(map(os.path.lexists, aside)):
            break
    for path, place in zip(there, aside, strict=True):  # in its own folder, or a read-only one could not be renamed
        os.replace(path, place)
    return aside


# ------------------------------------------------------------------------------------------------ which run is it?


def find_run(sha256: str, folder: Path | None) -> Path | None:
    """For resume=auto: the folder of the run of these settings, done or not; None where there is none.

    folder: the run folder that the command gives. Without one the newest of those below outputs/ that is not being
    worked at.
    """
    if folder is not None:
        return folder if is_run(folder) else None
    found = [
        run
        for run in Path().glob(RUNS)
        if recorded_sha256(run) == sha256 and (is_completed(run) or has_checkpoint(run)) and not is_busy(run)
    ]
    return max(found, key=lambda run: run.stat().st_mtime, default=None)


def is_run(folder: Path) -> bool:
    """Whether a run was begun in a folder."""
    return (folder / ".hydra" / "overrides.yaml").is_file()


def is_done(folder: Path, sha256: str) -> bool:
    """Whether the run of these settings in a folder has come to its end."""
    return is_completed(folder) and recorded_sha256(folder) == sha256
