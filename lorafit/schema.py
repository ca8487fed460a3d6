"""What a configuration holds, and whether every value in it can work.

The dataclasses say which keys there are; the values themselves live in `conf/`: a field without a default is one that a
file there gives. `check` looks at every value once, before anything is loaded. Nothing here imports torch, so that a
typing error is answered at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from lorafit.errors import InputError, did_you_mean, nearest, shortened

_HERE = Path(__file__).resolve().parent
CONF = next(p for p in (_HERE / "conf", _HERE.parent / "conf") if p.is_dir())  # wheel, checkout


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
    fused: str = MISSING
    compile: str = MISSING
    cache: bool = MISSING
    trust_remote_code: bool = MISSING

    def __post_init__(self) -> None:
        # in YAML an off or on without quotation marks is a truth value
        self.fused = {"False": "off", "True": "auto"}.get(self.fused, self.fused)
        self.compile = {"False": "off", "True": "on"}.get(self.compile, self.compile)


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
    path: Any = MISSING  # a str, or a list of str and of dicts
    subset: str | None = MISSING
    split: str = MISSING
    eval_path: Any = MISSING  # None, or as path
    eval_split: str = MISSING
    eval_fraction: float = MISSING
    format: str = MISSING
    columns: Any = MISSING  # None or a dict; OmegaConf cannot put a dict where a typed None is
    on_bad_row: str = MISSING
    template: str = MISSING
    system: str = MISSING
    max_length: int = MISSING
    overflow: str = MISSING
    max_lost: float = MISSING
    train_on: str = MISSING
    batch_size: int = MISSING
    eval_batch_size: int | None = MISSING
    packing: bool = MISSING
    padding_free: bool = MISSING
    group_by_length: bool = MISSING
    streaming: bool = MISSING
    window: int = MISSING
    cache: bool = MISSING
    num_workers: int = MISSING
    limit: int | None = MISSING
    allow: list[str] = MISSING


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
    max_skipped_steps: int = MISSING
    on_oom: str = MISSING


@dataclass
class Callbacks:
    progress: bool = MISSING
    memory_every_n_steps: int | None = MISSING
    norms_every_n_steps: int | None = MISSING
    prove_after_n_steps: int | None = MISSING


@dataclass
class Logger:
    type: str = MISSING
    mode: str | None = None  # wandb only, as are the next five
    project: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    adapter: bool = False


@dataclass
class Audit:
    examples: int = MISSING
    tokens: int = MISSING


@dataclass
class Save:
    dtype: str = MISSING


@dataclass
class Merge:
    candidate: str = MISSING
    max_shard_size: str = MISSING
    unmerge: str | None = MISSING
    undo: bool = MISSING


@dataclass
class Generate:
    prompts: str | None = MISSING
    chat: bool = MISSING
    max_new_tokens: int = MISSING
    temperature: float = MISSING
    top_p: float = MISSING
    batch_size: int = MISSING
    base: bool = MISSING
    system: str | None = MISSING


@dataclass
class Combine:
    method: str | None = MISSING
    weights: Any = MISSING  # None or a list of numbers
    rank: int | None = MISSING


@dataclass
class Bench:
    shape: str = MISSING
    batch_size: int = MISSING
    length: int = MISSING
    masked: float = MISSING
    settings: list[str] = MISSING
    systems: Any = MISSING  # "auto" or a list of str
    steps: int = MISSING
    warmup: int = MISSING
    seconds: float = MISSING
    memory: bool = MISSING
    tolerance: float = MISSING


@dataclass
class Halving:
    factor: int | None = MISSING
    first: float = MISSING


@dataclass
class Report:
    folder: str | None = MISSING
    metric: str = MISSING
    kept: float = MISSING


@dataclass
class Config:
    """What a run is. `Any` marks a value that `check` judges better than a type could."""

    rank: Any = MISSING  # an int; untyped so that its error reads the same everywhere
    alpha: Any = MISSING  # an int or a float
    target_modules: Any = MISSING  # a str or a list of str
    dropout: float = MISSING
    variant: str = MISSING
    rank_pattern: Any = MISSING  # None or a dict
    alpha_pattern: Any = MISSING  # None or a dict
    bias: str = MISSING
    modules_to_save: list[str] = MISSING
    adapter_dtype: str = MISSING
    seed: int = MISSING
    resume: str | None = MISSING
    allow_changed: list[str] = MISSING
    adapter: Any = MISSING  # None, a str, a list of str, or a dict of name: str
    out: str | None = MISSING
    prompt: str | None = MISSING
    max_kl: float = MISSING
    energy: float | None = MISSING
    allow_other_base: bool = MISSING
    quant: Quant | None = MISSING
    model: Model = MISSING
    task: Task = MISSING
    data: Data = MISSING
    optimizer: dict[str, Any] = MISSING  # _target_, lr and the arguments of that class
    scheduler: Scheduler = MISSING
    trainer: Trainer = MISSING
    callbacks: Callbacks = MISSING
    logger: Logger | None = MISSING
    audit: Audit = MISSING
    save: Save = MISSING
    merge: Merge = MISSING
    generate: Generate = MISSING
    combine: Combine = MISSING
    bench: Bench = MISSING
    ladder: list[int] | None = MISSING
    halving: Halving = MISSING
    report: Report = MISSING


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts and lists, for JSON and for loggers."""
    return dataclasses.asdict(config)


