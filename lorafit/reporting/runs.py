"""The runs below a folder, read as what strangers left there: plain data, of a size that can be true.

    found = find_runs(Path("multirun/2026-11-26/04-00-00"))
    found.runs         every folder in which `lorafit.train` ran, however deep it lies and however it ended
    found.not_read     [(folder, why)]: what was no run, and what of a run could not be read

Nothing that a folder holds can stop the reading: a file that is damaged, too large or of another kind is named, and the
rest is read. A number is one only if it is finite; in its place may stand null, which says that nobody measured it.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from lorafit.errors import reason

STATUSES = ("completed", "interrupted", "diverged", "out_of_memory", "failed")
CURVES = ("train/loss", "eval/loss")
POINTS = 400  # of a curve, at most

_LARGEST = {"metrics.json": 8 << 20, "history.jsonl": 64 << 20, ".hydra": 1 << 20}  # bytes; a real one is far below
_DEEPEST = 24  # folders below the first
_TAIL, _LINES = 16 << 10, 12  # of the log: bytes that are read, lines that are kept
_MOST = 1e100  # the size of a number, so that sums of them stay numbers
_COUNTS = {
    "parameters_trainable": ("model", "parameters_trainable"),
    "parameters_total": ("model", "parameters_total"),
    "rank": ("lora", "rank"),
    "peak_bytes": ("memory", "peak_bytes"),
    "train_seconds": ("speed", "train_seconds"),
    "startup_seconds": ("speed", "startup_seconds"),
    "total_seconds": ("speed", "total_seconds"),
    "steps": ("speed", "steps"),
    "tokens_per_second": ("speed", "tokens_per_second"),
    "supervised_tokens_per_second": ("speed", "supervised_tokens_per_second"),
    "train_examples": ("data", "train_examples"),
    "eval_examples": ("data", "eval_examples"),
    "seed": ("seed",),
}
# what every run keeps in folders of its own; nothing below them is a run
_PARTS = ("adapter", "checkpoints")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, eight times as fast, where libyaml is there


@dataclass
class Run:
    """One run as it was found. Numbers that are not there are missing from their dict."""

    folder: str  # below the folder that was asked for, "." where it is that one
    path: Path
    status: str = "interrupted"
    error: str | None = None
    overrides: list[str] | None = None  # None: nobody knows
    settings: dict[str, Any] = field(default_factory=dict)  # {"quant.type": "nf4"}: scalars, or the text of others
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    retention: dict[str, float] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)  # keys: those of _COUNTS
    ranks: dict[str, tuple[int, float]] = field(default_factory=dict)  # {module: (rank, effective rank)}
    ladder: dict[int, tuple[float, int | None]] = field(default_factory=dict)  # {rank: (loss, parameters)}
    rungs: dict[float, float] = field(default_factory=dict)  # {share of the steps: held-out loss}
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # {"train/loss": [(step, value)]}
    log: list[str] = field(default_factory=list)  # the last lines, of a run that is not completed
    versions: dict[str, str] = field(default_factory=dict)
    config_sha256: str | None = None

    @property
    def completed(self) -> bool:
        return self.status == "completed"


@dataclass
class Found:
    """What lies below a folder."""

    runs: list[Run] = field(default_factory=list)
    not_read: list[tuple[str, str]] = field(default_factory=list)  # (folder, why)
    damaged: bool = False  # something below may have been a run, and could not be read

    def add(self, other: Found) -> None:
        self.runs += other.runs
        self.not_read += other.not_read
        self.damaged |= other.damaged


class _Unusable(Exception):
    """A file that says nothing: its text is the reason."""


# -------------------------------------------------------------------------------------------------------- the folders


def find_runs(root: Path) -> Found:
    """Every run in `root` and below it, in the order of their names, numbers by their size."""
    found = _look(root, root, depth=0, in_run=False)
    found.runs.sort(key=lambda run: _in_order(run.folder))
    found.not_read.sort(key=lambda item: _in_order(item[0]))
    return found


def _in_order(name: str) -> list[Any]:
    """A key for sorting in which rank=8 comes before rank=16."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _look(folder: Path, root: Path, *, depth: int, in_run: bool) -> Found:
    """A folder and those below it. in_run: what is no run is not named, since it belongs to the run around it."""
    name = folder.relative_to(root).as_posix()
    if depth > _DEEPEST:
        return Found(not_read=[(name, f"lies more than {_DEEPEST} folders deep: not looked into")], damaged=True)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        program = _program(folder, {entry.name for entry in entries})
    except OSError as error:
        return Found(not_read=[(name, f"cannot be read: {error.strerror or reason(error)}")], damaged=True)
    found = Found()
    if is_run := program == "train":
        run, problems = read_run(folder, name)
        found.runs += [run] if run else []
        found.not_read += [(name, problem) for problem in problems]
        found.damaged = run is None
    below = Found()
    for entry in entries:
        if entry.name.startswith(".") or entry.name in ("wandb", *(_PARTS if is_run else ())) or not _is_folder(entry):
            continue
        if entry.is_symlink():
            if not (in_run or is_run):
                below.not_read.append(((Path(name) / entry.name).as_posix(), "a link to another folder: not followed"))
            continue
        below.add(_look(Path(entry.path), root, depth=depth + 1, in_run=in_run or is_run))
    if is_run or in_run or below.runs or below.damaged or folder == root:
        found.add(below)
    else:  # no run at all: one line for the whole tree
        found.not_read.append((name, _no_run(program, entries)))
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _program(folder: Path, names: set[str]) -> str | None:
    """The program of lorafit that ran here: the one that writes metrics.json, or the one Hydra's files name."""
    if "metrics.json" in names:
        return "train"
    if not (folder / ".hydra" / "overrides.yaml").is_file():
        return None
    try:
        overrides = _yaml(folder / ".hydra" / "hydra.yaml")["hydra"]["overrides"]["hydra"]
    except FileNotFoundError:
        return "train"
    except (_Unusable, KeyError, TypeError):
        return "another program"
    given = [text for text in overrides or [] if isinstance(text, str)] if isinstance(overrides, list) else []
    # every program of lorafit gives its name so, and hardly a stranger's does
    names_given = [text.partition("=")[2] for text in given if text.startswith("hydra.job.name=")]
    return names_given[-1] if names_given else "another program"


