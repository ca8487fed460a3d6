"""The one place where a configuration meets code: from a checked `Config` to the data, the model and the logger of a
run.

Every program builds with these, so that `audit` looks at just what `train` would train. Below this floor
functions take flat, typed arguments, and nobody has heard of Hydra.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.config import Config, to_dict
from lorafit.errors import InputError

if TYPE_CHECKING:
    from lorafit.datamodule import FinetuneDataModule
    from lorafit.isolation import Isolation
    from lorafit.module import FinetuneModule


BASE = "base"  # how the model without an adapter is called, beside the names of adapters

log = logging.getLogger(__name__)


def is_main_process() -> bool:
    """Whether this process writes and prints. With several devices Lightning starts this command once for each."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


def require_accelerator(accelerator: str) -> None:
    """Raise InputError when the accelerator asked for is not there, before anything is loaded for it."""
    import torch

    there = {"cpu": True, "gpu": torch.cuda.is_available() or torch.backends.mps.is_available()}
    there |= {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "auto": True}
    if not there[accelerator]:
        raise InputError(
            f"trainer.accelerator={accelerator}: there is none on this machine. Use trainer.accelerator=auto"
        )


def build_data(config: Config) -> FinetuneDataModule:
    """The data module that a configuration asks for, with the model's own tokenizer."""
    from lorafit.data import load_tokenizer
    from lorafit.datamodule import FinetuneDataModule

    data = config.data
    return FinetuneDataModule(
        data.path,
        tokenizer=load_tokenizer(
            config.model.name, trust_remote_code=config.model.trust_remote_code, revision=config.model.revision
        ),
        eval_path=data.eval_path,
        eval_fraction=data.eval_fraction,
        eval_limit=config.task.eval_examples,
        format=data.format,
        columns=data.columns,
        subset=data.subset,
        split=data.split,
        eval_split=data.eval_split,
        template=data.template,
        max_length=data.max_length,
        train_on=data.train_on,
        overflow=data.overflow,
        system=data.system,
        on_bad_row=data.on_bad_row,
        packing=data.packing,
        padding_free=data.padding_free,
        group_by_length=data.group_by_length,
        streaming=data.streaming,
        window=data.window,
        stream_batches=(config.trainer.max_steps or 0) * config.trainer.accumulate_grad_batches or None,
        cache=data.cache,
        max_lost=data.max_lost,
        allow=data.allow,
        batch_size=data.batch_size,
        eval_batch_size=data.eval_batch_size,
        num_workers=data.num_workers,
        limit=data.limit,
        seed=config.seed,
    )


def build_module(config: Config, base: Any = None) -> FinetuneModule:
    """The module that a configuration asks for, over `base` if that is given; nothing is loaded yet."""
    from lorafit.module import FinetuneModule

    optimizer = dict(config.optimizer)
    return FinetuneModule(
        config.model.name if base is None else base,
        rank=config.rank,
        alpha=config.alpha,
        target_modules=config.target_modules,
        dropout=config.dropout,
        variant=config.variant,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        bias=config.bias,
        modules_to_save=config.modules_to_save,
        adapter_dtype=config.adapter_dtype,
        **model_options(config),
        checkpointing=config.model.checkpointing,
        fused=config.model.fused,
        compile=config.model.compile,
        optimizer=optimizer.pop("_target_"),
        optimizer_args=optimizer,
        scheduler=config.scheduler.name,
        warmup=config.scheduler.warmup,
        gradient_clip_val=config.trainer.gradient_clip_val,
        on_oom=config.trainer.on_oom,
        seed=config.seed,
    )


def device_name(config: Config) -> str:
    """Where a model is loaded to; each process has its own device."""
    import torch

    on_cuda = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_cuda else "cpu"


def model_options(config: Config) -> dict[str, Any]:
    """How the base of a configuration is loaded, in the words of `load_base_model`."""
    model = config.model
    return {
        "quant": to_dict(config)["quant"],
        "dtype": model.dtype,
        "device": device_name(config),
        "init": model.init,
        "attention": model.attention,
        "trust_remote_code": model.trust_remote_code,
        "revision": model.revision,
        "cache": model.cache,
    }


def require_no_adapter(config: Config) -> None:
    """Raise InputError where a program that makes an adapter is given one."""
    if config.adapter is not None:
        raise InputError("adapter: belongs to merge, evaluate, generate and ranks; a run is gone on with by resume=RUN")


# The keys at the root that are for some of the programs that take an adapter. None is their value where not given.
_OWN = {"prompt": ("generate",), "out": ("merge", "generate", "ranks"), "rank": ("ranks",), "energy": ("ranks",)}


def refuse_foreign(config: Config, program: str) -> None:
    """Raise InputError where the command sets a key that belongs to other programs: it would be ignored here."""
    for key, programs in _OWN.items():
        if key == "rank" and config.adapter is None:
            continue  # without an adapter it is the default of a training
        if program not in programs and getattr(config, key) is not None:
            *others, last = programs
            owners = f"{', '.join(others)} and {last}" if others else last
            raise InputError(f"{key} belongs to {owners}; {program} does not take it: leave {key} out")


