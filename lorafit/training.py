"""One training run, from its settings to its adapter: check, say what will happen, measure, train, measure, save.

Nothing is written into the run folder before all that can be refused has been checked. What the run has found out so
far stands in `metrics` at every moment, so that whoever called can write metrics.json however it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.build import (
    is_main_process,
    load_module,
    open_logger,
    prove_packing,
    require_accelerator,
    require_no_adapter,
)
from lorafit.config import Config, quoted, settings_to_record
from lorafit.errors import DivergedError, InputError, LorafitError, NotLearning, Paused, Stopped, reason
from lorafit.jobs import config_folder, given_overrides, is_program, record_settings
from lorafit.measuring import measure, measure_ladder, measure_rounding, retention_text
from lorafit.rescue import before_training, only_told, rescued, tried_twice
from lorafit.results import (
    begin_metrics,
    describe_model,
    effective_ranks,
    log_labels,
    log_results,
    memory_metrics,
    write_metrics,
    write_samples,
)
from lorafit.resuming import find_checkpoint, identity, require_same, settle, take_over
from lorafit.sweep import Beyond, Job, Shared, is_completed, read_metrics
from lorafit.terminal import console

if TYPE_CHECKING:
    import lightning as L

    from lorafit.callbacks import Checkpoints, SkipNonFinite, StopOnSignal
    from lorafit.checkpoint import Found
    from lorafit.datamodule import FinetuneDataModule
    from lorafit.exhausted import OutOfMemory
    from lorafit.isolation import Isolation
    from lorafit.module import FinetuneModule

log = logging.getLogger(__name__)


def fine_tune(run: Run) -> float:
    """A run from top to bottom. Returns the held-out loss at its end, or where a sweep looks at it early."""
    from lorafit.callbacks import Checkpoints, SkipNonFinite, StopOnSignal
    from lorafit.exhausted import OutOfMemory

    given = run.config.trainer
    run.finite = SkipNonFinite(given.max_skipped_steps)
    run.checkpoints = Checkpoints(run.folder / "checkpoints", given.checkpoint_every_n_steps, finite=run.finite)
    run.memory_ends = OutOfMemory(run.config, run.metrics, run.checkpoints.last)
    with StopOnSignal(run.checkpoints) as signals, run.memory_ends.told(), contextlib.ExitStack() as stack:
        run.prepare()
        run.announce()
        if is_main_process():  # from here on a run that is killed has left word of itself
            run.take_folder()
        run.measure_base()
        run.logger = stack.enter_context(run.open_logger())
        stack.enter_context(run.memory_ends.told())  # the logger is to hear what it was as well
        try:
            run.train(signals)
        except Paused:
            signals.check()
            return run.look()
        if not is_main_process():
            run.require_finite()
            return math.nan
        run.measure_adapter()
        run.save()
        run.tell()
    return run.metrics["after"]["loss"]


class Run:
    """What a run knows. Its methods are called by `fine_tune`, in the order in which they stand, each once.

    shared: what it has in common with the other jobs of its process. job: which job of a sweep it is. `metrics` are the
    parts of metrics.json, filled as they are found out. `taken`: whether its folder is its own by now; before that
    nothing in it is touched. abandon: ends this process where another of its group has failed and it cannot go on.
    """

    finite: SkipNonFinite
    checkpoints: Checkpoints
    memory_ends: OutOfMemory

    # of `prepare`
    data: FinetuneDataModule
    module: FinetuneModule
    found: Found | None  # the checkpoint it goes on from
    packing: Isolation | None
    other_text: list[list[int]]  # token ids of text that has nothing to do with the task
    trainable: int  # parameters
    total: int
    steps_per_epoch: int
    steps: int  # optimizer steps in all
    stop: int | None  # after how many of them a sweep looks at it
    compiled: Any

    answers_before: list[str]
    rows: list[dict[str, Any]]  # what was logged before the checkpoint
    logger: Any
    trainer: L.Trainer
    samples: list[dict[str, str]]

    def __init__(
        self,
        config: Config,
        folder: Path,
        shared: Shared,
        job: Job | None,
        abandon: Callable[[Run, LorafitError | Stopped], object],
    ) -> None:
        self.began = time.perf_counter()  # before the heavy imports, which are a part of what it takes to start
        self.config, self.folder, self.shared, self.job = config, folder, shared, job
        self.abandon = functools.partial(abandon, self)
        self.metrics = begin_metrics(config)
        if job is not None and job.rungs:
            self.metrics["rungs"] = job.rungs
        self.taken = False
        self.terminal = console(quiet=not is_main_process())

    @property
    def trains(self) -> bool:
        """Whether it has come to its first step."""
        return hasattr(self, "module") and self.module.began

    @property
    def model(self) -> Any:
        return self.module.model

    # ------------------------------------------------------------------------------------------ before the training

    def prepare(self) -> None:
        """Load what goes in, and refuse what would not come to an end; the data first, since what is wrong with them
        is known soonest."""
        import lightning as L
        import torch

        from lorafit.exhausted import MEASURING
        from lorafit.inject import count_parameters
        from lorafit.trainer import quiet_libraries

        L.seed_everything(self.config.seed, verbose=False)
        torch.set_float32_matmul_precision("high")
        quiet_libraries()
        require_no_adapter(self.config)
        require_accelerator(self.config.trainer.accelerator)
        self.found = find_checkpoint(self.config) if self.config.resume else None
        if self.found is None:
            self.config = dataclasses.replace(self.config, resume=None)
        config, metrics, ends = self.config, self.metrics, self.memory_ends

        self.data = self.shared.data(config)
        metrics["data"] = self.data.statistics()
        self.module = load_module(config, self.shared.base(config))
        ends.model, ends.idle_bytes, ends.doing = self.model, self.shared.idle_bytes, MEASURING
        self.data.check_vocabulary(self.model.get_input_embeddings().num_embeddings)
        self.packing = prove_packing(config, self.data, self.model)
        metrics["data"]["packing"] = dataclasses.asdict(self.packing) if self.packing else None
        self.other_text = retention_text(config, self.data)
        if config.model.name != "embedded" and config.data.path == "embedded":
            log.warning("data.path is the embedded toy data set: give data.path=FILE to train on your own")
        self.trainable, self.total = count_parameters(self.model)
        describe_model(metrics, config, self.module, self.trainable, self.total)

        self._require_devices()
        self._count_steps()
        self.checkpoints.held_out = self.data.eval_hash()
        self.checkpoints.identity = identity(config, self.data, self.model, self.devices)
        if self.found is not None:
            require_same(config, self.found, self.checkpoints.identity)
        require_steps(config, self.steps, self.resumed_at, self.goes_on_here)
        self.stop = self.job.steps(self.steps) if self.job else None
        if self.stop and self.resumed_at > self.stop:
            raise Beyond
        batches = self.steps * config.trainer.accumulate_grad_batches
        self.compiled = self.module.decide_compilation(tokens_of(self.data, batches))

    @property
    def devices(self) -> int:
        """How many processes train."""
        import torch

        given = self.config.trainer
        if isinstance(given.devices, int):
            return given.devices
        return 1 if given.accelerator == "cpu" else max(1, torch.cuda.device_count())

    @property
    def goes_on_here(self) -> bool:
        """Whether the run that it goes on with lies in its own folder."""
        return self.config.resume is not None and Path(self.config.resume).resolve() == self.folder.resolve()

    @property
    def resumed_at(self) -> int:
        """How many steps it has taken before."""
        return self.found.step if self.found is not None else 0

    def _require_devices(self) -> None:
        """Raise InputError for what several processes cannot do."""
        if self.devices == 1:
            return
        if self.config.resume and self.data.streaming:
            raise InputError(
                "resume: a streamed run of several processes cannot be resumed, since they stand at different places: "
                "start it anew with one device, or without data.streaming"
            )
        if self.config.trainer.on_oom == "halve":
            raise InputError(
                "trainer.on_oom=halve needs one device, since a group takes one backward pass a batch: trainer.devices "
                f"is {self.devices}"
            )
        if self.job and self.job.until is not None:
            raise InputError(
                f"halving.factor: a job is looked at early on one device only: trainer.devices is {self.devices}"
            )

    def _count_steps(self) -> None:
        from lorafit.trainer import total_steps

        # a stream has the length of the run, for each process
        processes = 1 if self.data.streaming else self.devices
        self.steps_per_epoch = max(1, len(self.data.train_dataloader()) // processes)
        given = self.config.trainer
        self.steps = total_steps(self.steps_per_epoch, given.accumulate_grad_batches, given.max_steps, given.max_epochs)

    def announce(self) -> None:
        """Say what will happen."""
        from lorafit.inject import coverage, lora_layers
        from lorafit.memory import memory_by_part
        from lorafit.quant import base_report
        from lorafit.tables import adapter_notes, data_notes, path_counts, path_notes, source_names, start_table

        config, model, data = self.config, self.model, self.metrics["data"]
        self.metrics["model"]["paths"] = path_counts(self.module.paths)
        self.metrics["model"]["compiled"] = self.module.ops.name == "compiled"
        base = base_report(model)
        assert base is not None
        self.terminal.print(
            start_table(
                base=base,
                architecture=type(model).__name__,
                dtype=str(model.dtype).removeprefix("torch."),
                device=device_label(self.device),
                rank=config.rank,
                alpha=config.alpha,
                scaling=next(iter(lora_layers(model).values())).scaling,
                variant=config.variant,
                coverage=coverage(model),
                trainable=self.trainable,
                total=self.total,
                data=data,
                data_path=source_names(config.data.path),
                data_notes=data_notes(self.data, self.packing),
                optimizer=config.optimizer["_target_"].rpartition(".")[2],
                learning_rate=config.optimizer["lr"],
                steps=self.steps,
                batch_size=config.data.batch_size,
                accumulate=config.trainer.accumulate_grad_batches,
                memory=memory_by_part(model),
                folder=str(self.folder),
                adapter_notes=adapter_notes(model),
                path_notes=path_notes(self.module, self.compiled),
            )
        )

    @property
    def device(self) -> Any:
        return next(self.model.parameters()).device

    def take_folder(self) -> None:
        """Make the folder this run's, and write into it that a run was begun."""
        with before_training(self.folder):
            settle(self.folder, self.found)
            self.taken = True
            record_settings(self.folder, self.config)
            write_metrics(self.folder, self.metrics | {"status": Stopped.status})
        if self.found is not None:
            take_over(self.folder, self.found, self.checkpoints.identity)

    def measure_base(self) -> None:
        self.terminal.print("\nmeasuring the base on held-out data …")
        self.metrics["before"], self.answers_before = self.shared.measured(
            self.config, lambda: measure(self.config, self.data, self.model)
        )

    @contextlib.contextmanager
    def open_logger(self) -> Iterator[Any]:
        """The logger that the settings ask for; None where there is none, or none can be opened."""
        from lorafit.callbacks import history_rows

        resume = self.config.resume
        self.rows = []
        if resume and self.found is not None:
            self.rows = history_rows(Path(resume), self.resumed_at, self.found.validated)
        sweep = self.job.sweep if self.job else None
        with open_logger(self.config, self.folder, sweep=sweep, history=self.rows) as logger:
            yield logger

    # ------------------------------------------------------------------------------------------ the training

    def train(self, signals: StopOnSignal) -> None:
        """Take all steps. Raises Paused where the sweep is to look at it first, and DivergedError with what to go on
        from; `metrics` says of both how far it has come."""
        from lorafit.callbacks import PagedOptimizerMemory, StepMetrics
        from lorafit.exhausted import TRAINING
        from lorafit.machine import return_free_memory
        from lorafit.memory import reset_peak
        from lorafit.tables import stream_sentence

        config, metrics, found, ends = self.config, self.metrics, self.found, self.memory_ends
        speed = StepMetrics(config.trainer.log_every_n_steps)
        memory = PagedOptimizerMemory(config.callbacks.memory_every_n_steps, self.shared.idle_bytes)
        self.trainer = self._trainer(speed, memory, signals)
        return_free_memory()  # what measuring has left is no part of training
        reset_peak(self.device)
        ends.trainer, ends.doing = self.trainer, TRAINING
        try:
            with restoring(found, self.module):
                self.trainer.fit(self.module, self.data, ckpt_path=str(found.path) if found is not None else None)
            self.checkpoints.make_up(self.trainer, self.module)
        except NotLearning as error:
            if error.sound is None or not is_main_process():
                raise
            raise NotLearning(f"{error}.{self._last_good(error.sound + 2, change=False)}") from error
        except DivergedError as error:
            if self.finite.first_of_row is None or not is_main_process():
                raise
            raise DivergedError(f"{error}.{self._last_good(self.finite.first_of_row)}") from error
        finally:
            metrics["speed"] = speed.totals()
            metrics["speed"] |= {"skipped_steps": self.finite.skipped, "halved_batches": self.module.halved}
            metrics["speed"]["startup_seconds"] = round(speed.began - self.began, 3)
            metrics["memory"] = memory_metrics(memory)
            metrics["data"] |= {key: value for key, value in self.data.statistics().items() if self.data.streaming}
        if self.data.streaming:
            self.terminal.print(stream_sentence(metrics["data"]))

    def _trainer(self, speed: L.Callback, memory: L.Callback, signals: StopOnSignal) -> L.Trainer:
        from lorafit.callbacks import AdapterNorms, History, PauseAt, ProveLearning, StepMetrics, TrainingProgress
        from lorafit.group import JobDDP
        from lorafit.trainer import build_trainer

        given, watched = self.config.trainer, self.config.callbacks
        callbacks: list[L.Callback] = [self.finite, speed, memory]
        if watched.prove_after_n_steps:
            callbacks.append(ProveLearning(watched.prove_after_n_steps))
        if watched.norms_every_n_steps:
            callbacks.append(AdapterNorms(watched.norms_every_n_steps))
        if watched.progress:
            assert isinstance(speed, StepMetrics)
            callbacks.append(TrainingProgress(speed, self.terminal))
        callbacks += [self.checkpoints, signals]
        if self.stop:
            callbacks.append(PauseAt(self.checkpoints, self.stop))
        # called as a function, it is for Lightning to find out how the other processes begin
        group = self.devices > 1 and is_program()
        return build_trainer(
            self.folder,
            batches=self.steps_per_epoch,
            max_steps=given.max_steps,
            max_epochs=given.max_epochs,
            accumulate_grad_batches=given.accumulate_grad_batches,
            val_check_interval=given.val_check_interval,
            accelerator=given.accelerator,
            devices=given.devices,
            log_every_n_steps=given.log_every_n_steps,
            callbacks=callbacks,
            logger=[*([self.logger] if self.logger else []), History(self.folder, self.rows)],
            strategy=JobDDP(job_command(self.folder, self.config.resume), self.abandon) if group else "auto",
        )

    def _last_good(self, bad_from: int, change: bool = True) -> str:
        """What to say of the checkpoint that is left to go on from, when steps from this one on came to no good.
        change: whether a lower learning rate would do better."""
        if not math.isfinite(self.metrics["before"]["loss"]):
            return (
                " The base itself gave no finite loss before any training: it is the model, or model.dtype, that is "
                "wrong, and no lower optimizer.lr helps"
            )
        good, run = self.checkpoints.keep_good(bad_from), self.folder
        if good is None and self.found is not None and self.found.step < bad_from - 1:
            good, run = (self.found.path, self.found.step), self.found.path.parent.parent  # it came from another folder
        if good is None:
            return f" It has no checkpoint from before that: begin anew{' with a lower optimizer.lr' if change else ''}"
        lower = " optimizer.lr=LOWER 'allow_changed=[optimizer.lr]'" if change else ""
        return (
            f" The last good checkpoint is {good[0]}, of step {good[1]} (one from which it came to this is called "
            f"diverged.ckpt). To go on from it: {shlex.quote(f'resume={run}')}{lower}"
        )

    def look(self) -> float:
        """What the sweep wants to know of a run that it has stopped early: its held-out loss so far."""
        from lorafit.callbacks.wandb import log_summary
        from lorafit.evaluation import evaluate_loss
        from lorafit.trainer import still_logging

        assert self.job is not None
        loss = evaluate_loss(self.model, self.data.eval_batches())["loss"]
        if not math.isfinite(loss):  # its steps may be skipped ones
            raise DivergedError(f"the held-out loss after {self.stop} steps is not finite. Lower optimizer.lr")
        self.metrics["status"] = Stopped.status
        self.metrics["error"] = f"halving: looked at after {self.stop} of {self.steps} steps"
        self.metrics["rungs"] = self.job.rungs | {str(self.job.until): loss}
        with still_logging(self.logger):
            log_summary(self.logger, self.metrics)
        self.terminal.print(f"after {self.stop} of {self.steps} steps: held-out loss {loss:.4g}")
        return loss

    # ------------------------------------------------------------------------------------------ after the training

    def require_finite(self) -> None:
        """Raise DivergedError when the trained adapter holds a number that is not finite."""
        if bad := self.module.not_finite():
            raise DivergedError(f"the adapter is not finite after training: {', '.join(bad[:3])}.")

    def measure_adapter(self) -> None:
        """Measure what came of it, with the numbers that the base was measured with, and then some."""
        from lorafit.adapter import adapter_bytes
        from lorafit.evaluation import evaluate_loss
        from lorafit.exhausted import MEASURING
        from lorafit.retention import measure_retention

        config, metrics, model = self.config, self.metrics, self.model
        self.memory_ends.doing = MEASURING
        self.terminal.print("measuring the adapter on held-out data …")
        try:
            self.require_finite()
            metrics["after"], answers_after = measure(config, self.data, model)
            if not math.isfinite(metrics["after"]["loss"]):  # finite weights may still overflow
                raise DivergedError("the held-out loss after training is not finite. Lower optimizer.lr.")
        except DivergedError as error:  # what the last step has made is no good place to go on from
            bad_from = self.finite.first_of_row or self.trainer.global_step + 1
            raise DivergedError(f"{error}{self._last_good(bad_from)}") from error
        self.checkpoints.keep_best(metrics["after"]["loss"])
        metrics["ranks"] = effective_ranks(model)
        if config.ladder:
            metrics["ladder"] = measure_ladder(
                model, lambda: evaluate_loss(model, self.data.eval_batches())["loss"], config.ladder
            )
        metrics["retention"] = measure_retention(model, self.other_text)
        self.samples = [
            {"prompt": example.prompt, "before": old, "after": new, "reference": example.completion}
            for example, old, new in zip(self.data.eval_examples, self.answers_before, answers_after, strict=False)
        ]
        metrics["speed"]["total_seconds"] = round(time.perf_counter() - self.began, 3)
        if config.save.dtype != config.adapter_dtype == "float32":  # what was trained rounded is stored as it was used
            metrics["saved"] = {"dtype": config.save.dtype, "bytes": adapter_bytes(model, config.save.dtype)}
            metrics["saved"] |= measure_rounding(model, self.data.eval_batches(), config.save.dtype)

    def save(self) -> None:
        """Write samples and adapter; elsewhere where the run folder does not take the adapter, which raises
        NotSaved."""
        from lorafit.exhausted import SAVING

        with only_told(self.folder / "samples.jsonl", "the run has no samples"):
            write_samples(self.folder / "samples.jsonl", self.samples)
        self.memory_ends.doing = SAVING
        if self.checkpoints.failed is not None:
            log.warning(f"the last checkpoint is not written: {self.checkpoints.failed}")
        refused = tried_twice(lambda: self._save_adapter(self.folder), self.folder, "the adapter")
        if refused is not None:
            raise rescued(self._save_elsewhere, refused, self.folder, resumable=os.path.exists(self.checkpoints.last))
        self.metrics["status"] = "completed"  # only now: without its adapter a run is not

    def _save_adapter(self, place: Path) -> None:
        from lorafit.adapter import save_adapter

        metrics, config = self.metrics, self.config
        provenance = {
            "metrics": {key: metrics[key] for key in ("before", "after", "retention", "saved") if key in metrics},
            "data": {
                "path": config.data.path,
                "template": self.data.template_hash(),
                "sha256": self.data.content_hash(),
                **metrics["data"],
            },
            "settings": settings_to_record(config),
            "config_sha256": metrics["config_sha256"],
            "versions": metrics["versions"],
        }
        save_adapter(self.model, place / "adapter", dtype=config.save.dtype, provenance=provenance)

    def _save_elsewhere(self, place: Path) -> None:
        self._save_adapter(place)
        write_metrics(place, self.metrics)
        write_samples(place / "samples.jsonl", self.samples)

    def tell(self) -> None:
        """Say what did happen, on the terminal and to the logger."""
        from lorafit.callbacks.wandb import log_adapter, log_summary
        from lorafit.data.checks import label_table
        from lorafit.tables import result_table, samples_table
        from lorafit.trainer import still_logging

        metrics, samples, logger, settings = self.metrics, self.samples, self.logger, self.config.logger
        with still_logging(logger):
            log_results(logger, metrics, samples, self.trainer.global_step)
            log_labels(logger, label_table(self.data.encoder, self.data.train_sequences))
            log_summary(logger, metrics)
            if settings is not None and settings.adapter:
                log_adapter(logger, self.folder / "adapter")
        self.terminal.print(result_table(metrics))
        if samples and self.config.task.samples:
            self.terminal.print(samples_table(samples[: self.config.task.samples]))
        speed = metrics["speed"]
        self.terminal.print(
            f"{speed['steps']} steps in {speed['train_seconds']:.0f} s, "
            f"{speed['supervised_tokens_per_second']:,.0f} supervised tokens/s. "
            f"The adapter is in {self.folder / 'adapter'}"
        )