def _no_run(program: str | None, entries: list[os.DirEntry[str]]) -> str:
    if not entries:
        return "empty"
    if program is None:
        return "not a run: it holds no metrics.json"
    return f"not a run of train, but of {program[:60]}"


# ------------------------------------------------------------------------------------------------------------ one run


def read_run(folder: Path, name: str) -> tuple[Run | None, list[str]]:
    """(the run in a folder, what of it could not be read). None where its metrics.json says nothing at all."""
    run = Run(folder=name, path=folder)
    problems: list[str] = []
    try:
        metrics = _json(folder / "metrics.json")
        if metrics.get("status") not in STATUSES:
            raise _Unusable(f"metrics.json: its status is none of a run's, {_text(metrics.get('status'))[:60]}")
    except FileNotFoundError:
        metrics = {}
    except _Unusable as unusable:
        return None, [str(unusable)]
    take = _Taker(metrics, problems)
    run.status = metrics.get("status", "interrupted")
    run.error = str(metrics["error"])[:4000] if metrics.get("error") else None
    run.before, run.after, run.retention = (take.numbers(key) for key in ("before", "after", "retention"))
    for key, path in _COUNTS.items():
        if (value := take.count(*path)) is not None:
            run.numbers[key] = value
    take.ranks(run)
    take.ladder(run)
    run.rungs = {float(share): loss for share, loss in take.numbers("rungs").items() if _is_share(share)}
    versions = metrics.get("versions")
    if isinstance(versions, dict):
        run.versions = {str(key)[:40]: str(value)[:40] for key, value in list(versions.items())[:40]}
    digest = metrics.get("config_sha256")
    run.config_sha256 = digest[:64] if isinstance(digest, str) else None

    run.overrides = _part(problems, lambda: _overrides(folder))
    resolved = _part(problems, lambda: _yaml(folder / ".hydra" / "resolved.yaml"))
    if isinstance(resolved, dict):
        run.settings = settings_of(resolved)
    elif run.overrides is not None:
        run.settings = dict(_told(text) for text in run.overrides if "=" in text)
    _add_from_metrics(run, metrics)
    run.curves = _part(problems, lambda: _history(folder / "history.jsonl", problems)) or {}
    if not run.completed:
        run.log = _part(problems, lambda: _tail(folder / "train.log")) or []
        if not metrics:
            _learn_from_log(run)
    problems = list(dict.fromkeys(problems))
    more = [f"and {len(problems) - 8} more of this kind"] if len(problems) > 8 else []
    return run, problems[:8] + more


def _part(problems: list[str], read: Callable[[], Any]) -> Any:
    """What `read` gives; None for a file that is not there, and where it is of no use, which is put down."""
    try:
        return read()
    except FileNotFoundError:
        return None
    except _Unusable as unusable:
        problems.append(str(unusable))
        return None