def adapter_folders(config: Config) -> dict[str, Path]:
    """The adapters that the command names, by name: their own, or that of their folder."""
    from lorafit.adapter import find_adapter

    given = config.adapter
    if given is None:
        raise InputError("adapter is not set: give adapter=DIR, the folder of an adapter (RUN/adapter)")
    if isinstance(given, dict):
        if BASE in given:
            raise InputError(f"adapter: {BASE!r} is the word for no adapter: call that of {given[BASE]!r} otherwise")
        return {str(name): find_adapter(os.path.expanduser(folder)) for name, folder in given.items()}
    folders: dict[str, Path] = {}
    for entry in given if isinstance(given, list) else [given]:
        folder = find_adapter(os.path.expanduser(entry))
        path = folder.resolve()
        if path in (other.resolve() for other in folders.values()):
            raise InputError(f"adapter: {entry!r} is given twice")
        # what came from the hub lies in a folder that is called by a hash
        called = path if Path(entry).expanduser().is_dir() else Path(entry)
        # every run calls its adapter's folder "adapter": then the run's name says more
        name = called.parent.name if called.name == "adapter" and called.parent.name else called.name
        folders[next(word for word in (name, entry, str(path)) if word not in (BASE, *folders))] = folder
    return folders


def load_base(config: Config) -> Any:
    """The base model that the configuration says, with nothing over it."""
    import torch

    from lorafit.loading import load_base_model

    require_accelerator(config.trainer.accelerator)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # as a run does: model.init=random gives the same weights
        return load_base_model(config.model.name, **model_options(config))


def load_adapted(config: Config) -> Any:
    """The base model with the first of the command's adapters over it, in evaluation mode."""
    from lorafit.adapter import load_adapter

    folder = next(iter(adapter_folders(config).values()))
    model = load_base(config)
    load_adapter(model, folder, allow_other_base=config.allow_other_base)
    return model.eval()


def load_module(config: Config, base: Any = None) -> FinetuneModule:
    """The module that a configuration asks for, its model adapted: `base`, or else one that is loaded."""
    module = build_module(config, base)
    module.configure_model()
    return module


def build_skeleton(config: Config) -> Any:
    """The model that a configuration asks for, without weights and without LoRA layers: nothing is read but its
    configuration, and no memory is used."""
    import torch

    from lorafit.loading import load_base_model

    with torch.device("meta"):
        return load_base_model(
            config.model.name,
            device="meta",
            init="random",
            trust_remote_code=config.model.trust_remote_code,
            revision=config.model.revision,
        )


def prove_packing(config: Config, data: FinetuneDataModule, model: Any) -> Isolation | None:
    """The proof that packed examples do not see each other, where any are packed; InputError when there is none."""
    from lorafit.isolation import require_isolation

    if not (config.data.packing or config.data.padding_free):
        return None
    setting = "data.packing" if config.data.packing else "data.padding_free"
    rows = 1 if config.data.padding_free else min(2, config.data.batch_size)
    return require_isolation(model, data.sample_for_packing(), int(data.tokenizer.pad_token_id), setting, rows=rows)


def open_logger(
    config: Config,
    folder: Path,
    *,
    job_type: str = "train",
    sweep: Path | None = None,
    history: Sequence[Mapping[str, Any]] = (),
) -> contextlib.AbstractContextManager[Any]:
    """The logger of a run, as a context that closes it.

    sweep: the folder of the sweep that the run is a job of. history: the points that a resumed run has logged so far.
    """
    settings = config.logger
    if settings is None or not is_main_process():
        return contextlib.nullcontext()
    if settings.type == "csv":
        return _csv_logger(folder, history)
    from lorafit.callbacks.wandb import wandb_logger

    assert settings.mode is not None and settings.project is not None
    return wandb_logger(
        folder,
        config=to_dict(config),
        mode=settings.mode,
        project=settings.project,
        name=settings.name or (folder.name if sweep else None),
        group=settings.group or (_sweep_name(sweep) if sweep else None),
        tags=[*settings.tags, f"rank={config.rank}", f"quant={config.quant.type if config.quant else 'none'}"],
        job_type=job_type,
        sweep=sweep,
        history=history,
    )


@contextlib.contextmanager
def _csv_logger(folder: Path, history: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """Lightning's CSV logger, which begins its file anew: with what a resumed run has logged so far."""
    from lightning.pytorch.loggers import CSVLogger

    class _Csv(CSVLogger):
        """A disk that does not take it does not end the run."""

        failed = False

        def save(self) -> None:
            if self.failed:  # half a line may be there, and the lines before it be lost: it is not gone on with
                return
            try:
                super().save()
            except OSError as error:
                log.warning(
                    f"{folder / 'csv'} cannot be written ({error.strerror}): the run goes on without it; history.jsonl "
                    "holds the curves"
                )
                self.failed = True

    shutil.rmtree(folder / "csv", ignore_errors=True)  # it would warn that it does so
    logger = _Csv(folder, name="csv", version="")
    for row in history:
        logger.log_metrics({key: value for key, value in row.items() if key != "step"}, step=row["step"])
    try:
        yield logger
    finally:
        logger.save()


def _sweep_name(folder: Path) -> str:
    """What a sweep is called: its folder, with the day where that is one of multirun/DATE/TIME."""
    folder = folder.resolve()
    return f"{folder.parent.name} {folder.name}" if re.fullmatch(r"\d\d-\d\d-\d\d(-\d+)?", folder.name) else folder.name