def require_steps(config: Config, steps: int, resumed_at: int, here: bool) -> None:
    """Raise InputError when the warm-up takes all steps, or when the run to be resumed has taken them all. here:
    whether it goes on in its own folder, where its result would be replaced."""
    warmup = config.scheduler.warmup
    if isinstance(warmup, int) and 0 < steps <= warmup:
        raise InputError(f"scheduler.warmup must be shorter than the run: {warmup} steps of warm-up, {steps} in all")
    run = Path(config.resume or "")
    if config.resume and is_completed(run) and (_taken(run, resumed_at) if here else resumed_at) >= steps:
        raise InputError(
            f"resume: {config.resume!r} is complete: to go on, raise "
            f"trainer.max_steps above {steps}, with 'allow_changed=[trainer.max_steps]'"
        )


def _taken(folder: Path, resumed_at: int) -> int:
    """The steps of a run that is complete: where the disk did not take its last checkpoint, it has an older one."""
    speed = read_metrics(folder).get("speed")
    noted = speed.get("steps") if isinstance(speed, dict) else None
    return max(resumed_at, noted) if isinstance(noted, int) else resumed_at


def job_command(folder: Path, resume: str | None) -> list[str]:
    """What the other processes of a job on several devices run: the job alone, in its own folder."""
    given = [f"resume={quoted(resume)}"] if resume else []
    where = [f"hydra.run.dir={quoted(str(folder))}", "hydra.mode=RUN", "hydra.output_subdir=null"]
    own = config_folder()
    flags = ["--config-dir", own] if own else []
    return [sys.executable, "-m", "lorafit.train", *flags, *given_overrides(), *given, *where]


def tokens_of(data: Any, batches: int) -> int:
    """About how many tokens so many batches hold, padding aside; the most that they may where nobody has counted."""
    examples, tokens = len(data.train_sequences), data.statistics()["train_tokens"]
    each = tokens / examples if examples and not data.packing and not data.streaming else data.encoder.max_length
    return round(batches * data.batch_size * each)


@contextlib.contextmanager
def restoring(found: Found | None, module: FinetuneModule) -> Iterator[None]:
    """Raise InputError in place of what goes wrong while the contents of a checkpoint are taken over: it is whole, but
    another version or a stranger has written it. What goes wrong later is no fault of it."""
    from lorafit.checkpoint import Unfit

    try:
        yield
    except Exception as error:
        # what a device, a network or a disk says meanwhile is no fault of the checkpoint
        unfit = isinstance(error, Unfit | KeyError | IndexError | TypeError | AttributeError | ValueError)
        unfit = unfit and (isinstance(error, Unfit) or not isinstance(error, LorafitError))
        if found is None or module.began or not unfit:
            raise
        said = reason(error) if isinstance(error, Unfit) else f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"{found.path} cannot be gone on from ({said}): remove it to begin anew") from error


def device_label(device: Any) -> str:
    """What a user calls a device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