def _add_from_metrics(run: Run, metrics: Mapping[str, Any]) -> None:
    """The settings that metrics.json repeats, where .hydra does not give them."""
    model = metrics.get("model")
    model = model if isinstance(model, dict) else {}
    quant = model.get("quant")
    known = {"rank": run.numbers.get("rank"), "seed": run.numbers.get("seed"), "model.name": model.get("name")}
    if "quant" in model:
        known["quant.type"] = quant.get("type") if isinstance(quant, dict) else "none"
    for key, value in known.items():
        if value is not None:
            run.settings.setdefault(key, _setting(value))


def _learn_from_log(run: Run) -> None:
    """Without metrics.json a run ended before it trained: by a kill, or by an error that stands in its log."""
    _, mark, said = "\n".join(run.log).rpartition("ERROR lorafit.failure: ")
    if mark:
        run.error = said
        stopped = said.startswith("stopped by SIG") or said == "interrupted"
        run.status = "interrupted" if stopped else "failed"


def _is_number(value: Any) -> TypeGuard[float]:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and -_MOST < value < _MOST  # which not-a-number is not


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False


class _Taker:
    """Takes numbers out of a metrics.json, and puts down what stands where a number should."""

    def __init__(self, metrics: Mapping[str, Any], problems: list[str]) -> None:
        self.metrics = metrics
        self.problems = problems

    def wrong(self, key: str, value: Any, wanted: str = "a number") -> None:
        if value is not None:
            self.problems.append(f"metrics.json: {key[:60]} is not {wanted}, but {_text(value)[:60]}")

    def section(self, key: str) -> dict[str, Any]:
        value = self.metrics.get(key)
        if isinstance(value, dict):
            return value
        self.wrong(key, value, "a mapping")
        return {}

    def numbers(self, key: str) -> dict[str, float]:
        """The numbers of a section whose keys are not known before, such as those of a task."""
        found: dict[str, float] = {}
        for name, value in self.section(key).items():
            if not re.fullmatch(r"[\w.@/-]{1,40}", name) or len(found) == 40:
                self.problems.append(f"metrics.json: {key} has an impossible key, {_text(name)[:60]}")
                break
            if _is_number(value):
                found[name] = value
            else:
                self.wrong(f"{key}.{name}", value)
        return found

    def count(self, *path: str) -> float | None:
        """A number that cannot be negative, by its path."""
        value = (self.section(path[0]) if len(path) > 1 else self.metrics).get(path[-1])
        if _is_number(value) and value >= 0:
            return value
        self.wrong(".".join(path), value)
        return None

    def ranks(self, run: Run) -> None:
        for module, entry in self.section("ranks").items():
            entry = entry if isinstance(entry, dict) else {}
            rank, effective = entry.get("rank"), entry.get("effective_rank")
            if not (_is_rank(rank) and _is_number(effective) and effective >= 0):
                self.problems.append(f"metrics.json: ranks of {_text(module)[:60]} are not two numbers")
                break
            run.ranks[module[:200]] = (rank, effective)

    def ladder(self, run: Run) -> None:
        ladder = self.section("ladder")
        losses, parameters = ladder.get("losses"), ladder.get("parameters")
        parameters = parameters if isinstance(parameters, dict) else {}
        for text, loss in losses.items() if isinstance(losses, dict) else ():
            rank = int(text) if text.isdecimal() and len(text) < 7 else 0
            if not (_is_rank(rank) and _is_number(loss)):
                self.wrong(f"ladder.losses.{text}", loss if rank else text, "a loss at a rank")
                continue
            count = parameters.get(text)
            run.ladder[rank] = (loss, count if _is_rank(count) else None)