# sections and keys that do not change what comes out of a run
NO_PART_OF_A_RUN = (
    *("resume", "allow_changed", "logger", "callbacks", "audit", "halving", "report", "bench"),
    *("adapter", "out", "prompt", "max_kl", "energy", "allow_other_base", "merge", "generate", "combine"),
)


# what a resumed run may have otherwise and still be trained as it would have been: sections, and keys
_NOT_OF_THE_TRAINING = (
    *NO_PART_OF_A_RUN,
    *("task", "ladder", "save"),
    *("model.cache", "model.trust_remote_code", "data.num_workers", "data.cache", "data.max_lost", "data.allow"),
    *("data.eval_path", "data.eval_split", "data.eval_batch_size"),
    *("trainer.val_check_interval", "trainer.log_every_n_steps", "trainer.checkpoint_every_n_steps"),
    *("trainer.accelerator", "trainer.max_skipped_steps", "trainer.on_oom"),
    # where base and data lie, and how the rows say what they say: judged by what is found there
    *("model.name", "model.revision", "data.path", "data.subset", "data.split", "data.format", "data.columns"),
    "data.on_bad_row",
)
# by which way the same is computed: rounding differs
_OF_THE_ROUNDING = ("model.fused", "model.compile", "model.checkpointing", "model.attention")


def training_settings(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that decide what is trained, by dotted key, and those that decide how it is rounded on the way."""
    values = flat(to_dict(config) | {"quant": {"type": "none"} if config.quant is None else to_dict(config)["quant"]})
    kept = {
        key: value
        for key, value in values.items()
        if key not in _NOT_OF_THE_TRAINING and key.partition(".")[0] not in _NOT_OF_THE_TRAINING
    }
    rounding = {key: kept.pop(key) for key in _OF_THE_ROUNDING}
    return kept, rounding


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted keys: {"quant.type": "nf4"}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def config_sha256(config: Config) -> str:
    """`settings_sha256` of a configuration."""
    return settings_sha256(to_dict(config))


def settings_sha256(values: Mapping[str, Any]) -> str:
    """Equal for two runs of the same settings; where one started from (`resume`), who watches it (`logger`,
    `callbacks`), what is shown of it (`audit`), whether a sweep lets it finish (`halving`) and what is done with an
    adapter or with many runs later do not count."""
    values = {key: value for key, value in values.items() if key not in NO_PART_OF_A_RUN}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# --- is every value one that can work? ------------------------------------------------------------

_DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
# as in lorafit/data (a test holds them equal); not imported, since that would import torch
_COLUMNS = (
    *("instruction", "output", "conversations", "messages", "prompt", "completion", "question", "answer", "text"),
    *("input", "system"),
)
_CHECKS = (
    *("no_supervised_token", "end_masked", "prompt_trained", "answer_masked", "answer_lost"),
    *("template_mismatch", "opening_differs", "doubled_special"),
)
# as in lorafit/bench.py (a test holds them equal)
BENCH_SHAPES = ("tiny", "small", "big", "llama-7b", "llama-13b", "llama-70b")
BENCH_SETTINGS = ("bf16", "bf16_checkpointing", "nf4", "nf4_checkpointing", "nf4_vs_bf16", "head_loss")
BENCH_SYSTEMS = ("lorafit", "peft", "trl", "litgpt", "unsloth", "transformers")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OPTIMIZER = re.compile(r"(torch|bitsandbytes)\.optim\.[A-Za-z]\w*")

_CHOICES = {
    "variant": ("lora", "rslora"),
    "bias": ("none", "all", "lora_only"),
    "adapter_dtype": ("float32", "int8", "nf4"),
    "save.dtype": ("float32", "bfloat16", "int8", "nf4"),
    "merge.candidate": ("auto", "original", "dequantized", "requantized"),
    "combine.method": ("linear", "cat", "svd"),
    "quant.type": ("nf4", "fp4", "int8"),
    "quant.compute_dtype": ("bfloat16", "float16", "float32"),
    "model.init": ("pretrained", "random"),
    "model.dtype": ("auto", "bfloat16", "float16", "float32"),
    "model.attention": ("auto", "sdpa", "eager", "flash_attention_2", "flex_attention"),
    "model.checkpointing": ("none", "selective", "full", "offload"),
    "model.fused": ("auto", "off"),
    "model.compile": ("auto", "on", "off"),
    "task.name": ("causal_lm",),
    "data.format": ("auto", "alpaca", "sharegpt", "chat", "prompt_completion", "question_answer", "text"),
    "data.template": ("auto", "chat", "plain", "alpaca"),
    "data.train_on": ("completion", "all", "last_turn"),
    "data.overflow": ("drop", "truncate_prompt", "truncate", "error"),
    "data.system": ("keep", "fold", "drop"),
    "data.on_bad_row": ("error", "skip"),
    "scheduler.name": ("cosine", "linear", "constant"),
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.on_oom": ("stop", "halve"),
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
    "data.window",
    "audit.tokens",
    "trainer.accumulate_grad_batches",
    "trainer.log_every_n_steps",
    "trainer.checkpoint_every_n_steps",
    "callbacks.memory_every_n_steps",
    "callbacks.norms_every_n_steps",
    "callbacks.prove_after_n_steps",
    "generate.max_new_tokens",
    "generate.batch_size",
    "combine.rank",
    "bench.batch_size",
    "bench.steps",
    "bench.warmup",
)  # where the type allows null, null is fine
_NOT_NEGATIVE = (
    *("seed", "task.generate_examples", "task.samples", "data.num_workers", "audit.examples"),
    "trainer.max_skipped_steps",
)


def near_names(word: str, choices: Iterable[str], count: int = 3) -> str:
    """The end of a message: nothing, or a full stop and the nearest names."""
    hint = did_you_mean(word, nearest(word, choices, count))
    return f".{hint}" if hint else ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _within(value: Any, low: float, high: float) -> bool:
    """low <= value < high, and a number at all (not nan)."""
    return is_number(value) and low <= value < high


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
        raise InputError("\n".join(map(shortened, problems)))


def _check_values(config: Config) -> Iterable[str]:
    values = to_dict(config)
    yield from _check_changes(config.allow_changed, flat(values))
    for key, choices in _CHOICES.items():
        value = _pick(values, key)
        if value is not None and value not in choices:
            known = ", ".join(choices)
            yield f"{key} must be one of {known}, got {value!r}{near_names(value, choices)}"
    for key in _POSITIVE:
        value = _pick(values, key)
        optional = key != "rank" or config.adapter is not None  # an adapter has its own rank
        if not (_is_int(value) and value > 0) and not (value is None and optional):
            yield f"{key} must be a positive integer, got {value!r}"
    for key in _NOT_NEGATIVE:
        value = _pick(values, key)
        if not (_is_int(value) and value >= 0):
            yield f"{key} must be zero or a positive integer, got {value!r}"

    # alpha usually follows rank: a bad rank is said once, not twice
    follows = config.alpha == config.rank or (is_number(config.rank) and config.alpha == 2 * config.rank)
    rank_is_bad = not (_is_int(config.rank) and config.rank > 0)
    own = config.alpha is None and config.adapter is not None
    if not _within(config.alpha, 1e-12, float("inf")) and not (follows and rank_is_bad) and not own:
        yield f"alpha must be a positive number, got {config.alpha!r}"
    names = config.target_modules
    names = [names] if isinstance(names, str) else names
    if not (names and isinstance(names, list) and all(isinstance(n, str) and n for n in names)):
        yield (f"target_modules must be all_linear or a list of module names, got {config.target_modules!r}")
    if not _within(config.dropout, 0, 1):
        yield f"dropout must be in [0, 1), got {config.dropout!r}"
    yield from _check_pattern("rank_pattern", config.rank_pattern, "positive integer", lambda v: _is_int(v) and v > 0)
    yield from _check_pattern(
        "alpha_pattern", config.alpha_pattern, "positive number", lambda v: _within(v, 1e-12, float("inf"))
    )
    if config.model.fused == "off" and config.model.compile == "on":
        yield "model.compile=on compiles the fast path: leave model.fused=off out, or give model.compile=auto"
    yield from _check_rounding(config)
    yield from _check_adapter_keys(config)
    yield from _check_bench(config.bench)
    yield from _check_sweep(config)
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
    if not 0 <= data.max_lost <= 1:
        yield f"data.max_lost must be in [0, 1], got {data.max_lost!r}"
    for name in data.allow:
        if name == "no_supervised_token":
            yield "data.allow: no_supervised_token cannot be allowed, since there is nothing to train"
        elif name not in _CHECKS:
            checks = _CHECKS[1:]
            yield f"data.allow: there is no check {name!r} ({', '.join(checks)}){near_names(name, checks)}"
    yield from _check_columns("data.columns", data.columns)
    for key in ("path", "eval_path"):
        for entry in _entries(getattr(data, key)):
            if isinstance(entry, dict):
                yield from _check_columns(f"data.{key}: columns", entry.get("columns"))
    if data.streaming:
        if not (config.trainer.max_steps or 0) > 0:
            yield "data.streaming=true: the data has no known end, so give trainer.max_steps"
        if isinstance(config.trainer.val_check_interval, float):
            yield "data.streaming=true: trainer.val_check_interval must be a number of steps: an epoch has no known end"

    yield from _check_optimizer(config.optimizer)
    trainer = config.trainer
    for key in ("max_steps", "max_epochs"):
        value = getattr(trainer, key)
        if value is not None and value != -1 and value < 1:
            yield f"trainer.{key} must be a positive integer, or -1 or null for none, got {value!r}"
    interval = trainer.val_check_interval
    if interval is not None and not (interval > 0 if _is_int(interval) else is_number(interval) and 0 < interval <= 1):
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


def _check_changes(allowed: list[str], keys: Mapping[str, Any]) -> Iterable[str]:
    """What a resumed run may have otherwise."""
    known = ("all", "base", "data", "template", *{key.partition(".")[0] for key in keys if "." in key}, *keys)
    for name in allowed:
        # which keys these two have differs from run to run
        if name not in known and name.partition(".")[0] not in ("optimizer", "quant"):
            hint = near_names(name, known)
            yield f"allow_changed: there is no {name!r}: give base, data, template, all or a key{hint}"


def _check_bench(bench: Bench) -> Iterable[str]:
    if bench.shape not in BENCH_SHAPES and not os.path.isfile(
        os.path.join(os.path.expanduser(bench.shape), "config.json")
    ):
        known = ", ".join(BENCH_SHAPES)
        yield (
            f"bench.shape must be one of {known} or a model folder with a config.json, got {bench.shape!r}"
            f"{near_names(bench.shape, BENCH_SHAPES)}"
        )
    if bench.length < 2:
        yield f"bench.length must be an integer above 1, got {bench.length!r}"
    systems = [] if bench.systems == "auto" else bench.systems
    if not isinstance(systems, list) or (bench.systems != "auto" and not systems):
        yield f"bench.systems must be auto or a list of systems, got {bench.systems!r}"
        systems = []
    if not bench.settings:
        yield f"bench.settings must name at least one of {', '.join(BENCH_SETTINGS)}"
    for key, given, choices in (
        ("bench.settings", bench.settings, BENCH_SETTINGS),
        ("bench.systems", systems, BENCH_SYSTEMS),
    ):
        for value in given:
            if value not in choices:
                yield f"{key}: there is no {value!r} ({', '.join(choices)}){near_names(str(value), choices)}"
    if not _within(bench.masked, 0, 1):
        yield f"bench.masked must be in [0, 1), got {bench.masked!r}"
    for key in ("seconds", "tolerance"):
        if not _within(getattr(bench, key), 1e-12, float("inf")):
            yield f"bench.{key} must be a positive number, got {getattr(bench, key)!r}"


def _check_sweep(config: Config) -> Iterable[str]:
    """What a run is told of the others beside it: the ranks its adapter is cut to, halving, the report of all."""
    ladder = config.ladder
    if ladder is not None and not (ladder and all(rank > 0 for rank in ladder) and len(set(ladder)) == len(ladder)):
        yield f"ladder must be a list of different ranks, each a positive integer, got {ladder!r}"
    factor, first = config.halving.factor, config.halving.first
    if factor is not None and factor < 2:
        yield f"halving.factor must be 2 or more (2 keeps the better half), or null for no halving, got {factor!r}"
    if not 0 < first < 1:
        yield f"halving.first must be a share of the steps in (0, 1), got {first!r}"
    if not 0 < config.report.kept <= 1:
        yield f"report.kept must be in (0, 1], got {config.report.kept!r}"


def _check_rounding(config: Config) -> Iterable[str]:
    trained, stored = config.adapter_dtype, config.save.dtype
    if trained != "float32" and stored not in (trained, "float32"):
        yield f"save.dtype must be {trained} or float32: the adapter is trained as {trained} holds it, got {stored!r}"


def _check_pattern(key: str, pattern: Any, wanted: str, good: Callable[[Any], bool]) -> Iterable[str]:
    if pattern is not None and not isinstance(pattern, dict):
        yield f"{key} must be like {{down_proj: 8}}, got {pattern!r}"
    for name, value in (pattern or {}).items() if isinstance(pattern, dict) else ():
        if not good(value):
            yield f"{key}: of {name!r} must be a {wanted}, got {value!r}"


def _check_adapter_keys(config: Config) -> Iterable[str]:
    """What the programs that begin with a finished adapter are told."""
    given = config.adapter
    folders = list(given.values()) if isinstance(given, dict) else given if isinstance(given, list) else [given]
    if given is not None and not (folders and all(isinstance(folder, str) and folder for folder in folders)):
        yield f"adapter must be a folder, a list of folders or {{name: folder}}, got {given!r}"
    if not _within(config.max_kl, 0, float("inf")):
        yield f"max_kl must be zero or a positive number, got {config.max_kl!r}"
    if config.energy is not None and not 0 < config.energy <= 1:
        yield f"energy must be in (0, 1], got {config.energy!r}"
    if not re.fullmatch(r"[1-9]\d*\s*(B|KB|MB|GB)", config.merge.max_shard_size):
        yield f"merge.max_shard_size must be like 5GB or 500MB, got {config.merge.max_shard_size!r}"
    if not _within(config.generate.temperature, 0, float("inf")):
        yield f"generate.temperature must be zero or a positive number, got {config.generate.temperature!r}"
    if not 0 < config.generate.top_p <= 1:
        yield f"generate.top_p must be in (0, 1], got {config.generate.top_p!r}"
    weights = config.combine.weights
    if weights is not None and not (isinstance(weights, list) and weights and all(map(is_number, weights))):
        yield f"combine.weights must be a list of numbers, got {weights!r}"
    if isinstance(weights, list) and given is not None and len(weights) != len(folders):
        yield f"combine.weights must be one number for each adapter: {len(weights)} for {len(folders)}"


def _entries(value: Any) -> list[Any]:
    """The sources of `data.path`, which may be one or a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _check_columns(key: str, columns: Any) -> Iterable[str]:
    if columns is not None and not isinstance(columns, dict):
        yield f"{key} must be like {{prompt: question, completion: answer}}, got {columns!r}"
    elif columns:
        for column, source in columns.items():
            if column not in _COLUMNS:
                known = ", ".join(_COLUMNS)
                yield f"{key} has no entry {column!r} ({known}){near_names(str(column), _COLUMNS)}"
            elif not isinstance(source, str):
                yield f"{key}.{column} must be the name of a column, got {source!r}"


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
    for key in (
        ("path", "eval_path") if config.adapter is None else ()
    ):  # an adapter's data is asked for when it is read
        for entry in _entries(getattr(config.data, key)):
            value = entry.get("path") if isinstance(entry, dict) else entry
            if not isinstance(value, str):
                yield f"data.{key}: a source is a path or a mapping with a path, got {entry!r}"
            elif value == "":
                yield f"data.{key} is not set: give data.{key}=FILE, or a name on the hub"
            elif value != "embedded":
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
        if not config.resume.strip():
            yield "resume is empty: give the folder of a run, auto, or null for a new one"
            return
        run = Path(config.resume)
        own = [place for place in list(run.parents)[:2] if os.path.isfile(place / ".hydra" / "overrides.yaml")]
        if own and os.path.exists(run) and not os.path.isdir(run / ".hydra"):
            yield f"resume: {config.resume!r} is a part of a run: give the folder of the run, resume={own[0]}"
        elif not os.path.isdir(run):  # a Path's own is_dir raises for a name that is too long
            beside = run.parent
            folders = [str(place) for place in beside.iterdir() if place.is_dir()] if os.path.isdir(beside) else []
            hint = near_names(config.resume, folders)
            yield f"resume: no folder {config.resume!r}{hint}"
        elif (run / "multirun.yaml").is_file():
            yield f"resume: {config.resume!r} is a sweep: give its command again, with hydra.sweep.dir={config.resume}"
        elif not any((run / "checkpoints").glob("*.ckpt")) and not (run / ".hydra" / "overrides.yaml").is_file():
            yield f"resume: {config.resume!r} is no run: it holds neither checkpoints nor the settings of one"


def _check_source(key: str, value: str, suffixes: tuple[str, ...]) -> Iterable[str]:
    """`value` is a path that exists and is not empty, or looks like a name on the hub."""
    path = Path(value)
    if not os.path.exists(value):
        is_path = value.startswith((".", "/", "~")) or path.suffix.lower() in suffixes
        if is_path or not _HUB_NAME.fullmatch(value):
            beside = path.parent.iterdir() if os.path.isdir(path.parent) else ()
            hint = near_names(value, (str(found) for found in beside))
            yield f"{key}: no file or folder {value!r}{hint}"
    elif path.is_file() and path.stat().st_size == 0:
        yield f"{key}: {value!r} is empty"
    elif path.is_dir() and not any(path.iterdir()):
        yield f"{key}: the folder {value!r} is empty"