def _is_rank(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and _is_number(value) and value > 0


# -------------------------------------------------------------------------------------------------------- its settings


def settings_of(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration as flat keys: {"rank": 8, "quant.type": "nf4"}. Lists and patterns become text."""
    flat: dict[str, Any] = {}
    for key, value in resolved.items():
        if isinstance(value, dict) and not str(key).endswith("_pattern"):
            flat |= {f"{key}.{name}"[:80]: _setting(item) for name, item in list(value.items())[:200]}
        elif key == "quant" and value is None:
            flat["quant.type"] = "none"
        else:
            flat[str(key)[:80]] = _setting(value)
        if len(flat) > 1000:  # a real one has about a hundred
            break
    return flat


def _setting(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value if not isinstance(value, str) else value[:400]
    if _is_number(value):
        return int(value) if isinstance(value, float) and value.is_integer() else value
    return _text(value)


def _text(value: Any, depth: int = 3) -> str:
    """A value as a person would write it, with an end to everything."""
    if isinstance(value, dict | list) and depth == 0:
        return "…"
    if isinstance(value, list):
        parts = [_text(item, depth - 1) for item in value[:12]]
        return f"[{', '.join(parts + ['…'] * (len(value) > 12))}]"
    if isinstance(value, dict):
        parts = [f"{_text(key, 0)}: {_text(item, depth - 1)}" for key, item in list(value.items())[:12]]
        return f"{{{', '.join(parts + ['…'] * (len(value) > 12))}}}"
    if isinstance(value, int) and not _is_number(value):
        return "a number of very many digits"
    return "null" if value is None else str(value)[:200]


def _told(override: str) -> tuple[str, Any]:
    """The setting that an override gives, where the configuration itself is not there."""
    key, _, value = override.lstrip("+~").partition("=")
    try:
        parsed = yaml.load(value, Loader=_LOADER)
    except (yaml.YAMLError, RecursionError, ValueError):
        parsed = value
    return {"quant": "quant.type"}.get(key, key)[:80], _setting(parsed)


def _overrides(folder: Path) -> list[str]:
    try:
        given = _yaml(folder / ".hydra" / "overrides.yaml")
    except FileNotFoundError:
        raise _Unusable("there is no .hydra/overrides.yaml: nobody knows its command") from None
    if not (isinstance(given, list) and all(isinstance(text, str) for text in given)):
        raise _Unusable(".hydra/overrides.yaml is no list of overrides")
    return given


# ------------------------------------------------------------------------------------------------------------ its files


def _bytes(path: Path, most: int) -> bytes:
    """A regular file of at most so many bytes; FileNotFoundError where there is none."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for
            raise _Unusable(f"{path.name} is not a file")
        if about.st_size > most:
            raise _Unusable(
                f"{path.name} holds {about.st_size / 1e6:,.0f} MB: more than {most / 1e6:,.0f} are not read"
            )
        with path.open("rb") as file:
            return file.read(most)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _Unusable(f"{path.name} cannot be read: {error.strerror or reason(error)}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_bytes(path, _LARGEST["metrics.json"]))
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"{path.name} is not JSON: {reason(error)[:120]}") from None
    if not isinstance(value, dict):
        raise _Unusable(f"{path.name} holds {_text(value)[:60]}, not the numbers of a run")
    return value


def _yaml(path: Path) -> Any:
    """The value of a YAML file of plain data."""
    try:
        return yaml.load(_bytes(path, _LARGEST[".hydra"]), Loader=_LOADER)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _Unusable(f".hydra/{path.name} is not YAML: {reason(error)[:120]}") from None


def _history(path: Path, problems: list[str]) -> dict[str, list[tuple[float, float]]]:
    """The curves of a run, thinned out. Of two values at one step the later one counts: the run was resumed."""
    points: dict[str, dict[float, float]] = {key: {} for key in CURVES}
    lines = _bytes(path, _LARGEST["history.jsonl"]).split(b"\n")
    bad = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, RecursionError, KeyError, TypeError):
            step = None
        if not _is_number(step):
            bad.append(number)
            continue
        for key in CURVES:
            if _is_number(row.get(key)):
                points[key][step] = row[key]
    if bad == [len(lines)]:
        problems.append("history.jsonl: its last line is cut off")
    elif bad:
        problems.append(
            f"history.jsonl: {len(bad)} of {len(lines)} lines cannot be read, the first of them line {bad[0]}"
        )
    return {key: list(thinned(sorted(values.items()))) for key, values in points.items() if values}


def thinned(points: list[tuple[float, float]], most: int = POINTS) -> Iterator[tuple[float, float]]:
    """At most so many points: each the mean of its part of the curve, the first and the last as they are."""
    if len(points) <= most:
        yield from points
        return
    yield points[0]
    inner = points[1:-1]
    for part in range(most - 2):
        chunk = inner[part * len(inner) // (most - 2) : (part + 1) * len(inner) // (most - 2)]
        yield tuple(math.fsum(values) / len(chunk) for values in zip(*chunk, strict=True))  # type: ignore[misc]
    yield points[-1]


def _tail(path: Path) -> list[str]:
    """The last lines of a log of any size."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise _Unusable(f"{path.name} is not a file")
        with path.open("rb") as file:
            file.seek(max(0, about.st_size - _TAIL))
            text = file.read(_TAIL).decode(errors="replace")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _Unusable(f"{path.name} cannot be read: {error.strerror or reason(error)}") from None
    return [line[:400] for line in text.splitlines()[-_LINES:]]
